"""Write graphs beside the shards that they refer to; where that is impossible, into a copy of the checkpoint.

ONNX lets external data lie only at or below the .onnx file, and refuses links. So ``DIR/model.onnx`` is
written beside DIR's shards, and no byte of a weight is written. With another folder, shards that are links,
or experts that do not lie back to back (a published checkpoint), the tensors are copied into OUT in the order
that ``pack`` writes.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from nemoquant.checkpoint import SHARD_BYTES, manifest
from nemoquant.checkpoint.folder import check_output
from nemoquant.checkpoint.header import TensorInfo
from nemoquant.checkpoint.intact import Intact, Say, hash_once, silent
from nemoquant.checkpoint.making import making
from nemoquant.checkpoint.reader import INDEX
from nemoquant.checkpoint.side_files import copy_side_files, side_files
from nemoquant.checkpoint.towers import text_only
from nemoquant.checkpoint.weights import TORCH
from nemoquant.checkpoint.writer import ShardWriter
from nemoquant.errors import CheckpointError, OutputError, UsageError, listing
from nemoquant.files import copy_again, replace_bytes, write_json_again
from nemoquant.graph import MODEL, MTP, Exported, Trial
from nemoquant.graph.build import Builder, GraphOptions
from nemoquant.graph.dialects import DIALECTS
from nemoquant.graph.weights import stacked
from nemoquant.layouts.modelopt import LEGACY
from nemoquant.pack.files import WRITTEN
from nemoquant.progress import Progress, no_progress
from nemoquant.quantized.checkpoint import PackedCheckpoint
from nemoquant.sources.source import FLOAT_DTYPES

COPY_BYTES = 16 << 20
WIDE = "F32"  # holds all of FLOAT_DTYPES exactly


def export_onnx(
    path: Path,
    out: Path | None,
    dialect: str,
    options: GraphOptions,
    trial: Trial,
    *,
    mtp: bool = False,
    copy: bool = True,
    say: Say = silent,
    progress: Progress = no_progress,
) -> Exported:
    """Write ``model.onnx`` (and ``mtp.onnx``) for the checkpoint in ``path``.

    Args:
        out: a new folder for a copy; None is ``path`` itself.
        trial: how graphs are loaded once before they are written.
        copy: False refuses where tensors would have to be copied.
        say: told how much is hashed, where a checkpoint with a manifest is to be held against it.
    Raises:
        CheckpointError, UsageError, OutputError; EngineError where the trial fails
    """
    opened = PackedCheckpoint(path)
    with opened.checkpoint:
        Builder(opened, DIALECTS[dialect], options)  # refuses bad options before a byte is written
        if mtp and not opened.has_mtp:
            raise UsageError(f"{path} has no multi-token-prediction module; leave out --mtp")
        reason = _why_copy(opened, out, mtp)
        if reason is None:
            return _write_graphs(
                opened, dialect, options, trial, mtp=mtp, held=lambda: _intact(opened, say, progress)
            )
        if not copy:
            raise UsageError(
                f"{path}: its tensors would have to be copied, because {reason}; --no-copy forbids it"
            )
        if out is None:
            raise UsageError(
                f"{path}: a graph can't stand beside its tensors, because {reason}; give an OUT folder for "
                f"a copy"
            )
        widened = _widened(opened)
        size = sum(_written_bytes(info, name in widened) for name, info in opened.checkpoint.tensors.items())
        check_output(out, path, len(opened.checkpoint.tensors), size)
        intact = _intact(opened, say, progress)
        with making(out, _names(opened)) as made:
            _copy(opened, made.folder, progress)
            if intact is not None:
                intact.check(manifest.read_manifest(path))
            copied = PackedCheckpoint(made.folder)
            with copied.checkpoint:
                signed = copied.manifest
                of_copy = None if signed is None else Intact.copy(copied.path, signed)
                written = _write_graphs(copied, dialect, options, trial, mtp=mtp, held=lambda: of_copy)
    warnings = written.warnings
    if widened:
        warnings += (
            f"{len(widened)} tensors are {WIDE} in the copy, exactly their values: a graph reads the experts "
            f"of a layer as one tensor, and these have several dtypes in {path}",
        )
    return replace(
        written,
        folder=out,
        graphs=[out / graph.name for graph in written.graphs],
        copied_bytes=size,
        warnings=warnings,
    )


def _intact(opened: PackedCheckpoint, say: Say, progress: Progress) -> Intact | None:
    """The checkpoint held against its manifest; None where it has none."""
    return None if opened.manifest is None else hash_once(opened.path, opened.manifest, say, progress)


def _why_copy(opened: PackedCheckpoint, out: Path | None, mtp: bool) -> str | None:
    if out is not None and out.resolve() != opened.path.resolve():
        return f"the graph is to stand in {out}"
    files = {info.file for info in opened.checkpoint.tensors.values()}
    links = sorted(file.name for file in files if file.is_symlink() or file.stat().st_nlink > 1)
    if links:
        return f"{links[0]} is a link, and ONNX refuses external data behind links"
    if _widened(opened, mtp):
        return "its experts have several dtypes, so that no 3-D view of them exists"
    if not _views(opened, mtp):
        return "its experts do not lie back to back, so that no 3-D view of them exists"
    return None


def _widened(opened: PackedCheckpoint, mtp: bool = True) -> set[str]:
    """Tensors that a copy holds as ``WIDE``, since other experts of their stack have another dtype.

    Raises:
        CheckpointError: they are not all floating.
    """
    found = set()
    for group in _expert_groups(opened, mtp):
        dtypes = {name: opened.checkpoint.tensors[name].dtype for name in group}
        if len(set(dtypes.values())) == 1:
            continue
        if not set(dtypes.values()) <= set(FLOAT_DTYPES):
            raise CheckpointError(
                f"{opened.path}: {group[0]} and the same part of the other experts are "
                f"{listing(sorted(set(dtypes.values())))}; expected one dtype, quantize again"
            )
        found |= {name for name, dtype in dtypes.items() if dtype != WIDE}
    return found


def _written_bytes(info: TensorInfo, wide: bool) -> int:
    """The size of a tensor in a copy."""
    return 4 * math.prod(info.shape) if wide else info.nbytes


def _expert_groups(opened: PackedCheckpoint, mtp: bool = True) -> Iterator[list[str]]:
    """Names of the tensors that the graph reads as one, in ascending order of experts.

    A group is one part (such as the codes) of all experts of a layer and projection; those of multi-token
    prediction only with ``mtp``.
    """
    groups: dict[tuple[int | None, str, str], list[str]] = {}
    for spec in opened.table:
        wanted = mtp or not spec.role.startswith("mtp.")
        if wanted and spec.expert is not None and spec.name in opened.stored:
            for part, name in opened.stored[spec.name].parts.items():
                groups.setdefault((spec.layer, spec.role, part), []).append(name)
    return iter(groups.values())


def _names(opened: PackedCheckpoint) -> set[str]:
    """Names of all files that a copy may have."""
    shards = {info.file.name for info in opened.checkpoint.tensors.values()}
    if not _views(opened):
        count = sum(1 for _ in _shards(opened))
        shards = {_shard_name(number, count) for number in range(1, count + 1)}
    return {*shards, *WRITTEN, *side_files(opened.path, opened.raw_config)[0], MODEL, MTP}


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _copy(opened: PackedCheckpoint, folder: Path, progress: Progress) -> None:
    """Copy the checkpoint into an empty folder.

    Files are copied unchanged where experts lie back to back, else tensors are written in the order of
    ``pack``.
    """
    if _views(opened):
        _copy_files(opened, folder, progress)
    else:
        _copy_tensors(opened, folder, progress)


def _copy_tensors(opened: PackedCheckpoint, folder: Path, progress: Progress) -> None:
    """Write all tensors into new shards; no manifest, because ``quantize`` did not write these files."""
    tensors, widened, done = opened.checkpoint.tensors, _widened(opened), 0
    total = sum(_written_bytes(info, name in widened) for name, info in tensors.items())
    beside = {spec.name for spec in opened.towers}
    written = {name: name if name in beside else opened.config.prefix + name for name in tensors}
    weight_map: dict[str, str] = {}
    shards = list(_shards(opened))
    for number, names in enumerate(shards, 1):
        file = _shard_name(number, len(shards))
        entries = [
            (written[name], WIDE if name in widened else tensors[name].dtype, tensors[name].shape)
            for name in names
        ]
        with ShardWriter(folder / file, entries) as writer:
            for name in names:
                raw = opened.checkpoint.raw(name)
                for start in range(0, raw.size, COPY_BYTES):
                    piece = raw[start : start + COPY_BYTES]
                    writer.write(_wide(piece, tensors[name].dtype) if name in widened else piece)
                opened.checkpoint.release([name])
                done += _written_bytes(tensors[name], name in widened)
                progress("copy", done, total, "")
        weight_map |= {written[name]: file for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json_again(folder / INDEX, index)
    for name in ("config.json", LEGACY):
        if (opened.path / name).exists():
            copy_again(opened.path / name, folder / name)
    copy_side_files(opened.path, side_files(opened.path, opened.raw_config)[0], folder)


def _wide(piece: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    """Stored numbers as float32, which holds every float16 and bfloat16."""
    return torch.from_numpy(piece.copy()).view(TORCH[dtype]).float().numpy()  # a mapping can't be written to


def _shards(opened: PackedCheckpoint) -> Iterator[list[str]]:
    """Names of tensors by file of at most ``SHARD_BYTES``; a group of experts stays together."""
    tensors = opened.checkpoint.tensors
    groups = {group[0]: group for group in _expert_groups(opened)}
    grouped = {name for group in groups.values() for name in group}
    shard: list[str] = []
    used = 0
    for first in tensors:
        if first in grouped and first not in groups:
            continue
        unit = groups.get(first, [first])
        size = sum(tensors[name].nbytes for name in unit)
        if shard and used + size > SHARD_BYTES:
            yield shard
            shard, used = [], 0
        shard += unit
        used += size
    yield shard


def _views(opened: PackedCheckpoint, mtp: bool = True) -> bool:
    return all(
        stacked([opened.checkpoint.tensors[name] for name in group]) for group in _expert_groups(opened, mtp)
    )


def _copy_files(opened: PackedCheckpoint, folder: Path, progress: Progress) -> None:
    """Copy shards and their other files unchanged, following links; graphs are exported again."""
    path = opened.path
    names = sorted({info.file.name for info in opened.checkpoint.tensors.values()})
    names += [name for name in (INDEX, *WRITTEN) if (path / name).is_file() and name != manifest.FILE]
    names += side_files(path, opened.raw_config)[0]
    total, done = sum((path / name).stat().st_size for name in names), 0
    for name in names:
        copy_again(path / name, folder / name)
        done += (path / name).stat().st_size
        progress("copy", done, total, "")
    if opened.manifest is not None:
        kept = {name: digest for name, digest in opened.manifest["files"].items() if (folder / name).exists()}
        manifest.write_manifest(
            folder, {k: v for k, v in opened.manifest.items() if k != "sha256"} | {"files": kept}
        )


def _write_graphs(
    opened: PackedCheckpoint,
    dialect: str,
    options: GraphOptions,
    trial: Trial,
    *,
    mtp: bool,
    held: Callable[[], Intact | None],
) -> Exported:
    """Write the graphs of ``opened``; ``held`` holds its shards against its manifest, and may read them."""
    models = {MODEL: Builder(opened, DIALECTS[dialect], options).main()}
    if mtp:
        models[MTP] = Builder(opened, DIALECTS[dialect], options).mtp()
    contents = {}
    for name, model in models.items():
        _describe(opened, model, dialect, options)
        contents[name] = ir.to_proto(model).SerializeToString()
        trial.load(contents[name], opened.path / name)
    intact = held()  # after what could be refused without reading the shards
    functions, nodes = [], 0
    for name, model in models.items():
        _save(contents[name], opened.path / name, intact)
        functions += [f.name for f in model.functions.values() if f.name not in functions]
        nodes += len(model.graph) + sum(len(f) for f in model.functions.values())
    told = [text_only(opened.towers)] if opened.towers else []
    if trial.why_not is not None:
        told.append(f"the graph was not loaded to try it: {trial.why_not}")
    graphs = [opened.path / name for name in models]
    return Exported(opened.path, graphs, 0, functions, nodes, loaded_by=trial.by, warnings=tuple(told))


def _describe(opened: PackedCheckpoint, model: ir.Model, dialect: str, options: GraphOptions) -> None:
    """Write into the graph's metadata what an engine must know about it."""
    used: dict[str, TensorInfo] = {}
    for info in opened.checkpoint.tensors.values():
        used.setdefault(info.file.name, info)
    facts: dict[str, Any] = {
        "dialect": dialect,
        "compute": options.compute,
        "plan": opened.manifest["plan"]["sha256"] if opened.manifest else None,
        "files": {name: shard_identity(opened, name) for name in sorted(used)},
    }
    model.metadata_props["nemoquant"] = json.dumps(facts, sort_keys=True)


def shard_identity(opened: PackedCheckpoint, name: str) -> dict[str, Any]:
    """Size and sha256 of a shard; the hash comes from the manifest, None where there is none."""
    files = opened.manifest["files"] if opened.manifest else {}
    return {"size": (opened.path / name).stat().st_size, "sha256": files.get(name)}


def _save(content: bytes, path: Path, intact: Intact | None) -> None:
    """Write a graph; beside a manifest it is entered there, if the folder is still what was exported."""
    try:
        if intact is None:
            replace_bytes(path, content)
        else:
            manifest.put_file(path.parent, path.name, content, intact.check)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}; the graph can't be written there") from None

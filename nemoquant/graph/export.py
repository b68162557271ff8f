"""Write graphs beside the shards that they refer to; where that is impossible, into a copy of the checkpoint.

ONNX lets external data lie only at or below the .onnx file, and refuses links. So ``DIR/model.onnx`` is
written beside DIR's shards, and no byte of a weight is written. With another folder, shards that are links,
or experts that do not lie back to back (a published checkpoint), the tensors are copied into OUT in the order
that ``pack`` writes.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from nemoquant.checkpoint import SHARD_BYTES, manifest
from nemoquant.checkpoint.folder import check_output
from nemoquant.checkpoint.header import TensorInfo
from nemoquant.checkpoint.intact import Intact, Say, hash_once, silent
from nemoquant.checkpoint.making import making
from nemoquant.checkpoint.reader import INDEX
from nemoquant.checkpoint.side_files import copy_side_files, side_files
from nemoquant.checkpoint.towers import text_only
from nemoquant.checkpoint.writer import ShardWriter
from nemoquant.errors import OutputError, UsageError
from nemoquant.files import copy_again, replace_bytes, write_json_again
from nemoquant.graph import MODEL, MTP, Exported
from nemoquant.graph.build import Builder, GraphOptions
from nemoquant.graph.dialects import DIALECTS
from nemoquant.graph.weights import stacked
from nemoquant.layouts.modelopt import LEGACY
from nemoquant.pack.files import WRITTEN
from nemoquant.progress import Progress, no_progress
from nemoquant.quantized.checkpoint import PackedCheckpoint

COPY_BYTES = 16 << 20


def export_onnx(
    path: Path,
    out: Path | None,
    dialect: str,
    options: GraphOptions,
    *,
    mtp: bool = False,
    copy: bool = True,
    say: Say = silent,
    progress: Progress = no_progress,
) -> Exported:
    """Write ``model.onnx`` (and ``mtp.onnx``) for the checkpoint in ``path``.

    Args:
        out: a new folder for a copy; None is ``path`` itself.
        copy: False refuses where tensors would have to be copied.
        say: told how much is hashed, where a checkpoint with a manifest is to be held against it.
    Raises:
        CheckpointError, UsageError, OutputError
    """
    opened = PackedCheckpoint(path)
    with opened.checkpoint:
        Builder(opened, DIALECTS[dialect], options)  # refuses bad options before a byte is written
        if mtp and not opened.has_mtp:
            raise UsageError(f"{path} has no multi-token-prediction module; leave out --mtp")
        reason = _why_copy(opened, out)
        if reason is None:
            return _write_graphs(opened, dialect, options, mtp, lambda: _intact(opened, say, progress))
        if not copy:
            raise UsageError(
                f"{path}: its tensors would have to be copied, because {reason}; --no-copy forbids it"
            )
        if out is None:
            raise UsageError(
                f"{path}: a graph can't stand beside its tensors, because {reason}; give an OUT folder for "
                f"a copy"
            )
        size = sum(info.nbytes for info in opened.checkpoint.tensors.values())
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
                written = _write_graphs(copied, dialect, options, mtp, lambda: of_copy)
    return replace(
        written,
        folder=out,
        graphs=[out / graph.name for graph in written.graphs],
        copied_bytes=size,
    )


def _intact(opened: PackedCheckpoint, say: Say, progress: Progress) -> Intact | None:
    """The checkpoint held against its manifest; None where it has none."""
    return None if opened.manifest is None else hash_once(opened.path, opened.manifest, say, progress)


def _why_copy(opened: PackedCheckpoint, out: Path | None) -> str | None:
    if out is not None and out.resolve() != opened.path.resolve():
        return f"the graph is to stand in {out}"
    files = {info.file for info in opened.checkpoint.tensors.values()}
    links = sorted(file.name for file in files if file.is_symlink() or file.stat().st_nlink > 1)
    if links:
        return f"{links[0]} is a link, and ONNX refuses external data behind links"
    if not _views(opened):
        return "its experts do not lie back to back, so that no 3-D view of them exists"
    return None


def _expert_groups(opened: PackedCheckpoint) -> Iterator[list[str]]:
    """Names of the tensors that the graph reads as one, in ascending order of experts.

    A group is one part (such as the codes) of all experts of a layer and projection.
    """
    groups: dict[tuple[int | None, str, str], list[str]] = {}
    for spec in opened.table:
        if spec.expert is not None and spec.name in opened.stored:
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
    tensors, total, done = (
        opened.checkpoint.tensors,
        sum(i.nbytes for i in opened.checkpoint.tensors.values()),
        0,
    )
    beside = {spec.name for spec in opened.towers}
    written = {name: name if name in beside else opened.config.prefix + name for name in tensors}
    weight_map: dict[str, str] = {}
    shards = list(_shards(opened))
    for number, names in enumerate(shards, 1):
        file = _shard_name(number, len(shards))
        with ShardWriter(
            folder / file, [(written[name], tensors[name].dtype, tensors[name].shape) for name in names]
        ) as writer:
            for name in names:
                raw = opened.checkpoint.raw(name)
                for start in range(0, raw.size, COPY_BYTES):
                    writer.write(raw[start : start + COPY_BYTES])
                opened.checkpoint.release([name])
                done += raw.size
                progress("copy", done, total, "")
        weight_map |= {written[name]: file for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json_again(folder / INDEX, index)
    for name in ("config.json", LEGACY):
        if (opened.path / name).exists():
            copy_again(opened.path / name, folder / name)
    copy_side_files(opened.path, side_files(opened.path, opened.raw_config)[0], folder)


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


def _views(opened: PackedCheckpoint) -> bool:
    return all(
        stacked([opened.checkpoint.tensors[name] for name in group]) for group in _expert_groups(opened)
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
    mtp: bool,
    held: Callable[[], Intact | None],
) -> Exported:
    """Write the graphs of ``opened``; ``held`` holds its shards against its manifest, and may read them."""
    models = {MODEL: Builder(opened, DIALECTS[dialect], options).main()}
    if mtp:
        models[MTP] = Builder(opened, DIALECTS[dialect], options).mtp()
    intact = held()  # after what could be refused without reading the shards
    functions, nodes = [], 0
    for name, model in models.items():
        _describe(opened, model, dialect, options)
        _save(model, opened.path / name, intact)
        functions += [f.name for f in model.functions.values() if f.name not in functions]
        nodes += len(model.graph) + sum(len(f) for f in model.functions.values())
    graphs = [opened.path / name for name in models]
    told = (text_only(opened.towers),) if opened.towers else ()
    return Exported(opened.path, graphs, 0, functions, nodes, warnings=told)


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


def _save(model: ir.Model, path: Path, intact: Intact | None) -> None:
    """Write a graph; beside a manifest it is entered there, if the folder is still what was exported."""
    content = ir.to_proto(model).SerializeToString()
    try:
        if intact is None:
            replace_bytes(path, content)
        else:
            manifest.put_file(path.parent, path.name, content, intact.check)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}; the graph can't be written there") from None

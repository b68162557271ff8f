"""The Python API: what the command line does, as functions. Messages and progress go to callbacks, results are data."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemoquant._version import __version__
from nemoquant.checkpoint import manifest
from nemoquant.checkpoint.reader import INDEX
from nemoquant.checkpoint.source import Source, open_source
from nemoquant.errors import CheckpointError, UsageError, VerificationError
from nemoquant.pack import output
from nemoquant.pack.shards import SHARD_BYTES, Shard, shards
from nemoquant.plan.plan import Plan
from nemoquant.plan.recipe import load_recipe
from nemoquant.plan.resolve import resolve

Progress = Callable[[str, int, int, str], None]  # stage, done, total, what


def no_progress(stage: str, done: int, total: int, what: str) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate on, and how.

    Attributes:
        data: .txt, .jsonl, .parquet or .npy; None is the shipped text.
        rows, seq_len: how much of it; ignored for .npy, which says so itself.
        scales: the scales file of an earlier run, instead of calibrating.
        device: ``cpu`` or ``cuda``; packing is on the CPU in any case.
        dtype: ``float32`` or ``bfloat16``; None is bfloat16 where the machine multiplies it directly.
        row_batch: rows that go through a layer at once.
    """

    data: Path | None = None
    rows: int = 32
    seq_len: int = 512
    scales: Path | None = None
    device: str = "cpu"
    dtype: str | None = None
    row_batch: int = 4


@dataclass(frozen=True)
class Result:
    """What ``quantize`` made: the plan, warnings in plain words, and what verify checked before the rename."""

    out: Path
    plan: Plan
    warnings: list[str]
    verified: dict[str, int]
    skipped_files: list[str] = field(default_factory=list)


def plan(source: Path, recipe: str, *, scale_groups: bool = True) -> Plan:
    """Resolve a recipe (preset name or file) against a checkpoint folder's headers, or a bare ``config.json``.

    Raises:
        CheckpointError, RecipeError
    """
    return _plan(open_source(source), recipe, scale_groups)


def _plan(source: Source, recipe: str, scale_groups: bool) -> Plan:
    return resolve(load_recipe(recipe), source.config, source.table, assumed=source.checkpoint is None, scale_groups=scale_groups)


def quantize(
    source: Path,
    out: Path,
    recipe: str,
    *,
    calibration: CalibrationOptions | None = None,
    scale_groups: bool = True,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> Result:
    """Quantize the checkpoint in ``source`` into the new folder ``out``.

    Everything is checked before the first byte is written; ``out`` appears only when it is whole and verified.

    Args:
        recipe: preset name or recipe file.
        scale_groups: q, k, v share their scales, experts of a layer and projection their input scale; False for comparisons.
        threads: for calibration and packing; None is all that this process may use.
        dry_run: check everything, write nothing.
    Raises:
        NemoquantError: any of its kinds; see errors.py.
    """
    options = calibration or CalibrationOptions()
    threads = threads or len(os.sched_getaffinity(0))
    opened = open_source(source)
    if opened.checkpoint is None:
        raise CheckpointError(
            f"{source} is a config.json; quantize needs the folder with the weights (`nemoquant plan` takes a bare config)"
        )
    with opened.checkpoint:
        made = _plan(opened, recipe, scale_groups)
        output.check_output(out, source, made.bytes_out)
        layout = shards(made, shard_bytes)
        warnings = [
            f"no tensor of this model got the format {name}: it lacks the roles that the recipe names"
            for name in made.unused_formats
        ]
        scales = None
        if made.needs_calibration:
            scales = _scales(opened, made, options, threads, dry_run, warnings, progress)
        if dry_run:
            return Result(out, made, warnings, {})
        with output.making(out) as folder:
            return _write(opened, made, layout, scales, folder, out, threads, shard_bytes, warnings, progress)


def _scales(
    source: Source, plan: Plan, options: CalibrationOptions, threads: int, dry_run: bool, warnings: list[str], progress: Progress
) -> Any:
    """Calibrate, or read the results of an earlier run. None on a dry run, after the data were checked."""
    from nemoquant.calibrate.data import default_data, load_rows
    from nemoquant.calibrate.scales import Scales

    if options.scales is not None:
        scales = Scales.load(options.scales)
        scales.check(plan, options.scales)
        warnings += scales.warnings
        return scales
    import torch

    from nemoquant.calibrate.run import calibrate

    if options.device != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"--device {options.device}: no CUDA device is usable here; expected cpu")
    rows = load_rows(options.data or default_data(), source.path, source.config, options.rows, options.seq_len)
    told: list[str] = []  # goes into the scales file: giving that back repeats the warnings too
    if len(rows.ids) < options.rows and (options.data is None or options.data.suffix != ".npy"):
        told.append(
            f"{rows.source} holds {len(rows.ids)} rows of {options.seq_len} tokens, {options.rows} were asked for; all of them were used"
        )
    if rows.dropped:
        told.append(f"{rows.source}: its last {rows.dropped} tokens do not fill a row and were left out")
    if dry_run:
        warnings += told
        return None
    torch.set_num_threads(threads)
    assert source.checkpoint is not None
    scales = calibrate(
        source.checkpoint,
        source.config,
        rows,
        device=options.device,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        row_batch=options.row_batch,
        progress=lambda done, total, what: progress("calibrate", done, total, what),
    )
    if scales.non_finite_rows:
        told.append(f"{scales.non_finite_rows} calibration rows came to NaN or Inf and were left out")
    scales.warnings = told
    warnings += told
    return scales


def _write(
    source: Source, plan: Plan, layout: list[Shard], scales: Any, folder: Path, out: Path, threads: int, shard_bytes: int,
    warnings: list[str], progress: Progress,
) -> Result:  # fmt: skip
    """Everything that is written, into ``folder``, and verify over it."""
    from nemoquant.calibrate.scales import FILE as SCALES_FILE
    from nemoquant.pack.card import card
    from nemoquant.pack.layouts import quantization_sections
    from nemoquant.pack.verify import verify as check
    from nemoquant.pack.write import Packer

    assert source.checkpoint is not None
    done = 0

    def packed(size: int) -> None:
        nonlocal done
        done += size
        progress("pack", done, plan.bytes_in, "")

    packer = Packer(plan, source.checkpoint, scales, threads=threads, warn=warnings.append, progress=packed)
    digests = packer.write(folder, layout)
    if packer.zero_weights:
        from nemoquant.errors import listing

        warnings.append(
            f"{len(packer.zero_weights)} weights are zero or underflow; scales set to 1.0, codes to 0: {listing(packer.zero_weights)}"
        )
    section, legacy = quantization_sections(plan)
    _json(folder / "config.json", source.raw_config | ({"quantization_config": section} if section else {}))
    _json(folder / "hf_quant_config.json", legacy)
    weight_map = {entry.name: shard.file for shard in layout for entry in shard.entries}
    _json(folder / INDEX, {"metadata": {"total_size": plan.bytes_out}, "weight_map": weight_map})
    if scales is not None:
        (folder / SCALES_FILE).write_text(scales.dump(), encoding="utf-8")
    copied, skipped = output.copy_side_files(source.path, source.raw_config, folder)
    (folder / "README.md").write_text(card(plan, _calibration_sentence(plan, scales), warnings, copied), encoding="utf-8")
    files = {path.name: digests.get(path.name) or manifest.file_sha256(path) for path in sorted(folder.iterdir())}
    manifest.write_manifest(folder, _manifest(source, plan, scales, shard_bytes, warnings, skipped, files))
    report = check(folder, source, encode_again=False, progress=lambda done, total: progress("verify", done, total, ""))
    if not report.ok:
        raise VerificationError(
            f"{out}: what was written is not what was planned, nothing is kept: {'; '.join(report.problems[:3])}"
        )
    return Result(out, plan, warnings, report.checked, skipped)


def _json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _calibration_sentence(plan: Plan, scales: Any) -> str:
    if not plan.needs_calibration:
        return "none was needed."
    s = scales.settings
    return f"{s['rows']} rows of {s['seq_len']} tokens of `{s['data']}`, {s['dtype']} compute; per-tensor maxima."


def _manifest(
    source: Source, plan: Plan, scales: Any, shard_bytes: int, warnings: list[str], skipped: list[str], files: dict[str, str]
) -> dict[str, Any]:
    assert source.checkpoint is not None
    return {
        "schema": manifest.SCHEMA,
        "nemoquant": __version__,
        "source": {
            "config_sha256": hashlib.sha256(json.dumps(source.raw_config, sort_keys=True).encode()).hexdigest(),
            "tensor_table_sha256": manifest.tensor_table_sha256(source.checkpoint.tensors),
            "dtypes": manifest.pack_dtypes(source.table),
        },
        "plan": plan.summary() | {"recipe": plan.recipe.dump(), "scale_groups": plan.scale_groups},
        "calibration": None if scales is None else scales.settings,
        "shard_bytes": shard_bytes,
        "warnings": warnings,
        "skipped_side_files": skipped,
        "files": files,
    }


def verify(out: Path, against: Path | None = None, *, progress: Progress = no_progress) -> dict[str, Any]:
    """Check a written checkpoint, with its source bit for bit where that is given.

    Returns:
        ``{"ok", "problems", "warnings", "checked"}``.
    Raises:
        CheckpointError: the manifest, or the source, can't be used.
    """
    from nemoquant.pack.verify import verify as check

    source = None if against is None else open_source(against)
    if source is not None and source.checkpoint is None:
        raise CheckpointError(f"{against} is a config.json; --against needs the source's folder with its weights")
    return check(out, source, progress=lambda done, total: progress("verify", done, total, "")).to_json()


def inspect(path: Path, *, context: int | None = None) -> dict[str, Any]:
    """What a checkpoint folder, quantized or not, or a bare ``config.json`` is: layers, parameters, formats, cache sizes.

    Args:
        context: tokens for ``kv_cache.bytes_at_context``; None is the config's ``max_position_embeddings``.
    Raises:
        CheckpointError
    """
    from nemoquant.checkpoint.summary import summarize

    return summarize(path, context)

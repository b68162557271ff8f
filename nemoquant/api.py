"""The Python API: what the command line does, as functions. Messages and progress go to callbacks, results are data."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemoquant.checkpoint import manifest
from nemoquant.checkpoint.source import Source, open_source
from nemoquant.errors import CheckpointError, UsageError, listing
from nemoquant.pack import output
from nemoquant.pack.shards import SHARD_BYTES
from nemoquant.planning.plan import Plan
from nemoquant.planning.recipe import load_recipe
from nemoquant.planning.resolve import resolve

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

    def given(self) -> list[str]:
        """Options that say where scales come from, as far as they were given."""
        return [name for name, value in (("--calib", self.data), ("--scales", self.scales)) if value is not None]


@dataclass(frozen=True)
class Result:
    """What ``quantize`` made: the plan, warnings in plain words, what verify checked before the rename, and how calibration went."""

    out: Path
    plan: Plan
    warnings: list[str]
    verified: dict[str, int]
    skipped_files: list[str] = field(default_factory=list)
    calibration: dict[str, Any] | None = None


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
        warnings = [
            f"no tensor of this model got the format {name}: it lacks the roles that the recipe names"
            for name in made.unused_formats
        ]
        scales = None
        if made.needs_calibration:
            scales = _scales(opened, made, options, threads, dry_run, warnings, progress)
        else:
            warnings += [f"recipe {made.recipe.name} needs no calibration: {name} is not used" for name in options.given()]
        if dry_run:
            return Result(out, made, warnings, {})
        from nemoquant.pack.run import write_checkpoint

        with output.making(out) as folder:
            verified, skipped = write_checkpoint(opened, made, scales, folder, threads, shard_bytes, warnings, progress)
        return Result(out, made, warnings, verified, skipped, None if scales is None else scales.summary())


def _scales(
    source: Source, plan: Plan, options: CalibrationOptions, threads: int, dry_run: bool, warnings: list[str], progress: Progress
) -> Any:
    """Calibrate, or read the results of an earlier run. None on a dry run, after the data were checked."""
    assert source.checkpoint is not None
    weights = manifest.weights_fingerprint(source.checkpoint)
    from nemoquant.calibrate.data import default_data, load_rows
    from nemoquant.calibrate.scales import Scales

    if options.scales is not None:
        scales = Scales.load(options.scales)
        scales.check(plan, options.scales)
        if scales.settings.get("weights") != weights:
            warnings.append(
                f"{options.scales} was made from other weights than {source.path}: their norms and SSM parameters differ"
            )
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
    unreached, experts = scales.unreached(), sum(map(len, scales.tokens_per_expert.values()))
    if unreached:
        told.append(
            f"{len(unreached)} of {experts} experts got no calibration token ({listing(unreached)}); "
            "each has the largest input scale of its layer and projection, give more rows to see them"
        )
    scales.settings["weights"] = weights
    scales.warnings = told
    warnings += told
    return scales


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

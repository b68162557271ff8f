"""Pack a whole checkpoint: shards, both config files, index, side files, scales file, card and manifest; then verify it."""

import hashlib
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from nemoquant._version import __version__
from nemoquant.calibrate.scales import FILE as SCALES_FILE
from nemoquant.calibrate.scales import Scales
from nemoquant.checkpoint import manifest
from nemoquant.checkpoint.folder import copy_side_files, side_files
from nemoquant.checkpoint.reader import INDEX
from nemoquant.errors import VerificationError, listing
from nemoquant.layouts.modelopt import config_files
from nemoquant.pack.card import card
from nemoquant.pack.files import CARD
from nemoquant.pack.shards import Shard
from nemoquant.pack.verify import verify
from nemoquant.pack.workers import Workers
from nemoquant.pack.write import Packer
from nemoquant.planning.plan import Plan
from nemoquant.progress import Progress
from nemoquant.run.unfinished import Unfinished
from nemoquant.sources.source import Source


def write_checkpoint(
    source: Source, plan: Plan, layout: list[Shard], scales: Scales | None, run: Unfinished, workers: AbstractContextManager[Workers],
    shard_bytes: int, warnings: list[str], progress: Progress,
) -> tuple[dict[str, int], list[str]]:  # fmt: skip
    """Write everything that ``run`` does not have yet into its folder, and verify it. Finds of its own are added to ``warnings``.

    Args:
        layout: the plan's shards of ``shard_bytes``.
        workers: who encodes; entered when there is something to do.
    Returns:
        what verify checked, and the source's files that were left behind.
    Raises:
        CalibrationError, WeightError, VerificationError
    """
    folder = run.folder
    zero = _pack(source, plan, layout, scales, run, workers, warnings, progress)
    if zero:
        warnings.append(
            f"{len(zero)} weights are zero or underflow; codes set to 0, scales to 1.0 where no group gives one: {listing(zero)}"
        )
    for name, data in config_files(plan, source.raw_config).items():
        _json(folder / name, data)
    weight_map = {entry.name: shard.file for shard in layout for entry in shard.entries}
    _json(folder / INDEX, {"metadata": {"total_size": plan.bytes_out}, "weight_map": weight_map})
    if scales is not None:
        (folder / SCALES_FILE).write_text(scales.dump(), encoding="utf-8")
    copied, skipped = side_files(source.path, source.raw_config)
    copy_side_files(source.path, copied, folder)
    (folder / CARD).write_text(card(plan, _calibration_sentence(scales), warnings, copied), encoding="utf-8")
    digests = {file: entry["sha256"] for file, entry in run.shards.items()}
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != manifest.FILE)
    files = {name: digests.get(name) or manifest.file_sha256(folder / name) for name in names}
    manifest.write_manifest(folder, _manifest(source, plan, scales, shard_bytes, warnings, skipped, files))
    report = verify(folder, source, encode_again=False, progress=progress)
    if not report.ok:
        raise VerificationError(f"what was written is not what was planned: {'; '.join(report.problems[:3])}")
    run.verified = report.checked
    run.save()
    return report.checked, skipped


def _pack(
    source: Source, plan: Plan, layout: list[Shard], scales: Scales | None, run: Unfinished, workers: AbstractContextManager[Workers],
    warnings: list[str], progress: Progress,
) -> list[str]:  # fmt: skip
    """Write the shards that are missing; returns the modules whose weights are zero, in all of them."""
    assert source.checkpoint is not None
    done = 0

    def packed(size: int) -> None:
        nonlocal done
        done += size
        progress("pack", done, plan.bytes_in, "")

    there = run.finished_shards()
    with workers as entered:
        packer = Packer(plan, source.checkpoint, scales, entered, warn=warnings.append, progress=packed)
        for shard in layout:
            if shard.file in there:
                packed(sum(row.bytes_in for unit in shard.units for row in unit.rows))
                continue
            (run.folder / shard.file).unlink(missing_ok=True)
            before = len(packer.zero_weights)
            digest = packer.write(run.folder / shard.file, shard)
            run.shards[shard.file] = {"sha256": digest, "zero_weights": packer.zero_weights[before:]}
            run.save()
    return [name for shard in layout for name in run.shards[shard.file]["zero_weights"]]


def _json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _calibration_sentence(scales: Scales | None) -> str:
    if scales is None:
        return "none was needed."
    s = scales.settings
    return f"{s['rows']} rows of {s['seq_len']} tokens of `{s['data']}`, {s['dtype']} compute; the largest magnitude of each GEMM input."


def _manifest(
    source: Source,
    plan: Plan,
    scales: Scales | None,
    shard_bytes: int,
    warnings: list[str],
    skipped: list[str],
    files: dict[str, str],
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

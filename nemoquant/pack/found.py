"""Verify a folder without a manifest, of another tool or converted: what can be checked without a plan.

1. of a converted folder, every file in its record has its sha256
2. headers and index agree, and every tensor that the config calls for is there with its shape; multi-token
   prediction may be missing as a whole
3. the parts of each quantized module are complete; the config files agree with the tensors and each other
4. every scale of a whole tensor is finite and positive, every block scale is one that its format writes
5. every weight decodes to finite values, every other tensor is finite
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nemoquant.calibrate.scales import FILE as SCALES_FILE
from nemoquant.checkpoint import converted
from nemoquant.checkpoint.identity import piece_rows, pieces
from nemoquant.checkpoint.intact import SHOWN_EVERY, Hashing
from nemoquant.checkpoint.manifest import CARD, FILE
from nemoquant.errors import CheckpointError, NemoquantError
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.layouts.choose import layout_of
from nemoquant.layouts.modelopt import Stored
from nemoquant.machine import usable_threads
from nemoquant.model.parse import load_config
from nemoquant.pack.verify import Verification
from nemoquant.progress import Count, Progress, no_progress
from nemoquant.quantized.checkpoint import PackedCheckpoint, PackedWeights
from nemoquant.solve.files import FOLDS, SOLVED

OURS = (SCALES_FILE, SOLVED, FOLDS)  # beside a manifest, always


def verify_found(folder: Path, progress: Progress = no_progress) -> Verification:
    """Check the checkpoint in ``folder``; problems are collected, not raised.

    Args:
        progress: called by this thread alone.
    Raises:
        CheckpointError: its record can't be used, its manifest is lost, or it is quantized in a way that is
            not read here.
            SourceChangedError: it changes meanwhile.
    """
    report = Verification()
    report.checked["decoded"] = 0
    lost = [name for name in OURS if os.path.lexists(folder / name)]
    if lost:
        raise CheckpointError(
            f"{folder / FILE} does not exist, and nemoquant wrote {lost[0]} beside one; copy it there again, "
            f"or quantize again"
        )
    raw_config = load_config(folder)[1]
    layout_of(folder, raw_config).declared(folder, raw_config, ())  # raises for what is not read here
    record = converted.read_record(folder)
    files = {} if record is None else record["files"]
    if record is None:
        report.warnings.append(
            f"it has no {FILE}, another tool wrote it: no hash of a file and no plan could be checked"
        )
    done, total, counting = 0, sum(_size(folder / name) for name in files), threading.Lock()

    def count(size: int) -> None:
        nonlocal done
        with counting:
            done += size

    def show() -> None:
        progress("verify", min(done, total), total, "")

    with ExitStack() as end:
        digests = {folder / name: [digest] for name, digest in files.items() if name != CARD}
        hashing = end.enter_context(Hashing(digests, usable_threads(), count))
        try:
            opened = PackedCheckpoint(folder)
        except NemoquantError as error:
            report.problems.append(str(error))
        else:
            with opened.checkpoint:
                total += sum(info.nbytes for info in opened.checkpoint.tensors.values())
                _check_content(opened, report, count, show)
        while hashing.unfinished(SHOWN_EVERY):
            show()
        report.problems += hashing.problems().values()
    show()
    report.checked["files"] = len(files)
    if record is not None:
        _check_others(folder, files, report)
    return report


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_others(folder: Path, files: dict[str, str], report: Verification) -> None:
    """The card may be edited; files that the record does not have are told."""
    if CARD in files:
        with Hashing({folder / CARD: [files[CARD], None]}, threads=1) as hashing:
            if hashing.problems():
                report.edited.append(CARD)
                report.warnings.append(f"{CARD} was edited: its sha256 is not the record's")
    for path in sorted(folder.iterdir()):
        if path.name not in files and path.is_file() and path.name != converted.FILE:
            report.warnings.append(f"{path.name} is not in {converted.FILE}; nemoquant did not write it")


def _check_content(opened: PackedCheckpoint, report: Verification, count: Count, show: Any) -> None:
    report.warnings += opened.warnings
    report.checked["tensors"] = len(opened.checkpoint.tensors)
    known = {name for stored in opened.stored.values() for name in stored.parts.values()}
    scales = sum(len(stored.parts) - 1 for stored in opened.stored.values())
    known |= {spec.name for spec in opened.towers}  # of which nothing is known but their bytes
    report.checked["scales"] = scales + len(opened.checkpoint.tensors.keys() - known)
    with ThreadPoolExecutor(usable_threads()) as pool:
        check = partial(_bad, opened, count)
        for problem in pool.map(check, opened.stored, opened.stored.values()):
            if problem is not None:
                report.problems.append(problem)
            show()
    report.checked["decoded"] = sum(stored.format != "source" for stored in opened.stored.values())


def _bad(opened: PackedCheckpoint, count: Count, name: str, stored: Stored) -> str | None:
    """What is wrong with the values of a tensor; the pages that were read are dropped."""
    checkpoint = opened.checkpoint
    found = None
    if stored.format == "source":
        bad = _not_finite(opened, stored.parts["source"])
        if bad:
            found = f"{name}: {bad:,} values are NaN or Inf"
    else:
        if "block_scales" in stored.parts:
            scales = checkpoint.array(stored.parts["block_scales"])
            bad = ARITHMETIC[stored.format].bad_scales(scales)
            if bad:
                name = stored.parts["block_scales"]
                found = f"{name}: {bad:,} of {scales.size:,} scales are not finite and positive"
        weight = PackedWeights(opened, "").packed(stored)
        rows, width = weight.shape
        step = piece_rows(rows, rows * width * 4)
        for start in range(0, rows if found is None else 0, step):
            part = weight[start : start + step]
            values = np.empty(part.shape, np.float32)
            part.decode(values)
            if not np.isfinite(values).all():
                found = f"{name} decodes to NaN or Inf"
                break
    count(sum(checkpoint.tensors[part].nbytes for part in stored.parts.values()))
    checkpoint.release(stored.parts.values())
    return found


def _not_finite(opened: PackedCheckpoint, name: str) -> int:
    """Values of an unquantized tensor that are NaN or Inf, counted in pieces."""
    info, raw, bad = opened.checkpoint.tensors[name], opened.checkpoint.raw(name), 0
    for begin, end in pieces(info.shape, info.nbytes):
        piece = raw[begin:end]
        if info.dtype == "BF16":
            bad += int(np.count_nonzero((np.ascontiguousarray(piece).view(np.uint16) & 0x7FFF) >= 0x7F80))
        else:
            values = np.frombuffer(piece.tobytes(), np.float16 if info.dtype == "F16" else np.float32)
            bad += int(np.count_nonzero(~np.isfinite(values)))
    return bad

"""This machine's speed in the parts of a run, measured in a few tenths of a second on the source's bytes.

torch is loaded only where something is calibrated.
"""

import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemoquant.calibrate.batch import Batch, RowBatch
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.formats import Device
from nemoquant.formats.amax import amax as bits_amax
from nemoquant.pack.encode import pack_weights
from nemoquant.planning.plan import Plan
from nemoquant.planning.row import Row
from nemoquant.run.timing import seconds

if TYPE_CHECKING:
    from nemoquant.run.solve_speeds import SolveSpeeds

SAMPLE_BYTES = 4 << 20
SPOTS = 6  # number of tensors of the source that are read
Encoding = tuple[str, str | None]  # format and scale method


@dataclass(frozen=True)
class Speeds:
    """Measured speeds.

    Attributes:
        read: bytes/s of reading the source in its present state, from page cache or disk, one thread.
        write: bytes/s into a file on OUT's disk.
        sync: the same including the wait for the disk, if the output is too large for the page cache; else
            ``write``.
        hash: bytes/s of sha256.
        encode: bytes/s of source, one thread, by format and scale method; with a GPU one thread's share of
            their joint rate.
        product, expert: flop/s of a matrix product with all tokens of a batch, and with an expert's share of
            them.
        mixer: seconds a token of a Mamba-2 layer without its products.
        solve: of solving; None where no codes are solved for.
    """

    read: float
    write: float
    sync: float
    hash: float
    encode: dict[Encoding, float]
    product: float
    expert: float
    mixer: float
    solve: "SolveSpeeds | None" = None


def measure(
    checkpoint: Checkpoint,
    plan: Plan,
    folder: Path,
    batch: Batch | None,
    *,
    row_batch: RowBatch,
    threads: int,
    device: Device = "cpu",
) -> Speeds:
    """Measure this machine.

    Args:
        folder: an existing one on OUT's disk; a file without a name is written there.
        batch: all rows of the calibration, None where nothing is calibrated.
        row_batch, threads: of the calibration.
        device: of calibration and packing.
    """
    read = _read(checkpoint, plan.rows)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    write, sync, digest = _write(folder, wait=plan.bytes_out > memory // 10)
    encode = {key: _encode(checkpoint, row, device, threads) for key, row in _encodings(plan).items()}
    product, expert, mixer = 1.0, 1.0, 0.0
    if batch is not None:
        from nemoquant.run.compute_speeds import compute_speeds

        product, expert, mixer = compute_speeds(
            checkpoint, plan.config, batch, row_batch=row_batch, threads=threads, device=device
        )
    solve = None
    if batch is not None and plan.needs_inputs:
        from nemoquant.run.solve_speeds import solve_speeds

        solve = solve_speeds(plan, threads)
    return Speeds(
        read=read,
        write=write,
        sync=sync,
        hash=digest,
        encode=encode,
        product=product,
        expert=expert,
        mixer=mixer,
        solve=solve,
    )


def _read(checkpoint: Checkpoint, rows: Iterable[Row]) -> float:
    """bytes/s, from the start of large tensors all over the source."""
    large = sorted((row for row in rows if row.elements >= 1024), key=lambda row: -row.bytes_in)[:512]
    names = [row.name for row in sorted(large, key=lambda row: row.name)][:: max(1, len(large) // SPOTS)]
    total, took = 0, 0.0
    for name in names:
        raw = checkpoint.raw(name)
        part = raw[: SAMPLE_BYTES // 4 * 4][: raw.size // 4 * 4]
        took += seconds(lambda part=part: bits_amax(part.view(np.uint16)[None]))  # type: ignore[misc]
        total += part.size
        checkpoint.release([name])
    return total / took if total else 1e9


def _write(folder: Path, *, wait: bool) -> tuple[float, float, float]:
    """bytes/s of writing, of writing with the wait for the disk (if ``wait``), and of sha256."""
    import hashlib

    data = np.random.default_rng(0).integers(0, 256, 4 * SAMPLE_BYTES, np.uint8)
    with tempfile.TemporaryFile(dir=folder) as f:
        write = seconds(lambda: os.write(f.fileno(), data.data))
        sync = write + (seconds(lambda: os.fsync(f.fileno())) if wait else 0.0)
    return (
        data.size / write,
        data.size / sync,
        data.size / seconds(lambda: hashlib.sha256(data.data).digest()),
    )


def _encodings(plan: Plan) -> dict[Encoding, Row]:
    """For each way of encoding in the plan, the weight whose size is nearest to a sample's."""
    samples: dict[Encoding, Row] = {}
    for row in (row for row in plan.quantized if not row.solved):
        key = (row.format, row.scale_method)
        best = samples.get(key)
        if best is None or abs(row.bytes_in - SAMPLE_BYTES) < abs(best.bytes_in - SAMPLE_BYTES):
            samples[key] = row
    return samples


def _encode(checkpoint: Checkpoint, row: Row, device: Device, threads: int) -> float:
    """bytes/s of source, from the first rows of a weight; a GPU gets them from each thread, as in packing."""
    from dataclasses import replace

    count = max(1, min(row.shape[0], SAMPLE_BYTES * row.shape[0] // max(1, row.bytes_in)))
    sample = replace(row, shape=(count, row.shape[1]))
    pack_weights(checkpoint, [replace(row, shape=(1, row.shape[1]))], device)  # compiles or loads the kernel
    if device == "cpu":
        return sample.bytes_in / seconds(lambda: pack_weights(checkpoint, [sample]))
    with ThreadPoolExecutor(threads) as pool:

        def all_at_once() -> None:
            list(pool.map(lambda _: pack_weights(checkpoint, [sample], device), range(threads)))

        all_at_once()  # allocates each thread's memory
        return sample.bytes_in / seconds(all_at_once)

"""Estimate for the whole of Nemotron 3 Super, by sums that can be checked by hand: amounts over rates.

    python -m bench.projection --work DIR [--fmt nvfp4] [--rows 32] [--seq-len 512]

Rates of this machine are measured: the processor's by `nemoquant plan --estimate` on DIR/mid (the checkpoint
of `bench.peers`), the disk's on a file of DIR that was dropped from the page cache. Those of the second
machine are ASSUMED, except hashing and encoding, which are this machine's for each thread. No file of Super
is read: its plan comes from tests/configs.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import machine
from bench.peers import prepare
from nemoquant import api
from nemoquant.calibrate.batch import Batch, rows_of
from nemoquant.calibrate.memory import pick_row_batch, weight_bytes
from nemoquant.machine import usable_threads
from nemoquant.planning.plan import Plan
from nemoquant.run.budget import BASE_STEP, BYTES_A_TENSOR, DEFAULT_MEMORY, budget
from nemoquant.run.estimate import VERIFY_TENSOR
from nemoquant.units import duration

SUPER = Path(__file__).resolve().parents[1] / "tests/configs/super-120b-a12b.json"
FILE_BYTES, BLOCK = 2 << 30, 8 << 20


@dataclass(frozen=True)
class Machine:
    """Rates: bytes/s, flop/s, seconds a token; ``weights``: from mapped memory to the products."""

    name: str
    threads: int
    disk_read: float
    disk_write: float
    weights: float
    product: float
    expert: float
    mixer: float
    hash: float
    encode: dict[str, float]


def disk(folder: Path) -> tuple[float, float]:
    """bytes/s of reading and writing, including the wait for the disk, with nothing in the page cache."""
    path, data = folder / "projection.bin", os.urandom(BLOCK)
    try:
        with path.open("wb", buffering=0) as file:
            start = time.perf_counter()
            for _ in range(FILE_BYTES // BLOCK):
                file.write(data)
            os.fsync(file.fileno())
            write = FILE_BYTES / (time.perf_counter() - start)
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            buffer, start = bytearray(BLOCK), time.perf_counter()
            while file.readinto(buffer):
                pass
            return FILE_BYTES / (time.perf_counter() - start), write
    finally:
        path.unlink(missing_ok=True)


def here(work: Path, fmt: str, rows: int, length: int) -> Machine:
    command = [
        sys.executable,
        "-m",
        "nemoquant",
        "plan",
        str(work / "mid"),
        "--fmt",
        fmt,
        "--method",
        "max",
        "--estimate",
        "--json",
        "--rows",
        str(rows),
    ]
    output = subprocess.run([*command, "--seq-len", str(length)], check=True, capture_output=True, text=True)
    speeds: dict[str, Any] = json.loads(output.stdout)["estimate"]["speeds"]
    read, write = disk(work)
    return Machine(
        "this machine",
        usable_threads(),
        read,
        write,
        speeds["read"],
        speeds["product"],
        speeds["expert"],
        speeds["mixer"],
        speeds["hash"],
        speeds["encode"],
    )


def assumed(measured: Machine) -> Machine:
    """16 threads, an NVMe disk, PCIe 5, and a GPU.

    The GPU reaches 40% of an H100's 989 TFLOP/s in large products and 20% in an expert's.
    """
    return Machine(
        "NVMe and a GPU (assumed)",
        16,
        7e9,
        5e9,
        25e9,
        0.4 * 989e12,
        0.2 * 989e12,
        0.0,
        measured.hash,
        measured.encode,
    )


def terms(plan: Plan, m: Machine, batch: Batch) -> list[tuple[str, str, float]]:
    """(stage, arithmetic, seconds); steps that overlap are joined by "or", and the slowest counts."""
    c, tokens = plan.config, batch.tokens
    held = BASE_STEP + BYTES_A_TENSOR * (len(plan.rows) + plan.tensors_out)
    row_batch = pick_row_batch(c, batch, DEFAULT_MEMORY - held - weight_bytes(c, batch.item_size))
    layers = [
        row
        for row in plan.rows
        if row.layer is not None and not row.role.startswith("mtp.") and len(row.shape) == 2
    ]
    read = sum(row.bytes_in for row in layers)
    through = sum(
        row.bytes_in * math.ceil(batch.rows / rows_of(row_batch, c.layers[row.layer or 0])) for row in layers
    )
    share = c.num_experts_per_tok / c.n_routed_experts
    dense = sum(2 * tokens * row.elements for row in layers if row.expert is None)
    expert = sum(2 * tokens * share * row.elements for row in layers if row.expert is not None)
    mixers = c.count("mamba") * tokens
    sums = [
        (
            "calibrate",
            f"weights from disk: {read / 1e9:.0f} GB / {m.disk_read / 1e9:.2f} GB/s",
            read / m.disk_read,
        ),
        (
            "calibrate",
            f"weights to the products, each batch: {through / 1e9:.0f} GB / {m.weights / 1e9:.1f} GB/s",
            through / m.weights,
        ),
        (
            "calibrate",
            f"dense products: {dense / 1e12:.0f} TFLOP / {m.product / 1e12:.3g} TFLOP/s",
            dense / m.product,
        ),
        (
            "calibrate",
            f"experts' products: {expert / 1e12:.0f} TFLOP / {m.expert / 1e12:.3g} TFLOP/s",
            expert / m.expert,
        ),
    ]
    if m.mixer:
        sums.append(
            ("calibrate", f"Mamba mixers: {mixers:,} tokens x {m.mixer * 1e6:.1f} us", mixers * m.mixer)
        )
    encode = (
        sum(
            row.bytes_in / m.encode[" ".join(filter(None, (row.format, row.scale_method)))]
            for row in plan.quantized
        )
        / m.threads
    )
    steps = {
        f"read {plan.bytes_in / 1e9:.0f} GB / {m.disk_read / 1e9:.2f} GB/s": plan.bytes_in / m.disk_read,
        f"encode, {m.threads} threads, {duration(encode)}": encode,
        f"hash {plan.bytes_out / 1e9:.0f} GB / {m.hash / 1e9:.2f} GB/s": plan.bytes_out / m.hash,
        f"write {plan.bytes_out / 1e9:.0f} GB / {m.disk_write / 1e9:.2f} GB/s": plan.bytes_out / m.disk_write,
    }
    sums.append(("pack", " or ".join(steps), max(steps.values())))
    again = max(
        plan.bytes_out / m.hash / min(m.threads, math.ceil(plan.bytes_out / 5e9)),
        plan.bytes_out / m.disk_read,
    )
    checks = VERIFY_TENSOR * plan.tensors_out
    sums.append(
        ("verify", f"read and hash {plan.bytes_out / 1e9:.0f} GB again, files beside each other", again)
    )
    sums.append(("verify", f"checks: {plan.tensors_out:,} tensors x {VERIFY_TENSOR * 1e6:.0f} us", checks))
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the checkpoint `mid` and a file of 2 GB"
    )
    parser.add_argument("--fmt", choices=["fp8", "nvfp4"], default="nvfp4")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args.work)
    plan = api.plan(SUPER, args.fmt, method="max")
    measured = here(args.work, args.fmt, args.rows, args.seq_len)
    print(
        f"{machine()}, {time.strftime('%Y-%m-%d')}: Super as {args.fmt}, {args.rows} x {args.seq_len} "
        f"tokens\n"
    )
    batch = Batch(args.rows, args.seq_len, "bfloat16")
    for m in (measured, assumed(measured)):
        sums = terms(plan, m, batch)
        print(f"| {m.name}: stage | arithmetic | |\n|---|---|---|")
        for stage, how, seconds in sums:
            print(f"| {stage} | {how} | {duration(seconds)} |")
        print(f"| **all** | one after the other | **{duration(sum(seconds for *_, seconds in sums))}** |\n")
    chosen = budget(plan, batch, memory=None, row_batch=None, threads=measured.threads)
    print(f"Memory: {chosen.memory / 1e9:.1f} GB, as `quantize` would promise it, whatever the machine.")


if __name__ == "__main__":
    main()

"""Speed of the number formats' kernels: GB/s of bf16 on one thread, compared with memory copy and read.

    python -m bench.kernels [--json FILE] [--repeat N] [--device cuda] [--peers]

Every figure is the best of several, by the CPU time of the thread (on a GPU by wall time, copies in both
directions included). It counts the bytes of the bf16 weight, 2 an element, whether they are read (encode) or
correspond to the output (decode). `--peers` adds a plain torch loop over all block scales, and Model
Optimizer's `MXFP8QTensor` and `NVFP4QTensor.quantize` where it is installed, all on one thread of the CPU.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.measure import machine
from nemoquant.formats import e4m3, fp8, mxfp8, nvfp4
from nemoquant.formats.amax import amax

SHAPE = (2688, 1024)  # an expert of Super, 5.5 MB: about what packing gives to a kernel at a time
LARGE = 1 << 28  # bytes, for copy and read: larger than any cache


def best(function: Callable[[], object], repeat: int, clock: Callable[[], float] = time.thread_time) -> float:
    """Shortest time in seconds; a first call, which may compile, does not count."""
    function()
    times = []
    for _ in range(repeat):
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


def memory(repeat: int) -> dict[str, float]:
    """GB/s of one thread, in bytes of the source: a copy of an array larger than any cache, and its sum."""
    source = np.ones(LARGE // 8, np.uint64)
    target = np.empty_like(source)
    return {
        "copy": source.nbytes / best(lambda: np.copyto(target, source), repeat) / 1e9,
        "read": source.nbytes / best(lambda: np.bitwise_or.reduce(source), repeat) / 1e9,
    }


def kernels(repeat: int, device: str) -> dict[str, float]:
    weight = (np.random.default_rng(0).standard_normal(SHAPE, np.float32) * np.float32(0.02)).view(
        np.uint32
    ) >> 16
    weight = weight.astype(np.uint16)
    largest = amax(weight)
    clock = time.thread_time if device == "cpu" else time.perf_counter
    codes, values = np.empty(SHAPE, np.uint8), np.empty(SHAPE, np.float32)
    blocks = np.empty((SHAPE[0], SHAPE[1] // 2), np.uint8), np.empty((SHAPE[0], SHAPE[1] // 16), np.uint8)
    mxfp8_blocks = codes, np.empty((SHAPE[0], SHAPE[1] // 32), np.uint8)
    scale = fp8.decode_scale(largest)
    calls: dict[str, Callable[[], object]] = {
        "amax": lambda: amax(weight, device),
        "FP8 encode": lambda: fp8.encode(weight, scale, codes, device),
        "FP8 decode": lambda: fp8.decode(codes, scale, values, device),
        "MXFP8 encode": lambda: mxfp8.encode(weight, mxfp8_blocks, device),
        "MXFP8 decode": lambda: mxfp8.decode(*mxfp8_blocks, values, device),
    }
    for method in ("max", "four_over_six", "mse"):
        block_scale = nvfp4.global_decode_scale(largest, method)
        calls[f"NVFP4 encode, {method}"] = lambda m=method, s=block_scale: nvfp4.encode(
            weight, s, m, blocks, device
        )
    calls["NVFP4 decode"] = lambda: nvfp4.decode(
        *blocks, nvfp4.global_decode_scale(largest, "mse"), values, device
    )
    return {name: weight.nbytes / best(call, repeat, clock) / 1e9 for name, call in calls.items()}


def torch_loop(weight: np.ndarray, global_scale: np.float32) -> np.ndarray:
    """Method mse as a plain torch loop over all candidates; returns the block scales' codes."""
    import torch

    blocks = (torch.from_numpy(weight.astype(np.int32)) << 16).view(torch.float32).abs().view(-1, 16)
    midpoints, values = (
        torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]),
        torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6.0]),
    )
    least, chosen = (
        torch.full((len(blocks),), torch.inf, dtype=torch.float64),
        torch.ones(len(blocks), dtype=torch.uint8),
    )
    for code in range(1, 127):
        scale = torch.tensor(e4m3.VALUES[code] * global_scale)
        # ties do not go to even: only the time matters
        decoded = values[torch.bucketize(blocks / scale, midpoints)].double() * scale.double()
        error = ((blocks.double() - decoded) ** 2).sum(1)
        better = error < least
        least, chosen = torch.where(better, error, least), torch.where(better, code, chosen)
    return chosen.numpy()


def peers() -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    bits = weight.view(torch.int16).numpy().view(np.uint16)
    scale = nvfp4.global_decode_scale(amax(bits))
    rows = bits[: SHAPE[0] // 8]
    speeds = {
        "torch, loop over all block scales": rows.nbytes / best(lambda: torch_loop(rows, scale), 2) / 1e9
    }
    try:
        from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor
    except ImportError:
        print("Model Optimizer is not installed here: left out", file=sys.stderr)
    else:
        theirs, scales = MXFP8QTensor.quantize(weight)
        calls: dict[str, Callable[[], object]] = {
            "MXFP8QTensor.quantize": lambda: MXFP8QTensor.quantize(weight),
            "MXFP8QTensor.dequantize": lambda: theirs.dequantize(torch.float32, scale=scales),
            "NVFP4QTensor.quantize": lambda: NVFP4QTensor.quantize(weight, 16),
        }
        for name, call in calls.items():
            speeds[f"Model Optimizer, {name}"] = bits.nbytes / best(call, 5) / 1e9
    return speeds


def table(results: dict[str, dict[str, float]]) -> str:
    limits = results["memory"]
    lines = ["| kernel | GB/s of bf16 | of copy | of read |", "|---|---|---|---|"]
    for name, speed in [pair for group in results.values() for pair in group.items()]:
        lines.append(
            f"| {name} | {speed:.3g} | {speed / limits['copy']:.2f} | {speed / limits['read']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    results = {"memory": memory(max(3, args.repeat // 4)), "kernels": kernels(args.repeat, args.device)}
    if args.peers:
        results["peers"] = peers()
    if args.json:
        args.json.write_text(
            json.dumps(
                {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "device": args.device} | results,
                indent=1,
            )
        )
    print(f"{machine()}, {time.strftime('%Y-%m-%d')}, device {args.device}, one thread\n\n{table(results)}")


if __name__ == "__main__":
    main()

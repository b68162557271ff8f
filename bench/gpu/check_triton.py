"""The formats' Triton kernels: byte for byte the CPU's, from threads side by side too; then their speed
and that of the bus, which feeds them.

    python -m bench.gpu.check_triton OUT.json                            on a CUDA device
    TRITON_INTERPRET=1 python -m bench.gpu.check_triton OUT.json small   in Triton's interpreter, on the CPU

OUT.json is a list of rows, written after each. The exit code is 1 if one is not right.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.gpu.environment import need_device
from nemoquant.formats import ScaleMethod, fp8, fp8_gpu, gpu, mxfp8, mxfp8_gpu, nvfp4, nvfp4_gpu
from nemoquant.formats.amax import amax

SECONDS = 45  # for the cases of weights; then no new one starts
GROUPS = (np.float32(1), np.float32(0.01))  # the tensor's own scale, and one that is far too small
INPUT_SCALES = (np.float32(0.01), np.float32(1e-4))


@dataclass(frozen=True)
class Extent:
    """How much is tried."""

    shape: tuple[int, int]
    kinds: tuple[str, ...]
    methods: tuple[ScaleMethod, ...]
    input_kinds: tuple[str, ...]
    threads: tuple[int, ...]
    tasks: int


WHOLE = Extent(
    shape=(2688, 1024),  # an expert of Super
    kinds=("normal", "all magnitudes", "lattice", "subnormal", "below", "empty"),
    methods=("max", "four_over_six", "mse"),
    input_kinds=("normal", "all magnitudes"),
    threads=(1, 4, 8),
    tasks=64,
)
SMALL = Extent(
    shape=(4, 64),
    kinds=("normal",),
    methods=("max",),
    input_kinds=("normal",),
    threads=(2,),
    tasks=2,
)


class Rows:
    """Written after each; what is not right is printed."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.began = time.time()
        self.rows: list[dict[str, Any]] = []

    def add(self, case: str, **row: Any) -> None:
        self.rows.append({"case": case, **row})
        self.out.write_text(json.dumps(self.rows, indent=0))
        if row.get("ok", True) is not True:
            print(json.dumps(self.rows[-1]), flush=True)

    def guarded(self, case: str, check: Callable[[], None]) -> None:
        """A check that fails becomes a row of its own; a fault of the device ends the process."""
        try:
            check()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:300]
            self.add(case, ok=False, why=why)
            if "CUDA error" in why:
                raise SystemExit(f"the device does not answer any more: {why}") from None

    def bad(self) -> int:
        return sum(row.get("ok") is False for row in self.rows)


def weight(kind: str, dtype: str, shape: tuple[int, int], seed: int = 0) -> NDArray[Any]:
    """[out, in] as bf16 patterns or float32.

    Args:
        kind: normal; all magnitudes; lattice (rich in ties); subnormal (near the smallest normal bf16); below
            (it); empty (every other block of 16 is zero, and negative).
    """
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(shape)
    values = {
        "normal": normal * 0.02,
        "all magnitudes": np.sign(normal) * 2.0 ** rng.uniform(-40, 10, shape),
        "lattice": rng.integers(-24, 25, shape) * 0.25,
        "subnormal": normal * 2.0**-105,
        "below": normal * 2.0**-128,
        "empty": np.where(np.arange(shape[1]) // 16 % 2 == 0, -0.0, normal),
    }[kind].astype(np.float32)
    return values if dtype == "float32" else (values.view(np.uint32) >> 16).astype(np.uint16)


def same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """By dtype, shape and bytes."""
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


def same_numbers(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """:func:`same`, but any NaN equals any other: a GPU's products have one pattern for all."""
    nan = np.isnan(b)
    return bool(a.shape == b.shape and (np.isnan(a) == nan).all() and same(a[~nan], b[~nan]))


def all_same(ours: Iterable[NDArray[Any]], theirs: Iterable[NDArray[Any]]) -> bool:
    return all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def check_weights(rows: Rows, extent: Extent) -> None:
    """amax and the codes of every dtype and kind of weight."""
    for dtype, kind in itertools.product(("bfloat16", "float32"), extent.kinds):
        if time.time() - rows.began > SECONDS:
            rows.add(f"weights {kind} {dtype}", ok=None, why="out of time")
            continue
        rows.guarded(f"weights {kind} {dtype}", partial(check_weight, rows, extent, kind, dtype))


def check_weight(rows: Rows, extent: Extent, kind: str, dtype: str) -> None:
    """amax and MXFP8, then FP8 and every method of NVFP4 by both scales; how long GPU and CPU took."""
    one = weight(kind, dtype, extent.shape)
    largest = amax(one)
    rows.add(f"amax {kind} {dtype}", ok=same(np.asarray(amax(one, "cuda")), np.asarray(largest)))
    expected = mxfp8.encode(one)
    rows.add(f"mxfp8 {kind} {dtype}", ok=all_same(mxfp8.encode(one, device="cuda"), expected))
    decoded = mxfp8.decode(*expected, device="cuda")
    rows.add(f"mxfp8 decoded {kind} {dtype}", ok=same(decoded, mxfp8.decode(*expected)))
    for group in GROUPS:
        name = f"{kind} {dtype} {group}"
        try:
            scale = fp8.decode_scale(largest * group)
        except Exception as error:  # of weights that small there is none: nothing to compare
            rows.add(f"fp8 scale {kind}", why=str(error)[:100])
            continue
        rows.add(f"fp8 {name}", ok=same(fp8.encode(one, scale, device="cuda"), fp8.encode(one, scale)))
        for method in extent.methods:
            scale = nvfp4.global_decode_scale(largest * group, method)
            start = time.time()
            there = nvfp4.encode(one, scale, method, device="cuda")
            between = time.time()
            here = nvfp4.encode(one, scale, method)
            times = {"gpu_s": round(between - start, 4), "cpu_s": round(time.time() - between, 4)}
            rows.add(f"nvfp4 {method} {name}", ok=all_same(there, here), **times)


def check_inputs(rows: Rows, extent: Extent) -> None:
    """Inputs of products rounded through codes and back, NaN and both infinities among them."""
    for kind in extent.input_kinds:
        values = weight(kind, "float32", extent.shape)
        values[0, 5], values[1, 20], values[2, 40] = np.nan, np.inf, -np.inf
        there = torch.from_numpy(values).to(gpu.torch_device("cuda"))
        by_mxfp8 = mxfp8.decode(*mxfp8.encode_activations(values))
        ok = same_numbers(mxfp8_gpu.rounded(there).cpu().numpy(), by_mxfp8)
        rows.add(f"inputs mxfp8 {kind}", ok=ok)
        for scale in INPUT_SCALES:
            name = f"{kind} {scale}"
            by_fp8 = fp8.decode(fp8.encode(values, scale), scale)
            rows.add(
                f"inputs fp8 {name}", ok=same_numbers(fp8_gpu.rounded(there, scale).cpu().numpy(), by_fp8)
            )
            by_nvfp4 = nvfp4.decode(*nvfp4.encode_activations(values, scale), scale)
            rows.add(
                f"inputs nvfp4 {name}",
                ok=same_numbers(nvfp4_gpu.rounded(there, scale).cpu().numpy(), by_nvfp4),
            )


def check_threads(rows: Rows, extent: Extent) -> None:
    """amax and codes of eight weights by several threads at once, each with its stream; GB/s of bf16.

    What is timed is encoding from this machine's memory and back, for a second at least.
    """
    weights = [weight("normal", "bfloat16", extent.shape, seed) for seed in range(8)]
    scales = [nvfp4.global_decode_scale(amax(one)) for one in weights]
    expected = [nvfp4.encode(one, scale) for one, scale in zip(weights, scales, strict=True)]

    def right(task: int) -> bool:
        number = task % len(weights)
        there = gpu.put(weights[number])
        if nvfp4.global_decode_scale(amax(there)) != scales[number]:
            return False
        return all_same(nvfp4.encode(there, scales[number]), expected[number])

    def encode(task: int) -> None:
        number = task % len(weights)
        nvfp4.encode(gpu.put(weights[number]), scales[number])

    for threads in extent.threads:
        with ThreadPoolExecutor(threads) as pool:
            ok = all(pool.map(right, range(extent.tasks)))
            start, done, seconds = time.time(), 0, 0.0
            while done == 0 or (extent is WHOLE and seconds < 1):
                list(pool.map(encode, range(extent.tasks)))
                done, seconds = done + extent.tasks, time.time() - start
        rate = round(done * weights[0].nbytes / seconds / 1e9, 2)
        rows.add(f"{threads} threads", ok=ok, GB_s_bf16_in=rate)


def time_kernels(rows: Rows) -> None:
    """The encoders of MXFP8 and NVFP4 alone, their inputs on the device: milliseconds, GB/s of bf16."""
    large = torch.randn(1 << 28, device="cuda").to(torch.bfloat16).view(torch.int16)
    codes, scales = (torch.empty(n, dtype=torch.uint8, device="cuda") for n in (1 << 28, 1 << 24))
    blocks = large.numel() // 32
    mxfp8_launch = partial(mxfp8_gpu.launch_encode, large, 16, codes, scales[:blocks])
    time_kernel(rows, "mxfp8", large.numel(), mxfp8_launch)
    tables = nvfp4_gpu.tables_on_gpu(np.float32(1e-3))
    for method in WHOLE.methods:
        blocks = large.numel() // (256 if method == "mse" else 16)
        launch = partial(
            nvfp4_gpu.launch_encode,
            method,
            large[: blocks * 16],
            16,
            np.float32(1e-3),
            tables=tables,
            packed=codes[: blocks * 8],
            block_scales=scales[:blocks],
        )
        time_kernel(rows, f"nvfp4 {method}", blocks * 16, launch)


def time_bus(rows: Rows) -> None:
    """Copies between pinned memory and the device, GB/s."""
    here = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for name, source, target in (("host to device", here, there), ("device to host", there, here)):
        each = milliseconds(partial(target.copy_, source, non_blocking=True))
        rows.add(f"pinned {name}", ms=round(each, 3), GB_s=round(source.numel() / each / 1e6, 1))


def time_kernel(rows: Rows, name: str, count: int, launch: Callable[[], None]) -> None:
    """A launch that encodes ``count`` elements."""
    each = milliseconds(launch)
    rows.add(f"kernel {name}", ms=round(each, 3), GB_s=round(count * 2 / each / 1e6, 1))


def milliseconds(launch: Callable[[], object]) -> float:
    """The mean of five launches, after one that is not counted."""
    launch()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        launch()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("extent", nargs="?", choices=("small",), help="little, for the interpreter")
    options = parser.parse_args()
    extent = SMALL if options.extent else WHOLE
    if extent is WHOLE:
        need_device()
    rows = Rows(options.out)
    if extent is WHOLE:
        rows.guarded("bus", partial(time_bus, rows))
        rows.guarded("kernels", partial(time_kernels, rows))
    rows.guarded("threads", partial(check_threads, rows, extent))
    rows.guarded("inputs", partial(check_inputs, rows, extent))
    check_weights(rows, extent)  # many: they take the time that is left
    print(f"{len(rows.rows)} rows, {rows.bad()} bad, {time.time() - rows.began:.1f} s")
    raise SystemExit(bool(rows.bad()))


if __name__ == "__main__":
    main()

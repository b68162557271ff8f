"""Times the scan on this GPU: prefill and decode at Super's and Nano's sizes, beside the floor and, where installed, mamba_ssm's kernels.

    nemoquant plugins build && python bench/gpu/mamba2_scan.py [--model super] [--segments]

Prints a table for bench/RESULTS.md, with the device and the date. Times are medians by CUDA events over captured graphs of calls that work
on different memory (more than the L2 cache holds), so that neither launches nor the cache flatter them. The floor is the larger of
    memory    bytes that must move (inputs, outputs and state once) over the bandwidth of a large copy, measured here
    products  operations of the four steps with chunks of 64 over the rate of a large bf16 matrix product, measured here
"""

import argparse
import datetime
import importlib.util
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from nemoquant.ops.functional import dtype_number
from nemoquant.ops.library import Kernels, kernels

MODELS = {"super": (128, 64, 8, 128), "nano": (64, 64, 8, 128)}  # heads, head_dim, groups, state
CHUNK = 64
REPEATS = 20
CACHE = 256 * 2**20  # bytes that together no L2 cache holds
BFLOAT16 = torch.bfloat16


def timed(calls: list[Callable[[], object]]) -> float:
    """Seconds of one call: all of them captured in a graph, the median of its replays."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    seconds = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(seconds)


def bandwidth() -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / timed([lambda: target.copy_(source)])


def product_rate() -> float:
    """Operations a second of a bf16 matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BFLOAT16) for _ in range(2))
    return 2 * 8192**3 / timed([lambda: a @ b])


class Case:
    """One shape's tensors and the calls on them."""

    def __init__(self, model: str, batch: int, length: int, state_dtype: torch.dtype) -> None:
        self.heads, self.width, self.groups, self.size = MODELS[model]
        self.batch, self.length = batch, length

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda").to(BFLOAT16)

        self.x, self.dt = normal(batch, length, self.heads, self.width), normal(batch, length, self.heads)
        self.b, self.c = (normal(batch, length, self.groups, self.size) for _ in range(2))
        self.a, self.d = -torch.rand(self.heads, device="cuda") * 8, torch.randn(self.heads, device="cuda")
        self.bias = torch.randn(self.heads, device="cuda") - 3
        self.state = torch.randn(batch, self.heads, self.width, self.size, device="cuda").to(state_dtype)
        self.after, self.y = torch.empty_like(self.state), torch.empty_like(self.x)
        self.seed = torch.tensor([1], device="cuda")
        self.workspace: Tensor | None = None

    def bytes(self) -> int:
        moved = (self.x, self.y, self.b, self.c, self.dt, self.state, self.after)
        return sum(t.numel() * t.element_size() for t in moved)

    def operations(self) -> float:
        """Of prefill, causal halves counted as halves: scores once a group; outputs and both state products once a head."""
        positions = self.batch * self.length
        scores = self.groups * CHUNK / 2 * self.size
        heads = self.heads * self.width * (CHUNK / 2 + 2 * self.size)
        return 2.0 * positions * (scores + heads)

    def ours(self, library: Kernels, *, stochastic: bool = False, segments: int = 0) -> None:
        inner, shared = self.heads * self.width, self.groups * self.size
        tensors = {
            "x": self.x, "b": self.b, "c": self.c, "dt": self.dt, "a": self.a, "d": self.d, "dt_bias": self.bias,
            "state_in": self.state, "y": self.y, "state_out": self.after, "seed": self.seed,
        }  # fmt: skip
        numbers = {
            "batch": self.batch, "length": self.length, "heads": self.heads, "head_dim": self.width, "groups": self.groups,
            "state": self.size, "x_batch_stride": self.length * inner, "x_position_stride": inner,
            "b_batch_stride": self.length * shared, "b_position_stride": shared, "c_batch_stride": self.length * shared,
            "c_position_stride": shared, "dt_batch_stride": self.length * self.heads, "dt_position_stride": self.heads,
            "dtype": dtype_number(BFLOAT16), "dt_dtype": dtype_number(BFLOAT16), "y_dtype": dtype_number(BFLOAT16),
            "state_dtype": dtype_number(self.state.dtype), "rounding": int(stochastic), "philox_rounds": 5, "segments": segments,
            "dt_min": 0.0, "dt_max": float("inf"),
        }  # fmt: skip
        size = library.workspace("mamba2_scan", **numbers)
        if size and (self.workspace is None or self.workspace.numel() < size):
            self.workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        pointers["workspace"] = self.workspace.data_ptr() if self.workspace is not None else 0
        library.call("mamba2_scan", stream=torch.cuda.current_stream().cuda_stream, **pointers, **numbers)

    def theirs(self) -> None:
        if self.length > 1:
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

            mamba_chunk_scan_combined(
                self.x, self.dt, self.a, self.b, self.c, 128, D=self.d, dt_bias=self.bias, initial_states=self.state, dt_softplus=True,
                return_final_states=True,
            )  # fmt: skip
            return
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        wide, full = (-1, -1, self.width), (-1, self.width, self.size)
        selective_state_update(
            self.state, self.x[:, 0], self.dt[:, 0, :, None].expand(wide), self.a[:, None, None].expand(full), self.b[:, 0], self.c[:, 0],
            self.d[:, None].expand(wide[1:]), dt_bias=self.bias[:, None].expand(wide[1:]), dt_softplus=True,
        )  # fmt: skip


def row(name: str, cases: list[Case], floor: float, library: Kernels, *, compare: bool, stochastic: bool = False) -> None:
    mine = timed([lambda c=c: c.ours(library, stochastic=stochastic) for c in cases])  # type: ignore[misc]
    other = timed([lambda c=c: c.theirs() for c in cases]) if compare else None  # type: ignore[misc]
    theirs = f"{other * 1e6:.1f} | {other / mine:.2f}" if other else "- | -"
    print(f"| {name} | {mine * 1e6:.1f} | {floor * 1e6:.1f} | {floor / mine:.0%} | {theirs} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of Mamba2Scan on this GPU.")
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--segments", action="store_true", help="prefill with 1 to 16 segments, to see which is best here")
    options = parser.parse_args()
    library = kernels("cuda")
    if library is None:
        raise SystemExit("no kernels for this GPU: nemoquant plugins build")
    copies, products = bandwidth(), product_rate()
    compare = importlib.util.find_spec("mamba_ssm") is not None
    print(f"Mamba2Scan, {torch.cuda.get_device_name()}, {datetime.date.today()}; a copy moves {copies / 1e12:.2f} TB/s, ", end="")
    print(f"a bf16 product does {products / 1e12:.0f} TFLOP/s; mamba_ssm {'beside it' if compare else 'is not installed'}\n")
    print("| case | us | floor us | of floor | mamba_ssm us | times as fast |\n|---|---|---|---|---|---|")
    for model in options.model or MODELS:
        for state_dtype in (torch.float32, torch.float16):
            for batch in (1, 8, 64, 256):
                one = Case(model, batch, 1, state_dtype)
                cases = [one, *(Case(model, batch, 1, state_dtype) for _ in range(CACHE // one.bytes()))]
                floor = one.bytes() / copies
                name = f"{model} decode, batch {batch}, state {str(state_dtype).removeprefix('torch.')}"
                row(name, cases, floor, library, compare=compare)
                if state_dtype == torch.float16:
                    row(f"{name}, stochastic", cases, floor, library, compare=False, stochastic=True)
        for length in (64, 512, 4096, 32768, 131072):
            one = Case(model, 1, length, torch.float32)
            cases = [one, *(Case(model, 1, length, torch.float32) for _ in range(CACHE // one.bytes()))]
            floor = max(one.bytes() / copies, one.operations() / products)
            row(f"{model} prefill, {length} tokens", cases, floor, library, compare=compare)
            if options.segments:
                for count in (1, 2, 4, 8, 16):
                    seconds = timed([lambda c=c, n=count: c.ours(library, segments=n) for c in cases])  # type: ignore[misc]
                    print(f"| {model} prefill, {length} tokens, {count} segments | {seconds * 1e6:.1f} | | | | |", flush=True)


if __name__ == "__main__":
    main()

"""Times of the scan through the C interface, in place, as engines call it; beside them mamba_ssm's kernels.

The floor is the larger of bytes that must move (inputs, outputs and state, once) over the rate of a copy,
and, for a prefill, the operations of the four steps by chunks over the rate of a bf16 product.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.timing import CACHE, Table, timed
from nemoquant.ops.functional import dtype_number
from nemoquant.ops.library import Kernels, kernels

MODELS = {"Super": (128, 64, 8, 128), "Nano": (64, 64, 8, 128)}  # heads, head_dim, groups, state
BATCHES, LENGTHS, SEGMENTS = (1, 8, 64), (512, 4096, 65_536), (1, 2, 4)
WIDE_BATCHES = (1, 8, 64, 256)
WIDE_LENGTHS = (64, 512, 4096, 32_768, 65_536, 131_072)
WIDE_SEGMENTS = (1, 2, 4, 8, 16)
CHUNK = 64
THEIR_CHUNK = 256  # as they have it by default
BFLOAT16 = torch.bfloat16

Theirs = Callable[..., object] | None
"""A kernel of mamba_ssm; None where it can't be imported."""


class Call:
    """The tensors of one call, and the call."""

    def __init__(self, model: str, batch: int, length: int, state_dtype: torch.dtype) -> None:
        self.heads, self.width, self.groups, self.size = MODELS[model]
        self.batch, self.length = batch, length

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda").to(BFLOAT16)

        self.x, self.dt = normal(batch, length, self.heads, self.width), normal(batch, length, self.heads)
        self.b, self.c = (normal(batch, length, self.groups, self.size) for _ in range(2))
        self.a, self.d = -torch.rand(self.heads, device="cuda") * 8, torch.randn(self.heads, device="cuda")
        self.dt_bias = torch.randn(self.heads, device="cuda") - 3
        self.state = torch.randn(batch, self.heads, self.width, self.size, device="cuda").to(state_dtype)
        self.after = self.state if length == 1 else torch.empty_like(self.state)
        self.y, self.seed = torch.empty_like(self.x), torch.tensor([1], device="cuda")
        self.workspace: Tensor | None = None

    def moved(self) -> int:
        """Bytes; the state goes in and out."""
        tensors = (self.x, self.y, self.b, self.c, self.dt, self.state, self.state)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def operations(self) -> float:
        """Of a prefill, causal halves counted as halves: scores once a group, other products once a head."""
        scores = self.groups * CHUNK / 2 * self.size
        by_heads = self.heads * self.width * (CHUNK / 2 + 2 * self.size)
        return 2.0 * self.batch * self.length * (scores + by_heads)

    def ours(self, library: Kernels, *, stochastic: bool = False, segments: int = 0) -> None:
        inner, shared = self.heads * self.width, self.groups * self.size
        tensors = {
            "x": self.x,
            "b": self.b,
            "c": self.c,
            "dt": self.dt,
            "a": self.a,
            "d": self.d,
            "dt_bias": self.dt_bias,
            "state_in": self.state,
            "state_out": self.after,
            "y": self.y,
            "seed": self.seed,
        }
        bfloat16 = dtype_number(BFLOAT16)
        numbers: dict[str, Any] = {
            "batch": self.batch,
            "length": self.length,
            "heads": self.heads,
            "head_dim": self.width,
            "groups": self.groups,
            "state": self.size,
            "x_batch_stride": self.length * inner,
            "x_position_stride": inner,
            "b_batch_stride": self.length * shared,
            "b_position_stride": shared,
            "c_batch_stride": self.length * shared,
            "c_position_stride": shared,
            "dt_batch_stride": self.length * self.heads,
            "dt_position_stride": self.heads,
            "dtype": bfloat16,
            "dt_dtype": bfloat16,
            "y_dtype": bfloat16,
            "state_dtype": dtype_number(self.state.dtype),
            "rounding": int(stochastic),
            "philox_rounds": 5,
            "segments": segments,
            "dt_min": 0.0,
            "dt_max": float("inf"),
        }
        size = library.workspace("mamba2_scan", **numbers)
        if size and (self.workspace is None or self.workspace.numel() < size):
            self.workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        pointers["workspace"] = self.workspace.data_ptr() if self.workspace is not None else 0
        stream = torch.cuda.current_stream().cuda_stream
        library.call("mamba2_scan", stream=stream, **pointers, **numbers)

    def their_step(self, step: Callable[..., object]) -> None:
        wide, full = (-1, -1, self.width), (-1, self.width, self.size)
        step(
            self.state,
            self.x[:, 0],
            self.dt[:, 0, :, None].expand(wide),
            self.a[:, None, None].expand(full),
            self.b[:, 0],
            self.c[:, 0],
            self.d[:, None].expand(wide[1:]),
            dt_bias=self.dt_bias[:, None].expand(wide[1:]),
            dt_softplus=True,
        )

    def their_scan(self, scan: Callable[..., object]) -> None:
        scan(
            self.x,
            self.dt,
            self.a,
            self.b,
            self.c,
            THEIR_CHUNK,
            D=self.d,
            dt_bias=self.dt_bias,
            initial_states=self.state,
            dt_softplus=True,
            return_final_states=True,
        )


def calls(model: str, batch: int, length: int, state_dtype: torch.dtype, most: int) -> list[Call]:
    """One and as many more as the cache can't hold, ``most`` at most."""
    one = Call(model, batch, length, state_dtype)
    more = min(most, CACHE // one.moved())
    return [one, *(Call(model, batch, length, state_dtype) for _ in range(more))]


def theirs() -> tuple[Theirs, Theirs]:
    """mamba_ssm's step and scan; None where it can't be imported, which is printed."""
    try:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except Exception as error:
        print("no mamba_ssm:", error, flush=True)
        return None, None
    return selective_state_update, mamba_chunk_scan_combined


def decode(
    table: Table,
    library: Kernels,
    step: Theirs,
    model: str,
    batch: int,
    dtype: torch.dtype,
) -> None:
    """A step of every sequence; with a float16 state by stochastic rounding too."""
    sets = calls(model, batch, 1, dtype, most=40)
    us = timed([lambda c=c: c.ours(library) for c in sets])
    more = {}
    if dtype == torch.float16:
        more["stochastic_us"] = timed([lambda c=c: c.ours(library, stochastic=True) for c in sets])
    if step:
        more["mamba_ssm_us"] = timed([lambda c=c: c.their_step(step) for c in sets])
    name = f"scan {of(model)}decode B{batch} state {str(dtype).removeprefix('torch.')}"
    table.row(name, us, table.limits.floor(sets[0].moved()), **more)


def prefill(table: Table, library: Kernels, model: str, length: int, segments: tuple[int, ...]) -> None:
    """One sequence, with the number of segments that the kernel chooses, and with some given ones."""
    sets = calls(model, 1, length, torch.float32, most=3)
    us = timed([lambda c=c: c.ours(library) for c in sets], 7)
    more = {}
    for count in segments:
        given = [lambda c=c, n=count: c.ours(library, segments=n) for c in sets]
        more[f"segments{count}_us"] = timed(given, 5)
    floor = table.limits.floor(sets[0].moved(), sets[0].operations())
    table.row(f"scan {of(model)}prefill {length}", us, floor, **more)


def their_prefill(table: Table, scan: Callable[..., object], model: str, length: int) -> None:
    """The same by mamba_ssm."""
    sets = calls(model, 1, length, torch.float32, most=3)
    us = timed([lambda c=c: c.their_scan(scan) for c in sets], 5)
    table.beside(f"scan {of(model)}prefill {length}", mamba_ssm_us=us)


def of(model: str) -> str:
    """A model's name in front of a row's; Super's rows have none."""
    return "" if model == "Super" else f"{model} "


def rows(table: Table, wide: bool = False) -> None:
    """Super; ``wide``: Nano too, and more batches, lengths and segments."""
    library = kernels("cuda")
    if library is None:
        raise SystemExit("no kernels for this GPU: nemoquant plugins build")
    step, scan = theirs()
    for model in MODELS if wide else ("Super",):
        for dtype in (torch.float32, torch.float16):
            for batch in WIDE_BATCHES if wide else BATCHES:
                name = f"scan {of(model)}decode {batch} {dtype}"
                given = (table, library, step, model, batch, dtype)
                table.guarded(name, lambda given=given: decode(*given))
        segments = WIDE_SEGMENTS if wide else SEGMENTS
        for length in WIDE_LENGTHS if wide else LENGTHS:
            name = f"scan {of(model)}prefill {length}"
            given = (table, library, model, length, segments)
            table.guarded(name, lambda given=given: prefill(*given))
    for model in MODELS if wide and scan else ("Super",) if scan else ():
        for length in WIDE_LENGTHS if wide else LENGTHS:  # last: it compiles some 40 kernels to choose among
            name = f"scan {of(model)}prefill {length}, mamba_ssm"
            given = (table, scan, model, length)
            table.guarded(name, lambda given=given: their_prefill(*given))

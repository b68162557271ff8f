"""The scan's cases: against the recurrence in float64, against the host build's bits, repeated, on views."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.cases import BFLOAT16, DTYPES, FLOAT16, FLOAT32, Case, Errors, relative_error, unequal
from nemoquant.ops import library
from nemoquant.ops.functional import mamba2_scan

FLOOR = 5e-7  # float32 sums of 128 products, in any order

SUPER = {"heads": 128, "groups": 8}
FEW = {"heads": 4, "groups": 2}  # for the emulator

ONE_FACTOR: tuple[dict[str, Any], ...] = (
    {"size": 16},
    {"size": 64},
    {"size": 96},
    {"size": 256},
    {"width": 128},
    {"width": 32},
    {"width": 48},
    {"batch": 3},
    {"bias": -14.0, "state": 0.0},  # steps so small that little is written
    {"bias": 30.0},  # softplus is the identity there
    {"dt_dtype": FLOAT32},
)


def inputs(
    device: str,
    *,
    batch: int = 1,
    length: int = 65,
    heads: int = 8,
    width: int = 64,
    groups: int = 2,
    size: int = 128,
    dtype: torch.dtype = BFLOAT16,
    dt_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype = FLOAT32,
    bias: float = -3.0,
    state: float = 1.0,
) -> dict[str, Tensor]:
    """Arguments of ``mamba2_scan``, the same on every run; ``state`` scales the one that goes in."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    return {
        "x": normal(batch, length, heads, width).to(dtype),
        "dt": normal(batch, length, heads).to(dt_dtype or dtype),
        "A": -torch.rand(heads, generator=g, device=device) * 8 - 0.01,
        "B": normal(batch, length, groups, size).to(dtype),
        "C": normal(batch, length, groups, size).to(dtype),
        "D": normal(heads),
        "dt_bias": normal(heads) + bias,
        "state_in": (normal(batch, heads, width, size) * state).to(state_dtype),
    }


def recurrence(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Position by position in float64, by the definition: y and the state after it."""
    x, dt, a, b, c, d, bias, state = (value.double() for value in given.values())
    dt = torch.nn.functional.softplus(dt + bias, threshold=200.0)
    share = x.shape[2] // b.shape[2]
    b, c = b.repeat_interleave(share, 2), c.repeat_interleave(share, 2)
    y = torch.empty_like(x)
    decay = torch.exp(dt * a)
    for t in range(x.shape[1]):
        kept = (decay[:, t, :, None, None] * state).flatten(0, 1)
        step = (dt[:, t, :, None] * x[:, t]).flatten(0, 1)[..., None]
        state = torch.baddbmm(kept, step, b[:, t].flatten(0, 1)[:, None]).view_as(state)
        y[:, t] = (state @ c[:, t, ..., None])[..., 0] + d[:, None] * x[:, t]
    return y, state


def limit(exact: Tensor, *dtypes: torch.dtype) -> float:
    """Twice the error of rounding the exact result once, to the coarsest of the dtypes."""
    return max(2 * max(relative_error(exact.to(dtype), exact) for dtype in dtypes), FLOOR)


def against_float64(device: str, y_dtype: torch.dtype = FLOAT32, ramp: float = 0.0, **sizes: Any) -> Errors:
    """y, the state, and whether a second call gives the same bits.

    ``ramp`` makes whole segments decay by 0.1 to 0.9, each by another factor: what is carried over two of
    them shows.
    """
    given = inputs(device, **sizes)
    if ramp:
        dt = given["dt"]
        slope = torch.linspace(-ramp, ramp, dt.shape[1], device=device)[None, :, None]
        given["dt"] = (dt.float() * 0.1 + slope).to(dt.dtype)
    y, state = mamba2_scan(**given, y_dtype=y_dtype)
    exact_y, exact_state = recurrence(given)
    dtype, length = given["x"].dtype, given["x"].shape[1]
    through = dtype if length > 1 else state.dtype  # by chunks, products are of the inputs' dtype
    again = mamba2_scan(**given, y_dtype=y_dtype)
    return [
        ("y", relative_error(y, exact_y), limit(exact_y, dtype, y_dtype)),
        ("state", relative_error(state, exact_state), limit(exact_state, state.dtype, through)),
        ("repeat", unequal(again, (y, state)), 0),
    ]


def views(device: str) -> Errors:
    """x, B and C as slices of one wider tensor, as the convolution leaves them: the bits of copies."""
    given = inputs(device, length=70)
    wide = torch.randn(1, 70, 8 * 64 + 2 * 2 * 128 + 64, device=device).to(BFLOAT16)
    sliced = {
        "x": wide[..., :512].unflatten(2, (8, 64)),
        "B": wide[..., 512:768].unflatten(2, (2, 128)),
        "C": wide[..., 768:1024].unflatten(2, (2, 128)),
    }
    copies = {name: tensor.contiguous() for name, tensor in sliced.items()}
    return [("bits", unequal(mamba2_scan(**given | sliced), mamba2_scan(**given | copies)), 0)]


def bits_of_the_host(device: str, host: Path, length: int, dtype: torch.dtype, seed: int | None) -> Errors:
    """How many values differ from the host build's; with a seed the state is float16, rounded by it."""
    state_dtype = FLOAT16 if seed else FLOAT32
    given = inputs("cpu", batch=2, length=length, dtype=dtype, state_dtype=state_dtype)
    library.use(host, "cpu")
    options = {"rounding": "stochastic"} if seed else {}
    seeds = {"seed": torch.tensor([seed])} if seed else {}
    expected = mamba2_scan(**given, **options, **seeds)
    if device != "cpu":
        library.use(None, "cpu")
    there = {name: tensor.to(device) for name, tensor in (given | seeds).items()}
    found = mamba2_scan(**there, **options)
    differ = [float((a.cpu() != b).sum()) for a, b in zip(found, expected, strict=True)]
    return [("y", differ[0], 0), ("state", differ[1], 0)]


def cases(device: str, host: Path | None) -> Iterator[Case]:
    """All, as many as the device can bear.

    Args:
        device: cuda or cpu.
        host: the host library, to compare bits with; None: without those cases.
    """
    small = device == "cpu"
    check = partial(against_float64, device)
    for dtype in DTYPES:
        name = f"scan {str(dtype).removeprefix('torch.')}"
        for length in (1, 33, 70) if small else (1, 2, 31, 32, 63, 64, 65, 333):
            sizes = {"length": length, **(FEW if small else SUPER)}
            yield Case(f"{name} Super heads, length {length}", partial(check, dtype=dtype, **sizes))
        for factor in ONE_FACTOR:
            yield Case(f"{name} {factor}", partial(check, dtype=dtype, y_dtype=dtype, **factor))
        if dtype != FLOAT32:
            sizes = {"length": 2100, "heads": 1} if small else {"length": 4200, "heads": 8}
            slow = partial(check, dtype=dtype, groups=1, bias=-9.5, ramp=1.5, **sizes)
            yield Case(f"{name} segments, slow heads", slow)
        if not small:
            yield Case(f"{name} segments, 5000", partial(check, dtype=dtype, length=5000, heads=8, groups=1))
            yield Case(f"{name} Super 4099", partial(check, dtype=dtype, length=4099, **SUPER))
    for state_dtype in (FLOAT16, BFLOAT16):
        for length in (1, 40):
            name = f"scan state {state_dtype}, length {length}"
            yield Case(name, partial(check, state_dtype=state_dtype, length=length))
    yield Case("scan views into the convolution's output", partial(views, device))
    if host is None:
        return
    for length in (1, 20):
        for dtype in (BFLOAT16, FLOAT32, FLOAT16):
            for seed in (None, 12345):
                name = f"scan_steps bits of the host, {length}, {dtype}, seed {seed}"
                yield Case(name, partial(bits_of_the_host, device, host, length, dtype, seed))

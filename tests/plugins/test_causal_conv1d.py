"""CausalConv1d on the host: torch's conv1d in float64 as oracle, the ONNX function, cut states, refusals."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.emulator import ORDERS, Device, emulated
from support.norms import relative_error as distance
from support.plugin_build import needs_compiler, needs_tensorrt_headers
from support.single_op import single_op
from support.trt_caller import Caller, Tensor, field

from nemoquant.errors import EngineError
from nemoquant.graph import ops
from nemoquant.ops.abi import DTYPES
from nemoquant.ops.library import Kernels

pytestmark = [needs_compiler, pytest.mark.slow]

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Array = NDArray[np.generic]


@dataclass(frozen=True)
class Case:
    """``offset`` elements before x and y, ``gap`` elements between the rows of x; ``scale`` of x."""

    batch: int = 2
    length: int = 9
    channels: int = 16
    kernel: int = 4
    dtype: str = "bfloat16"
    y_dtype: str = "bfloat16"
    bias: bool = True
    offset: int = 0
    gap: int = 0
    scale: float = 1.0


BASE = Case()
ROWS = {
    "the base": BASE,
    "decoding": replace(BASE, length=1),
    "two positions, fewer than taps": replace(BASE, length=2),
    "three positions, the state's length": replace(BASE, length=3),
    "one whole step": replace(BASE, length=4),
    "one more than a step": replace(BASE, length=5),
    "tiles of eight positions": replace(BASE, batch=1, length=601, channels=256),
    "one sequence": replace(BASE, batch=1),
    "one channel": replace(BASE, channels=1),
    "seven channels, no multiple of four": replace(BASE, channels=7),
    "more channels than a block has threads": replace(BASE, channels=520),
    "two taps": replace(BASE, kernel=2),
    "three taps": replace(BASE, kernel=3),
    "three taps, seven channels": replace(BASE, kernel=3, channels=7),
    "no bias": replace(BASE, bias=False),
    "float32 out": replace(BASE, y_dtype="float32"),
    "float16": replace(BASE, dtype="float16", y_dtype="float16"),
    "float16, float32 out": replace(BASE, dtype="float16", y_dtype="float32"),
    "float32": replace(BASE, dtype="float32", y_dtype="float32"),
    "float32, two taps, one channel": replace(BASE, dtype="float32", y_dtype="float32", kernel=2, channels=1),
    "rows apart, aligned": replace(BASE, gap=8),
    "rows apart, not aligned": replace(BASE, gap=3),
    "seven channels in rows of eight": replace(BASE, channels=7, gap=1),
    "addresses that are not aligned": replace(BASE, offset=1),
    "large values: silu is 0 or x": replace(BASE, scale=300.0, y_dtype="float32"),
    "small values: silu is x / 2": replace(BASE, scale=1e-4, y_dtype="float32"),
}


def aligned(shape: tuple[int, ...], dtype: Any, offset: int = 0) -> Array:
    """Memory that begins ``offset`` elements after a multiple of 16 bytes."""
    size, count = np.dtype(dtype).itemsize, int(np.prod(shape))
    space = np.zeros(count * size + 64, np.uint8)
    start = -space.ctypes.data % 16 + offset * size
    return space[start : start + count * size].view(dtype).reshape(shape)


@dataclass
class Given:
    """Arrays of a case. ``x`` is a view of rows that lie ``gap`` apart."""

    case: Case
    rows: Array
    x: Array
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    state: Array


def given(case: Case, seed: int = 0) -> Given:
    g, dtype = np.random.default_rng(seed), NUMPY[case.dtype]
    rows = aligned((case.batch, case.length, case.channels + case.gap), dtype, case.offset)
    rows[:] = (g.standard_normal(rows.shape) * case.scale).astype(dtype)
    weight = aligned((case.channels, case.kernel), np.float32)
    weight[:] = g.standard_normal(weight.shape) / case.kernel
    state = aligned((case.batch, case.channels, case.kernel - 1), dtype)
    state[:] = (g.standard_normal(state.shape) * case.scale).astype(dtype)
    bias = aligned((case.channels,), np.float32)
    bias[:] = g.standard_normal(case.channels)
    return Given(case, rows, rows[:, :, : case.channels], weight, bias if case.bias else None, state)


def arguments(a: Given, y: Array, state_out: Array) -> dict[str, Any]:
    case = a.case
    return {
        "x": a.rows.ctypes.data,
        "weight": a.weight.ctypes.data,
        "bias": a.bias.ctypes.data if a.bias is not None else None,
        "state_in": a.state.ctypes.data,
        "y": y.ctypes.data,
        "state_out": state_out.ctypes.data,
        "batch": case.batch,
        "length": case.length,
        "channels": case.channels,
        "kernel": case.kernel,
        "x_stride": case.channels + case.gap if case.gap else 0,
        "dtype": DTYPES[case.dtype],
        "y_dtype": DTYPES[case.y_dtype],
    }


def run(kernels: Kernels, a: Given) -> tuple[Array, Array]:
    case = a.case
    y = aligned((case.batch, case.length, case.channels), NUMPY[case.y_dtype], case.offset)
    state_out = aligned(a.state.shape, NUMPY[case.dtype])
    y[:], state_out[:] = 99, 99
    kernels.call("causal_conv1d", **arguments(a, y, state_out))
    return y, state_out


def torch_conv(a: Given, dtype: torch.dtype) -> torch.Tensor:
    """torch's own convolution over state and x -> y [B, L, C]."""
    full = torch.cat(
        [torch.tensor(a.state.astype(np.float64)), torch.tensor(a.x.astype(np.float64)).mT], 2
    ).to(dtype)
    bias = None if a.bias is None else torch.tensor(a.bias).to(dtype)
    y = torch.nn.functional.conv1d(
        full, torch.tensor(a.weight).to(dtype)[:, None], bias, groups=a.case.channels
    )
    return torch.nn.functional.silu(y).mT


@pytest.mark.parametrize("name", ROWS)
def test_against_float64(name: str, kernels: Kernels) -> None:
    """float32: within twice torch's error in float32. 16 bits: within 2% of one rounding of the exact result.

    The new state equals the last inputs, bit for bit.
    """
    a = given(ROWS[name])
    y, state = run(kernels, a)
    exact = torch_conv(a, torch.float64)
    if a.case.y_dtype == "float32":
        limit = 2 * distance(torch_conv(a, torch.float32).numpy(), exact)
    else:
        limit = 1.02 * distance(exact.to(TORCH[a.case.y_dtype]).double().numpy(), exact)
    assert 0 < distance(y, exact) <= limit
    full = np.concatenate([a.state, np.swapaxes(a.x, 1, 2)], 2)
    assert state.tobytes() == full[:, :, -(a.case.kernel - 1) :].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cut", [1, 2, 3, 5, 8])
def test_a_sequence_that_is_cut_anywhere_gives_the_same_bits(cut: int, dtype: str, kernels: Kernels) -> None:
    whole = given(replace(BASE, dtype=dtype, y_dtype=dtype))
    y, state = run(kernels, whole)
    parts, carried = [], whole.state
    for start, end in ((0, cut), (cut, BASE.length)):
        rows = aligned((BASE.batch, end - start, BASE.channels), NUMPY[dtype])
        rows[:] = whole.x[:, start:end]
        part = Given(replace(whole.case, length=end - start), rows, rows, whole.weight, whole.bias, carried)
        one, carried = run(kernels, part)
        parts.append(one)
    assert np.concatenate(parts, 1).tobytes() == y.tobytes()
    assert carried.tobytes() == state.tobytes()


def test_aligned_and_unaligned_kernels_give_the_same_bits(kernels: Kernels) -> None:
    y, state = run(kernels, given(BASE))
    for change in ({"offset": 1}, {"gap": 3}):
        a = given(replace(BASE, **change))
        a.x[:] = given(BASE).x
        a.weight[:], a.state[:] = given(BASE).weight, given(BASE).state
        a.bias = given(BASE).bias
        again, kept = run(kernels, a)
        assert again.tobytes() == y.tobytes()
        assert kept.tobytes() == state.tobytes()


@pytest.mark.parametrize(
    "name", ["the base", "tiles of eight positions", "seven channels, no multiple of four", "float32"]
)
def test_every_order_gives_the_same_bits(name: str, kernels: Kernels) -> None:
    a, found = given(ROWS[name]), []
    for order in ORDERS:
        with emulated(kernels.path, order):
            found.append([array.tobytes() for array in run(kernels, a)])
    assert found == [found[0]] * len(ORDERS)


@pytest.mark.parametrize("length", [1, 4])
def test_the_state_of_a_few_positions_may_be_written_in_place(length: int, kernels: Kernels) -> None:
    a = given(replace(BASE, length=length))
    y, after = run(kernels, a)
    again = aligned(y.shape, y.dtype)
    kernels.call("causal_conv1d", **arguments(a, again, a.state))
    assert again.tobytes() == y.tobytes()
    assert a.state.tobytes() == after.tobytes()


def test_what_is_written_may_overlap_nothing_else(kernels: Kernels) -> None:
    """More than 4 positions may be several tiles: the last one would write what the first has yet to read."""
    a = given(BASE)
    y, after = aligned((2, 9, 16), y_type := NUMPY[BASE.y_dtype]), aligned(a.state.shape, y_type)
    plain, before = arguments(a, y, after), [array.tobytes() for array in (a.rows, a.weight, a.state, y)]
    assert a.bias is not None
    with pytest.raises(
        EngineError, match="state_in is state_out with 9 positions; expected another place, or"
    ):
        kernels.call("causal_conv1d", **plain | {"state_out": plain["state_in"]})
    inputs = {"x": a.rows, "weight": a.weight, "bias": a.bias, "state_in": a.state}
    for name, array in inputs.items():
        for output, size in (("y", y.nbytes), ("state_out", after.nbytes)):
            for at in (
                array.ctypes.data + 2,
                array.ctypes.data + array.nbytes - 2,
                array.ctypes.data - size + 2,
            ):
                with pytest.raises(
                    EngineError, match=rf": {output} at .* overlaps {name} at .*; expected mem"
                ):
                    kernels.call("causal_conv1d", **plain | {output: at})
    with pytest.raises(EngineError, match=r": state_out at .* overlaps y at"):
        kernels.call("causal_conv1d", **plain | {"state_out": y.ctypes.data})
    assert before == [array.tobytes() for array in (a.rows, a.weight, a.state, y)]
    apart = plain | {"x_stride": 48}  # rows three times as far apart as they are long: the last one's end
    space = np.zeros(2**16, np.uint8)
    place = (space.ctypes.data + 2**15) // 16 * 16
    with pytest.raises(EngineError, match=r": y at .* overlaps x at"):
        kernels.call("causal_conv1d", **apart | {"x": place, "y": place + (17 * 48 + 16) * 2 - 2})
    beside = aligned((2 * (9 * 16 + 48),), y_type)  # y and state directly behind one another: no overlap
    beside[2 * 9 * 16 : 2 * 9 * 16 + a.state.size] = a.state.ravel()
    kernels.call(
        "causal_conv1d", **plain | {"y": beside.ctypes.data, "state_in": beside.ctypes.data + y.nbytes}
    )


@pytest.mark.parametrize("channels", [64, 63])
def test_results_beyond_32_bits(channels: int, kernels: Kernels, tmp_path: Path) -> None:
    """y has 2^31 elements and more, of which the last block alone is computed, in sparse files."""
    batch = 2**31 // channels + 5
    case = Case(batch=batch, length=1, channels=channels, y_dtype="float32", bias=False)
    shapes = {"x": (batch, 1, channels), "y": (batch, 1, channels)} | dict.fromkeys(
        ("state_in", "state_out"), (batch, channels, 3)
    )
    places = {
        name: np.memmap(tmp_path / name, np.float32 if name == "y" else np.uint16, "w+", shape=shape)
        for name, shape in shapes.items()
    }
    small = given(replace(case, batch=1))
    for name, array in (("x", small.x), ("state_in", small.state)):
        places[name][-1] = array[0].view(np.uint16)
    plain = arguments(small, *run(kernels, small)) | {"batch": batch}
    with emulated(kernels.path, Device(last_block_only=True)):
        kernels.call("causal_conv1d", **plain | {name: array.ctypes.data for name, array in places.items()})
    y, state = run(kernels, small)
    assert places["y"][-1, 0, -8:].tobytes() == y[0, 0, -8:].tobytes()  # a block has no whole number of rows
    assert places["state_out"][-1, -8:].tobytes() == state[0, -8:].tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_what_is_not_finite_reaches_its_taps_and_no_further(
    kernel: int, value: float, kernels: Kernels
) -> None:
    clean, dirty = given(replace(BASE, kernel=kernel)), given(replace(BASE, kernel=kernel))
    dirty.x[1, 3, 5] = value
    (y, _), (spoilt, _) = run(kernels, clean), run(kernels, dirty)
    changed = np.argwhere(spoilt.view(np.uint16) != y.view(np.uint16))
    assert {tuple(place) for place in changed.tolist()} == {(1, 3 + j, 5) for j in range(kernel)}


@pytest.mark.parametrize("y_dtype", ["float32", "bfloat16"])
def test_the_ends_of_silu(y_dtype: str, kernels: Kernels) -> None:
    """One tap of 1, and values where exp over- or underflows, for both implementations of silu.

    float32 keeps 20 bits, bfloat16 its 8. As in torch, -inf gives NaN. Results below 1e-30 count as zero.
    """
    values = [-3e38, -1e4, -100, -88, -87, -30, -1, -0.0, 0.0, 1e-30, 1, 20, 88, 1e4, 3e38, np.inf, -np.inf]
    a = given(Case(batch=1, length=1, channels=len(values), y_dtype=y_dtype, bias=False))
    a.weight[:], a.state[:] = [0, 0, 0, 1], 0
    a.x[0, 0] = np.array(values, ml_dtypes.bfloat16)
    exact = torch.nn.functional.silu(torch.tensor(a.x[0, 0].astype(np.float64))).numpy()
    y = run(kernels, a)[0][0, 0].astype(np.float64)
    assert y[-2] == np.inf
    assert np.isnan(y[-1]) and np.isnan(exact[-1])
    limit = 2.0**-20 if y_dtype == "float32" else 2.0**-8
    assert (np.abs(y[:-2] - exact[:-2]) <= limit * np.maximum(np.abs(exact[:-2]), 1e-30 / limit)).all()


def test_the_onnx_function(kernels: Kernels) -> None:
    """The body in ``graph/ops.py``, run by ONNX Runtime, against the kernel.

    The kernel's error is at most twice as large; the states are the same bits.
    """
    a = given(replace(BASE, dtype="float32", y_dtype="float32"))
    feeds = {"x": a.x, "weight": a.weight, "bias": a.bias, "state_in": a.state}
    wanted = single_op(ops.causal_conv1d(a.case.kernel), feeds, activation="silu")(feeds)
    y, state = run(kernels, a)
    exact = torch_conv(a, torch.float64)
    assert distance(y, exact) <= 2 * distance(wanted[0], exact)
    assert state.tobytes() == wanted[1].tobytes()


@needs_tensorrt_headers
@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_the_tensorrt_plugin_gives_the_same_bits(
    kernel: int, dtype: str, kernels: Kernels, caller: Caller
) -> None:
    a = given(replace(BASE, kernel=kernel, dtype=dtype, y_dtype=dtype))
    plugin = caller.creators["CausalConv1d"].create([field("activation", "silu")])
    assert plugin is not None
    context = plugin.attach()
    arrays = [(dtype, a.x), ("float32", a.weight), ("float32", a.bias), (dtype, a.state)]
    inputs = [(Tensor(type, array.shape), array) for type, array in arrays if array is not None]
    outputs = [(Tensor(dtype, array.shape), np.zeros_like(array)) for array in (a.x, a.state)]
    assert context.shape_change([t for t, _ in inputs], [t for t, _ in outputs]) == 0
    assert context.enqueue(inputs, outputs, np.zeros(1, np.uint8)) == 0
    for (_, got), wanted in zip(outputs, run(kernels, a), strict=True):
        assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch": 0}, "batch is 0; expected 1 or more"),
        ({"length": 0}, "length is 0; expected 1 or more"),
        ({"length": -1}, "length is -1; expected 1 or more"),
        ({"channels": 0}, "channels is 0; expected 1 or more"),
        ({"kernel": 1}, "kernel is 1; expected 2, 3 or 4 taps"),
        ({"kernel": 5}, "kernel is 5; expected 2, 3 or 4 taps"),
        ({"x_stride": 15}, "x_stride is 15; expected 0, or channels or more"),
        ({"dtype": 3}, "dtype is 3; expected float32, float16 or bfloat16"),
        ({"y_dtype": 1}, "y_dtype is 1; expected float32 or dtype"),
        ({"activation": 1}, "activation is 1; expected 0, silu"),
        ({"x": None}, "is null; only bias may be"),
        ({"state_out": None}, "is null; only bias may be"),
        ({"length": 1 << 40, "batch": 1 << 10}, "is more than a launch can count"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_refused_before_anything_starts(
    change: dict[str, Any], says: str, kernels: Kernels
) -> None:
    a = given(BASE)
    y, state = np.full((2, 9, 16), 99, ml_dtypes.bfloat16), np.full((2, 16, 3), 99, ml_dtypes.bfloat16)
    with pytest.raises(EngineError, match=r"libnemoquant_host.so: causal_conv1d: ") as error:
        kernels.call("causal_conv1d", **arguments(a, y, state) | change)
    assert says in str(error.value)
    assert (y == 99).all()
    assert (state == 99).all()

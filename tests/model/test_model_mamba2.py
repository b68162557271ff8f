"""The scan and the convolution against plain float64 recurrences."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.norms import relative_error as relative
from torch import Tensor

from nemoquant.model.mamba2 import CHUNK, causal_conv, scan

# float32 rounds by 6e-8; sums of 64 products of mixed signs lose a little more. Measured: at most 1.7e-7
# here.
TOLERANCE = 1e-6
BASE: dict[str, Any] = {
    "batch": 2,
    "length": CHUNK + 9,
    "heads": 6,
    "width": 8,
    "groups": 2,
    "size": 16,
    "bias": -3.0,
    "spread": 1.0,
    "a": 8.0,
    "limit": (0.0, math.inf),
    "state": 1.0,
    "dtype": torch.float32,
}


def inputs(
    batch: int, length: int, heads: int, width: int, groups: int, size: int, **o: Any
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return {
        "x": normal(batch, length, heads, width).to(o["dtype"]),
        "dt": (normal(batch, length, heads) * o["spread"]).to(o["dtype"]),
        "a": -torch.rand(heads, generator=g) * o["a"] - 0.01,
        "b": normal(batch, length, groups, size).to(o["dtype"]),
        "c": normal(batch, length, groups, size).to(o["dtype"]),
        "d": normal(heads),
        "dt_bias": normal(heads) + o["bias"],
        "limit": o["limit"],
        "state": normal(batch, heads, width, size) * o["state"],
    }


def recurrence(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    limit: Any,
    state: Tensor,
) -> Any:
    """The definition, position by position and head by head, in float64."""
    x, a, b, c, d, state = (t.double() for t in (x, a, b, c, d, state.clone()))
    raw = dt.double() + dt_bias.double()
    dt = torch.clamp(torch.maximum(raw, torch.zeros_like(raw)) + torch.log1p(torch.exp(-raw.abs())), *limit)
    y = torch.zeros_like(x)
    per = x.shape[2] // b.shape[2]
    for n in range(x.shape[0]):
        for h in range(x.shape[2]):
            s = state[n, h]
            for t in range(x.shape[1]):
                s = torch.exp(dt[n, t, h] * a[h]) * s + torch.outer(
                    dt[n, t, h] * x[n, t, h], b[n, t, h // per]
                )
                y[n, t, h] = s @ c[n, t, h // per] + d[h] * x[n, t, h]
            state[n, h] = s
    return y, state


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="base"),
        *[
            pytest.param({"length": n}, id=f"length {n}")
            for n in (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
        ],
        pytest.param({"batch": 1}, id="one row"),
        pytest.param({"groups": 1}, id="one group"),
        pytest.param({"groups": 6}, id="a group for each head"),
        pytest.param({"heads": 2, "groups": 1, "width": 1}, id="heads of one channel"),
        pytest.param({"size": 1}, id="state of one"),
        pytest.param({"size": 24, "width": 20}, id="sizes that are no powers of two"),
        pytest.param({"state": 0.0}, id="no state before"),
        pytest.param({"limit": (0.02, 0.05)}, id="dt bounded on both sides"),
        pytest.param({"limit": (0.02, 0.05), "length": 1}, id="dt bounded, one position"),
        pytest.param({"bias": -12.0}, id="almost no decay"),
        pytest.param({"bias": -40.0}, id="dt below float32's epsilon"),
        pytest.param({"bias": 30.0, "a": 100.0}, id="each step forgets everything: exp underflows"),
        pytest.param(
            {"spread": 40.0, "a": 16.0}, id="strong decays among weak ones: the running sum is large"
        ),
        pytest.param({"dtype": torch.bfloat16}, id="bf16 inputs, float32 inside"),
    ],
)
def test_scan_is_the_recurrence(change: dict[str, Any]) -> None:
    given = inputs(**{**BASE, **change})
    before = given["state"].clone()
    y, state = scan(**given)
    expected_y, expected_state = recurrence(**given)
    assert y.dtype == state.dtype == torch.float32
    assert relative(y, expected_y) < TOLERANCE
    assert relative(state, expected_state) < TOLERANCE
    assert torch.equal(given["state"], before)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, 2 * CHUNK + 30), max_size=5))
def test_scan_may_be_cut_anywhere(cuts: list[int]) -> None:
    """Parts that pass the state on give the result of the whole, up to rounding."""
    whole = inputs(**{**BASE, "length": 2 * CHUNK + 31})
    y, state = scan(**whole)
    edges = sorted({0, *cuts, 2 * CHUNK + 31})
    parts, carried = [], whole["state"]
    for start, end in itertools.pairwise(edges):
        piece = {name: t[:, start:end] if name in ("x", "dt", "b", "c") else t for name, t in whole.items()}
        part, carried = scan(**{**piece, "state": carried})
        parts.append(part)
    assert relative(torch.cat(parts, 1), y) < TOLERANCE
    assert relative(carried, state) < TOLERANCE


@pytest.mark.parametrize("length", [1, 2, 3, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("biased", [True, False])
def test_convolution(length: int, kernel: int, biased: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, length, 5, generator=g), torch.randn(5, 1, kernel, generator=g)
    before, bias = torch.randn(2, 5, kernel - 1, generator=g), torch.randn(5, generator=g) if biased else None
    y, after = causal_conv(x, weight, bias, before)
    line = torch.cat([before, x.mT], 2).double()
    expected = torch.zeros(2, length, 5, dtype=torch.float64)
    for t in range(length):
        for j in range(kernel):
            expected[:, t] += line[:, :, t + j] * weight[:, 0, j].double()
    expected += 0 if bias is None else bias.double()
    expected *= 1 / (1 + torch.exp(-expected))
    assert relative(y, expected) < TOLERANCE
    assert torch.equal(after, line[:, :, length:].float())

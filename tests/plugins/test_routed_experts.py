"""RoutedExperts on the host: a token-by-token float64 sum as oracle, torch in the same dtype, the ONNX function, refusals."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from plugin_build import needs_compiler

from nemoquant.errors import EngineError
from nemoquant.formats import fp8, nvfp4
from nemoquant.graph import ops
from nemoquant.graph.dialects import Dialect, parts_of
from nemoquant.graph.tape import FLOAT
from nemoquant.ops.abi import DTYPES
from nemoquant.ops.library import Kernels

pytestmark = needs_compiler

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = {"bf16": 0, "w8a16": 1, "fp8": 2, "w4a16": 3, "nvfp4": 4}  # enum nemoquant_experts_format
WHOLE = ("bf16", "w8a16", "w4a16")  # inputs are not rounded
ROUNDED = ("fp8", "nvfp4")
POINTERS = {
    "weight": "{}", "codes": "{}", "block_scales": "{}_block_scales", "global_scale": "{}_global_scale", "input_scale": "{}_input_scale",
}  # fmt: skip
Array = NDArray[Any]
Arrays = dict[str, Array]


@dataclass(frozen=True)
class Case:
    """``among``: the experts that tokens choose of, all if empty; ``tile`` as in the C interface."""

    tokens: int = 9
    chosen: int = 3
    experts: int = 6
    input: int = 160
    width: int = 192
    dtype: str = "float32"
    tile: int = 0
    among: tuple[int, ...] = ()


BASE = Case()
ONE = Case(chosen=1, experts=1)
# Tiles are 8, 32 or 64 tokens of an expert and 64 or 256 rows; chunks 128 inputs. By their mean, 9 x 3 / 6 takes tiles of 8.
ROWS = {
    "the base": BASE,
    "one token": replace(BASE, tokens=1),
    "two tokens": replace(BASE, tokens=2),
    "one expert a token": replace(BASE, chosen=1),
    "every expert for every token": replace(BASE, chosen=6),
    "one expert of all": ONE,
    "experts without tokens, the first and the last among them": replace(BASE, chosen=2, among=(1, 3, 4)),
    "all tokens on one expert": replace(BASE, chosen=1, among=(4,)),
    "7 tokens an expert, tile 8": replace(ONE, tokens=7, tile=8),
    "8 tokens an expert, tile 8": replace(ONE, tokens=8, tile=8),
    "9 tokens an expert, tile 8": replace(ONE, tokens=9, tile=8),
    "three tiles of 8 and 5": replace(ONE, tokens=29, tile=8),
    "31 tokens an expert, tile 32": replace(ONE, tokens=31, tile=32),
    "32 tokens an expert, tile 32": replace(ONE, tokens=32, tile=32),
    "33 tokens an expert, tile 32": replace(ONE, tokens=33, tile=32),
    "three tiles of 32 and 5": replace(ONE, tokens=101, tile=32),
    "one token, tile 32": replace(BASE, tokens=1, tile=32),
    "63 tokens an expert, tile 64": replace(ONE, tokens=63, tile=64),
    "64 tokens an expert, tile 64": replace(ONE, tokens=64, tile=64),
    "65 tokens an expert, tile 64": replace(ONE, tokens=65, tile=64),
    "three tiles of 64 and 5": replace(ONE, tokens=197, tile=64),
    "several experts, tile 64": replace(BASE, tile=64),
    "tile 32 by the mean": replace(BASE, tokens=20),
    "tile 64 by the mean": replace(BASE, tokens=80, experts=4, input=64, width=64),
    "pairs of two sorting blocks": replace(BASE, tokens=200, input=32, width=32),
    "pairs of three sorting blocks, more experts than threads": replace(BASE, tokens=400, experts=600, input=32, width=32),
    "the least sizes": replace(BASE, input=32, width=32),
    "one chunk": replace(BASE, input=128, width=128),
    "one chunk and a piece": replace(BASE, input=160, width=160),
    "a chunk less a piece": replace(BASE, input=96, width=96),
    "rows of two wide blocks": replace(BASE, width=288, input=288, tile=32),
    "more chunks than are under way, shared by warps": replace(BASE, input=32, width=1184),
    "more chunks than are under way, up": replace(BASE, input=1184, width=32),
    "more chunks, wide": replace(BASE, input=32, width=672, tile=32),
}
DTYPE_ROWS = {
    f"{dtype}, {name}": replace(ROWS[name], dtype=dtype)
    for dtype in ("bfloat16", "float16")
    for name in ("the base", "one token", "several experts, tile 64", "33 tokens an expert, tile 32", "more chunks than are under way, shared by warps")
}  # fmt: skip


def aligned(values: Array) -> Array:
    """A copy that begins at a multiple of 16 bytes."""
    space = np.zeros(values.nbytes + 16, np.uint8)
    start = -space.ctypes.data % 16
    made = space[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    made[...] = values
    return made


@dataclass
class Given:
    """Arrays of a case: ``parts`` as the operator takes them, ``decoded`` float32 [E, out, in] by projection."""

    case: Case
    format: str
    x: Array
    ids: NDArray[np.int64]
    factors: NDArray[np.float32]
    parts: Arrays
    decoded: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def packed(format: str, weight: NDArray[np.float32], scale: np.float32) -> tuple[Arrays, NDArray[np.float32]]:
    """One expert's weight [out, in]: its parts, and the values that they stand for."""
    if format == "bf16":
        part = weight.astype(ml_dtypes.bfloat16)
        return {"weight": part}, part.astype(np.float32)
    if "8" in format:
        codes = fp8.encode(weight, scale)
        return {"codes": codes, "global_scale": scale}, fp8.decode(codes, scale)
    codes, blocks = nvfp4.encode(weight, scale)
    return {"codes": codes, "block_scales": blocks, "global_scale": scale}, nvfp4.decode(codes, blocks, scale)


def pack(given: Given, weights: dict[str, Array], scales: dict[str, Array], input_scales: dict[str, Array]) -> None:
    """Fill in parts and decoded weights."""
    for projection, stack in weights.items():
        made = [packed(given.format, w, s) for w, s in zip(stack, scales[projection], strict=True)]
        given.decoded[projection] = np.stack([values for _, values in made])
        for part in parts_of(given.format):
            one = input_scales[projection] if part == "input_scale" else np.stack([np.asarray(parts[part]) for parts, _ in made])
            given.parts[f"{projection}_{part}"] = aligned(one)


def choices(case: Case, g: np.random.Generator) -> NDArray[np.int64]:
    among = case.among or tuple(range(case.experts))
    return np.array([g.permutation(among)[: case.chosen] for _ in range(case.tokens)], np.int64)


def given(format: str, case: Case, seed: int = 0) -> Given:
    """Normal values; the hidden ones have about the spread of the input."""
    g = np.random.default_rng(seed)
    x = aligned(g.standard_normal((case.tokens, case.input)).astype(NUMPY[case.dtype]))
    ids, factors = aligned(choices(case, g)), aligned(g.random((case.tokens, case.chosen), np.float32))
    made = Given(case, format, x, ids, factors, {})
    weights = {
        "up": (g.standard_normal((case.experts, case.width, case.input)) / case.input**0.5).astype(np.float32),
        "down": (g.standard_normal((case.experts, case.input, case.width)) / case.width**0.5).astype(np.float32),
    }
    largest = {"bf16": 1.0, "w8a16": 448.0, "fp8": 448.0, "w4a16": 2688.0, "nvfp4": 2688.0}[format]
    scales = {p: (np.abs(w).max((1, 2)) / largest).astype(np.float32) for p, w in weights.items()}
    spread = np.linspace(0.8, 1.2, case.experts, dtype=np.float32)  # experts differ
    pack(made, weights, scales, {"up": spread * np.float32(5 / largest), "down": spread * np.float32(20 / largest)})
    return made


def arguments(a: Given, y: Array, workspace: Array | None = None) -> dict[str, Any]:
    case = a.case
    pointers = {POINTERS[name.split("_", 1)[1]].format(name.split("_")[0]): part.ctypes.data for name, part in a.parts.items()}
    return {
        "x": a.x.ctypes.data, "expert_ids": a.ids.ctypes.data, "expert_weights": a.factors.ctypes.data, "y": y.ctypes.data,
        "workspace": workspace.ctypes.data if workspace is not None else None, "tokens": case.tokens, "chosen": case.chosen,
        "experts": case.experts, "input": case.input, "width": case.width, "dtype": DTYPES[case.dtype], "format": FORMATS[a.format],
        "activation": 0, "tile": case.tile,
    } | pointers  # fmt: skip


def run(kernels: Kernels, a: Given) -> Array:
    """y; the workspace is full of NaN and has guard bytes behind it."""
    y = aligned(np.full(a.x.shape, 99, a.x.dtype))
    size = kernels.workspace("routed_experts", **arguments(a, y))
    workspace = aligned(np.full(size + 64, 0xFF, np.uint8))
    workspace[size:] = 0x5A
    kernels.call("routed_experts", **arguments(a, y, workspace))
    assert (workspace[size:] == 0x5A).all()
    return y


def round_trip(format: str, v: NDArray[np.float32], scale: np.float32) -> NDArray[np.float32]:
    """Rows [n, in] as the format has a product's inputs."""
    rows = np.ascontiguousarray(v)
    if format == "fp8":
        return fp8.decode(fp8.encode(rows, scale), scale)
    return nvfp4.decode(*nvfp4.encode_activations(rows, scale), scale)


def mixture(a: Given, *, nudge: float = 0.0) -> NDArray[np.float64]:
    """Expert by expert in float64; inputs that a format rounds, hidden ones too, are rounded from float32. ``nudge``: relative, of hidden."""
    y = np.zeros(a.x.shape)
    x = a.x.astype(np.float32)

    def rounded(projection: str, v: Array, expert: int) -> NDArray[np.float64]:
        if a.format in WHOLE:
            return v.astype(np.float64)
        return round_trip(a.format, v.astype(np.float32), a.parts[f"{projection}_input_scale"][expert]).astype(np.float64)

    for expert in range(a.case.experts):
        rows = (a.ids == expert).any(1)
        factor = np.where(a.ids == expert, a.factors, 0).astype(np.float64).sum(1, keepdims=True)[rows]
        up, down = (a.decoded[p][expert].astype(np.float64) for p in ("up", "down"))
        hidden = np.maximum(rounded("up", x[rows], expert) @ up.T, 0) ** 2 * (1 + nudge)
        y[rows] += factor * (rounded("down", hidden, expert) @ down.T)
    return y


def in_torch(a: Given) -> torch.Tensor:
    """The same by torch's products in the case's dtype, weights too, summed in float32."""
    dtype = TORCH[a.case.dtype]
    x = torch.from_numpy(a.x.astype(np.float32)).to(dtype)
    total = torch.zeros(a.x.shape)
    for expert in range(a.case.experts):
        for token, j in np.argwhere(a.ids == expert):
            up, down = (torch.from_numpy(a.decoded[p][expert]).to(dtype) for p in ("up", "down"))
            total[token] += float(a.factors[token, j]) * (down @ torch.relu(up @ x[token]).square()).float()
    return total.to(dtype)


def distance(got: Any, wanted: NDArray[np.float64]) -> float:
    """Norm of the difference over the norm."""
    return float(np.linalg.norm(np.asarray(got).astype(np.float64) - wanted) / np.linalg.norm(wanted))


# Values.


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("format", WHOLE)
def test_float32_with_whole_inputs(format: str, name: str, kernels: Kernels) -> None:
    """Inputs are three bfloat16, so that products are exact: within twice the error of torch in float32, or two of its roundings."""
    a = given(format, ROWS[name])
    exact = mixture(a)
    assert 0 < distance(run(kernels, a), exact) <= max(2 * distance(in_torch(a).numpy(), exact), 2.0**-23)


@pytest.mark.parametrize("name", DTYPE_ROWS)
@pytest.mark.parametrize("format", WHOLE)
def test_16_bits_with_whole_inputs(format: str, name: str, kernels: Kernels) -> None:
    """Hidden values of bfloat16 are rounded once, those of float16 not to speak of: less error than torch in that dtype.

    float16 within 2% of rounding the exact result once.
    """
    a = given(format, DTYPE_ROWS[name])
    exact = mixture(a)
    limit = distance(in_torch(a).float().numpy(), exact)
    if a.case.dtype == "float16":
        limit = min(limit, 1.02 * distance(exact.astype(np.float16), exact))
    assert 0 < distance(run(kernels, a).astype(np.float32), exact) <= limit


@pytest.mark.parametrize("name", [*ROWS, *DTYPE_ROWS])
@pytest.mark.parametrize("format", ROUNDED)
def test_rounded_inputs(format: str, name: str, kernels: Kernels) -> None:
    """Tokens whose hidden codes depend on a change of 1e-6 are counted and left out, a twentieth at most; the others agree.

    float32 to its own rounding, 16 bits to 2% more than rounding the exact result once.
    """
    a = given(format, (ROWS | DTYPE_ROWS)[name])
    exact = mixture(a)
    firm = np.ones(len(exact), bool)
    for nudge in (1e-6, -1e-6):
        firm &= (np.abs(mixture(a, nudge=nudge) - exact) < 1e-6 * np.abs(exact).max()).all(1)
    assert (~firm).sum() <= max(1, len(firm) // 20)
    y = run(kernels, a).astype(np.float64)
    assert np.isfinite(y).all()
    if firm.any():
        rounded = exact.astype(NUMPY[a.case.dtype]).astype(np.float64)
        limit = 1e-6 if a.case.dtype == "float32" else 1.02 * distance(rounded[firm], exact[firm])
        assert distance(y[firm], exact[firm]) <= limit

"""RoutedExperts in the host library: cases, their arrays, the call, and the same in float64."""

from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from nemoquant.formats import fp8, nvfp4
from nemoquant.graph.gemms import GEMMS
from nemoquant.ops.abi import DTYPES
from nemoquant.ops.library import Kernels
from support.packed_weights import packed
from support.scan_call import aligned

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = {"bf16": 0, "w8a16": 1, "fp8": 2, "w4a16": 3, "nvfp4": 4}  # enum nemoquant_experts_format
WHOLE = ("bf16", "w8a16", "w4a16")  # inputs are not rounded
AUTO, DECODED, NATIVE, GROUPED = range(4)  # enum nemoquant_experts_products
POINTERS = {
    "weight": "{}",
    "codes": "{}",
    "block_scales": "{}_block_scales",
    "global_scale": "{}_global_scale",
    "input_scale": "{}_input_scale",
}
Array = NDArray[Any]
Arrays = dict[str, Array]


@dataclass(frozen=True)
class Case:
    """``among``: the experts that tokens choose from, all if empty.

    ``tile`` and ``products`` as in the C interface.
    """

    tokens: int = 9
    chosen: int = 3
    experts: int = 6
    input: int = 160
    width: int = 192
    dtype: str = "float32"
    tile: int = 0
    products: int = AUTO
    among: tuple[int, ...] = ()


BASE = Case()
ONE = Case(chosen=1, experts=1)
# Tiles are 8, 32 or 64 tokens of an expert and 64 or 256 rows; chunks 128 inputs. The base's mean, 9 x 3 / 6,
# takes tiles of 8.
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
    "pairs of three sorting blocks, more experts than threads": replace(
        BASE, tokens=400, experts=600, input=32, width=32
    ),
    "the least sizes": replace(BASE, input=32, width=32),
    "one chunk": replace(BASE, input=128, width=128),
    "one chunk and a piece": replace(BASE, input=160, width=160),
    "a chunk less a piece": replace(BASE, input=96, width=96),
    "rows of two wide blocks": replace(BASE, width=288, input=288, tile=32),
    "more chunks than are under way, shared by warps": replace(BASE, input=32, width=1184),
    "more chunks than are under way, up": replace(BASE, input=1184, width=32),
    "more chunks, wide": replace(BASE, input=32, width=672, tile=32),
}
DTYPE_NAMES = (
    "the base",
    "one token",
    "several experts, tile 64",
    "33 tokens an expert, tile 32",
    "more chunks than are under way, shared by warps",
)
DTYPE_ROWS = {
    f"{dtype}, {name}": replace(ROWS[name], dtype=dtype)
    for dtype in ("bfloat16", "float16")
    for name in DTYPE_NAMES
}


def natively(case: Case) -> Case:
    """The case with FP4 products, which take no tile of 8."""
    return replace(case, products=NATIVE, tile=case.tile if case.tile != 8 else 32)


@dataclass
class Given:
    """Arrays of a case: ``parts`` as the operator takes them, and ``decoded`` weights by projection.

    Decoded weights are float32 [E, out, in].
    """

    case: Case
    format: str
    x: Array
    ids: NDArray[np.int64]
    factors: NDArray[np.float32]
    parts: Arrays
    decoded: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def pack(
    given: Given, weights: dict[str, Array], scales: dict[str, Array], input_scales: dict[str, Array]
) -> None:
    """Fills in parts and decoded weights."""
    for projection, stack in weights.items():
        made = [packed(given.format, w, s) for w, s in zip(stack, scales[projection], strict=True)]
        given.decoded[projection] = np.stack([values for _, values in made])
        for part in GEMMS[given.format].parts:
            one = (
                input_scales[projection]
                if part == "input_scale"
                else np.stack([np.asarray(parts[part]) for parts, _ in made])
            )
            given.parts[f"{projection}_{part}"] = aligned(one)


def choices(case: Case, g: np.random.Generator) -> NDArray[np.int64]:
    among = case.among or tuple(range(case.experts))
    return np.array([g.permutation(among)[: case.chosen] for _ in range(case.tokens)], np.int64)


def given(format: str, case: Case, seed: int = 0) -> Given:
    """Normal values; the hidden values have about the spread of the input."""
    g = np.random.default_rng(seed)
    x = aligned(g.standard_normal((case.tokens, case.input)).astype(NUMPY[case.dtype]))
    ids, factors = aligned(choices(case, g)), aligned(g.random((case.tokens, case.chosen), np.float32))
    made = Given(case, format, x, ids, factors, {})
    weights = {
        "up": (g.standard_normal((case.experts, case.width, case.input)) / case.input**0.5).astype(
            np.float32
        ),
        "down": (g.standard_normal((case.experts, case.input, case.width)) / case.width**0.5).astype(
            np.float32
        ),
    }
    largest = {"bf16": 1.0, "w8a16": 448.0, "fp8": 448.0, "w4a16": 2688.0, "nvfp4": 2688.0}[format]
    scales = {p: (np.abs(w).max((1, 2)) / largest).astype(np.float32) for p, w in weights.items()}
    spread = np.linspace(0.8, 1.2, case.experts, dtype=np.float32)  # experts differ
    pack(
        made,
        weights,
        scales,
        {"up": spread * np.float32(5 / largest), "down": spread * np.float32(20 / largest)},
    )
    return made


def arguments(a: Given, y: Array, workspace: Array | None = None) -> dict[str, Any]:
    case = a.case
    pointers = {
        POINTERS[name.split("_", 1)[1]].format(name.split("_")[0]): part.ctypes.data
        for name, part in a.parts.items()
    }
    return {
        "x": a.x.ctypes.data,
        "expert_ids": a.ids.ctypes.data,
        "expert_weights": a.factors.ctypes.data,
        "y": y.ctypes.data,
        "workspace": workspace.ctypes.data if workspace is not None else None,
        "tokens": case.tokens,
        "chosen": case.chosen,
        "experts": case.experts,
        "input": case.input,
        "width": case.width,
        "dtype": DTYPES[case.dtype],
        "format": FORMATS[a.format],
        "activation": 0,
        "tile": case.tile,
        "products": case.products,
    } | pointers


def run(kernels: Kernels, a: Given) -> Array:
    """Returns y; the workspace is full of NaN and has guard bytes after it."""
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
    """Expert by expert in float64; inputs that a format rounds, hidden ones too, are rounded from float32.

    ``nudge`` is a relative change of the hidden values.
    """
    y = np.zeros(a.x.shape)
    x = a.x.astype(np.float32)

    def rounded(projection: str, v: Array, expert: int) -> NDArray[np.float64]:
        if a.format in WHOLE:
            return v.astype(np.float64)
        return round_trip(
            a.format, v.astype(np.float32), a.parts[f"{projection}_input_scale"][expert]
        ).astype(np.float64)

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


def exact_numbers(format: str, case: Case) -> tuple[Given, Array]:
    """Small integers and powers of two, so that every sum is exact in any order; the result is in float64.

    The codes of both inputs are the formats' own. Inputs saturate, each expert has its own scales, and hidden
    values must be rounded. For 5 experts.
    """
    a = given(format, case)
    g = np.random.default_rng(2)
    whole = np.array([-2, -1, -1, 0, 0, 0, 1, 1, 2], np.float32)
    weights = {
        "up": g.choice(whole, (5, case.width, case.input)),
        "down": g.choice(whole, (5, case.input, case.width)),
    }
    powers = np.float32(2) ** np.arange(-2, 3, dtype=np.float32)
    unit = np.float32(1 if format == "fp8" else 1 / 256)
    pack(
        a, weights, dict.fromkeys(weights, powers), {"up": unit * powers[::-1] / 2, "down": unit * powers / 8}
    )
    a.x[:] = g.integers(-40, 41, a.x.shape) / 4
    a.factors[:] = g.choice(np.array([0.5, 1, 2], np.float32), a.factors.shape)
    exact = mixture(a)
    assert (exact == exact.astype(np.float32)).all(), "the test's own numbers must be exact"
    return a, exact


def replace_tokens(a: Given, tokens: list[int]) -> Given:
    """The same experts, with some of the tokens."""
    case = replace(a.case, tokens=len(tokens))
    return Given(
        case,
        a.format,
        aligned(a.x[tokens]),
        aligned(a.ids[tokens]),
        aligned(a.factors[tokens]),
        a.parts,
        a.decoded,
    )

"""RoutedExperts for the tests: inputs of a case, a call of the library, and what float64 says, decoded by ml_dtypes."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nemoquant.ops.abi import DTYPES
from nemoquant.ops.library import Kernels

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FORMATS = ("bf16", "fp8", "w8a16", "nvfp4", "w4a16")  # numbered so in abi.h
ROUNDED = ("fp8", "nvfp4")
BLOCKS = ("nvfp4", "w4a16")
Array = NDArray[Any]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """``ids``: "any" (distinct in a row), "one" (all tokens on one expert), "same" (one expert k times)."""

    tokens: int = 5
    top_k: int = 2
    experts: int = 4
    input: int = 64
    width: int = 96
    format: str = "bf16"
    dtype: str = "bfloat16"
    ids: str = "any"


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros at a multiple of 256 bytes."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    space = np.zeros(count + 256, np.uint8)
    start = -space.ctypes.data % 256
    return space[start : start + count].view(dtype).reshape(shape)


def placed(values: Array) -> Array:
    out = aligned(values.shape, values.dtype)
    out[...] = values
    return out


def unpack(codes: Array) -> Array:
    """Bytes [..., n] -> E2M1 codes [..., 2n], the even index in the low half."""
    return np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


class Experts:
    """Random weights of a case as they lie in memory. Each expert has scales of its own."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case, g = case, np.random.default_rng(seed)
        self.g = g
        self._decoded: dict[tuple[str, int], Doubles] = {}
        self.up = self._parts(case.width, case.input, 1.0)
        self.down = self._parts(case.input, case.width, 1.3)
        self.x = placed(g.standard_normal((case.tokens, case.input)).astype(NUMPY[case.dtype]))
        self.weights = placed(g.random((case.tokens, case.top_k), np.float32))
        if case.ids == "any":
            ids = np.argsort(g.random((case.tokens, case.experts)), 1)[:, : case.top_k]
        else:
            ids = np.full((case.tokens, case.top_k), case.experts - 1)
        self.ids = placed(ids.astype(np.int64))

    def _parts(self, out: int, size: int, range: float) -> dict[str, Array]:
        case, g = self.case, self.g
        if case.format == "bf16":
            return {"weight": placed((g.standard_normal((case.experts, out, size)) / np.sqrt(size)).astype(ml_dtypes.bfloat16))}
        parts: dict[str, Array] = {}
        if case.format in BLOCKS:
            parts["codes"] = placed(g.integers(0, 256, (case.experts, out, size // 2), np.uint8))
            scales = np.exp2(g.uniform(-9, 8.7, (case.experts, out, size // 16))) * (g.random((case.experts, out, size // 16)) < 0.98)
            parts["block_scales"] = placed(scales.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
            largest = 60.0
        else:
            codes = g.integers(0, 256, (case.experts, out, size), np.uint8)
            parts["codes"] = placed(np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8))  # NaN is no weight
            largest = 100.0
        parts["global_scale"] = placed((g.uniform(0.5, 2, case.experts) / largest / np.sqrt(size)).astype(np.float32))
        if case.format in ROUNDED:
            scale = g.uniform(3, 6, case.experts) * range / (448 if case.format == "fp8" else 448 * 6)
            parts["input_scale"] = placed(scale.astype(np.float32))
        return parts

    def arguments(self, y: Array, workspace: Array | None, **changes: Any) -> dict[str, Any]:
        case = self.case
        sizes = {"tokens": case.tokens, "top_k": case.top_k, "experts": case.experts, "input": case.input, "width": case.width}
        given = {
            "x": self.x, "expert_ids": self.ids, "expert_weights": self.weights, "y": y, "workspace": workspace, **sizes,
            "dtype": DTYPES[case.dtype], "format": FORMATS.index(case.format), "activation": 0,
        }  # fmt: skip
        for name, parts in (("up", self.up), ("down", self.down)):
            given[name] = parts["weight"] if "weight" in parts else parts["codes"]
            for part in ("block_scales", "global_scale", "input_scale"):
                if part in parts:
                    given[f"{name}_{part}"] = parts[part]
        given |= changes
        return {name: value.ctypes.data if isinstance(value, np.ndarray) else value for name, value in given.items()}

    def run(self, kernels: Kernels, **changes: Any) -> tuple[Array, Array]:
        """y, and the values of relu squared that down reads [parts, rows, width], positions ascending in (expert, token, j)."""
        case = self.case
        y = aligned((case.tokens, case.input), NUMPY[case.dtype])
        y[...] = 99
        size = kernels.workspace("routed_experts", **self.arguments(y, None, **changes))
        workspace = aligned((size + 256,), np.uint8)
        workspace[...] = 0xA5
        kernels.call("routed_experts", **self.arguments(y, workspace, **changes))
        assert (workspace[size:] == 0xA5).all(), "written behind the workspace"
        rows, start = case.tokens * case.top_k, -(-case.tokens * case.top_k * case.input * 4 // 256) * 256  # behind the sums
        parts = 1 if case.format in ROUNDED else {"bfloat16": 1, "float16": 2, "float32": 3}[case.dtype]
        hidden = workspace[start : start + parts * rows * case.width * 2].view(ml_dtypes.bfloat16)
        if case.format in BLOCKS:  # as E2M1 weights want them: 0 4 1 5 2 6 3 7
            hidden = hidden.reshape(-1, 4, 2).swapaxes(1, 2)
        return y, hidden.reshape(parts, rows, case.width)

    def order(self) -> tuple[Array, Array]:
        """Of the positions: indices into the flat ids, and their experts."""
        order = np.argsort(self.ids.ravel(), kind="stable")
        return order, self.ids.ravel()[order]

    def decoded(self, name: str, expert: int) -> Doubles:
        """[out, in], exact; kept, since a weight is asked for by every token of its expert."""
        if (name, expert) not in self._decoded:
            self._decoded[name, expert] = self._decode(name, expert)
        return self._decoded[name, expert]

    def _decode(self, name: str, expert: int) -> Doubles:
        parts = {key: value[expert] for key, value in getattr(self, name).items()}
        if "weight" in parts:
            return np.asarray(parts["weight"], np.float64)
        if "block_scales" in parts:
            scales = parts["block_scales"].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
            return E2M1[unpack(parts["codes"])] * np.repeat(scales, 16, 1) * np.float64(parts["global_scale"])
        return parts["codes"].view(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.float64(parts["global_scale"])


def e4m3(values: Array) -> Doubles:
    """To the nearest E4M3, beyond 448 to 448."""
    return np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def rounded(x: Array, format: str, scale: np.float32, block_factor: float = 1.0, factor: float = 1.0) -> Doubles:
    """x [.., n] as its format has it, in units of ``scale``: divisions in float32. The factors move what is rounded."""
    x = np.asarray(x, np.float64)
    if format == "fp8":
        return e4m3((x * factor).astype(np.float32) / scale)
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    amax = (np.abs(blocks).max(-1, keepdims=True) * block_factor).astype(np.float32)
    block = e4m3(amax / (np.float32(6) * scale))
    d = block.astype(np.float32) * scale
    quotient = (blocks * factor).astype(np.float32) / np.where(d == 0, np.float32(1), d)
    codes = np.clip(quotient, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return np.asarray((codes * block).reshape(x.shape))


def hidden_exact(a: Experts, i: int, expert: int) -> Doubles:
    """relu squared of the token of the flat id ``i``, its input rounded by the format."""
    x = np.asarray(a.x[i // a.case.top_k], np.float64)
    if a.case.format in ROUNDED:
        scale = a.up["input_scale"][expert]
        x = rounded(x, a.case.format, scale) * np.float64(scale)
    return np.maximum(a.decoded("up", expert) @ x, 0) ** 2


def down_exact(a: Experts, hidden: Doubles) -> Doubles:
    """y of given inputs of down [rows, width]: in float64, by expert and token."""
    y = np.zeros((a.case.tokens, a.case.input))
    for position, (i, expert) in enumerate(zip(*a.order(), strict=True)):
        scale = np.float64(a.down["input_scale"][expert]) if a.case.format in ROUNDED else 1.0
        y[i // a.case.top_k] += np.float64(a.weights.ravel()[i]) * (a.decoded("down", expert) @ (hidden[position] * scale))
    return y

"""Mamba2Scan in the host library from numpy arrays, and the same in float64."""

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nemoquant.ops.abi import structure

Array = NDArray[Any]
Arrays = dict[str, Array]

CODES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}
DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
GUARD = 64  # bytes around each output and the workspace that must not be written


Args: Any = structure("mamba2_scan")


class Guarded:
    """Memory full of 0xff, aligned to 16, with guards before and after."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.raw = np.full(size + 2 * GUARD + 16, 0xFF, np.uint8)
        self.start = GUARD + (-(self.raw.ctypes.data + GUARD) % 16)
        self.array: Array = self.raw[self.start : self.start + size].view(dtype).reshape(shape)

    def check(self) -> None:
        assert (self.raw[: self.start] == 0xFF).all()
        assert (self.raw[self.start + self.array.nbytes :] == 0xFF).all()


class Refused(Exception):
    """The launcher's reason; ``code`` is one of those in plugins/common/abi.h."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def aligned(array: Array) -> Array:
    """A copy, aligned to 16 bytes."""
    kept = Guarded(array.shape, array.dtype)
    kept.array[...] = array
    return kept.array


class Scan:
    """The operator through its C interface."""

    def __init__(self, library: Path) -> None:
        self.path = library
        self.library = ctypes.CDLL(str(library))
        self.library.nemoquant_last_error.restype = ctypes.c_char_p
        self.library.nemoquant_mamba2_scan_workspace.restype = ctypes.c_size_t

    def workspace(self, **sizes: int) -> int:
        return int(self.library.nemoquant_mamba2_scan_workspace(ctypes.byref(Args(**sizes))))

    def __call__(
        self,
        given: Mapping[str, Array],
        *,
        y_dtype: str = "float32",
        state_dtype: str = "",
        low: float = 0.0,
        high: float = np.inf,
        seed: int | None = None,
        step: int = 0,
        rounds: int = 5,
        segments: int = 0,
        in_place: bool = False,
        fields: Mapping[str, Any] | None = None,
    ) -> tuple[Array, Array]:
        """x, b and c may be views with strides between positions; ``fields`` replaces arguments at the end.

        Raises:
            Refused: the launcher returned an error; no output was written then.
        """
        batch, length, heads, width = given["x"].shape
        groups, size = given["b"].shape[2:]
        kept = {
            name: value if name in ("x", "b", "c", "dt") else aligned(value) for name, value in given.items()
        }
        state_type = DTYPES[state_dtype] if state_dtype else given["state_in"].dtype
        y, state = (
            Guarded((batch, length, heads, width), DTYPES[y_dtype]),
            Guarded((batch, heads, width, size), state_type),
        )
        if in_place:
            state.array[...] = given["state_in"]
        args = Args(
            batch=batch,
            length=length,
            heads=heads,
            head_dim=width,
            groups=groups,
            state=size,
            dt_min=low,
            dt_max=high,
            step=step,
            philox_rounds=rounds,
            segments=segments,
            rounding=int(seed is not None),
        )
        for name, value in kept.items():
            setattr(args, name, value.ctypes.data)
        for name in ("x", "b", "c", "dt"):
            item = kept[name].itemsize
            assert kept[name].strides[2:] == np.empty(kept[name].shape[2:], kept[name].dtype).strides
            for axis, which in enumerate(("batch", "position")):
                setattr(args, f"{name}_{which}_stride", kept[name].strides[axis] // item)
        args.y, args.state_out = y.array.ctypes.data, state.array.ctypes.data
        if in_place:
            args.state_in = args.state_out
        args.dtype, args.dt_dtype = CODES[given["x"].dtype], CODES[given["dt"].dtype]
        args.y_dtype, args.state_dtype = CODES[y.array.dtype], CODES[state.array.dtype]
        seeds = np.array([seed or 0], np.int64)
        args.seed = seeds.ctypes.data if seed is not None else None
        workspace = Guarded(
            (int(self.library.nemoquant_mamba2_scan_workspace(ctypes.byref(args))),), np.uint8
        )
        args.workspace = workspace.array.ctypes.data if workspace.array.size else None
        for name, value in (fields or {}).items():
            setattr(args, name, value)
        code = self.library.nemoquant_mamba2_scan(ctypes.byref(args), None)
        for memory in (y, state, workspace):
            memory.check()
        if code:
            assert (y.array.view(np.uint8) == 0xFF).all()
            raise Refused(code, self.library.nemoquant_last_error().decode())
        return y.array, state.array


def inputs(
    batch: int = 2,
    length: int = 73,
    heads: int = 4,
    width: int = 64,
    groups: int = 2,
    size: int = 128,
    *,
    state: float = 1.0,
    bias: float = -3.0,
    spread: float = 1.0,
    a: float = 8.0,
    decays: str = "random",
    dtype: str = "float32",
    dt_dtype: str = "float32",
    state_dtype: str = "float32",
    scale: float = 1.0,
    skip: float = 1.0,
    seed: int = 0,
) -> Arrays:
    """Random inputs, already rounded to their dtypes."""
    g = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return g.standard_normal(shape).astype(np.float32)

    made = {
        "x": normal(batch, length, heads, width) * np.float32(scale),
        "dt": normal(batch, length, heads) * np.float32(spread),
        "a": -g.random(heads, np.float32) * np.float32(a) - np.float32(0.01),
        "b": normal(batch, length, groups, size),
        "c": normal(batch, length, groups, size),
        "d": normal(heads) * np.float32(skip),
        "dt_bias": normal(heads) + np.float32(bias),
        "state_in": normal(batch, heads, width, size) * np.float32(state),
    }
    if (
        decays == "strong, then weak"
    ):  # dt * A about -100 at every seventh position, about -0.01 at the others
        made["a"][:], made["dt_bias"][:] = -8.0, 0.0
        made["dt"] = np.log(np.expm1(0.00125 * (0.5 + g.random(made["dt"].shape)))).astype(np.float32)
        made["dt"][:, 3::7] = 12.5
    if decays == "very strong among weak":  # -10000 at every second position, -0.01 at the others
        made["a"][:], made["dt_bias"][:] = -800.0, 0.0
        made["dt"] = np.log(np.expm1(0.0000125 * (0.5 + g.random(made["dt"].shape)))).astype(np.float32)
        made["dt"][:, ::2] = 12.5
    for name in ("x", "b", "c"):
        made[name] = made[name].astype(DTYPES[dtype])
    made["dt"], made["state_in"] = (
        made["dt"].astype(DTYPES[dt_dtype]),
        made["state_in"].astype(DTYPES[state_dtype]),
    )
    return {name: aligned(value) for name, value in made.items()}


def recurrence(given: Mapping[str, Array], low: float = 0.0, high: float = np.inf) -> tuple[Array, Array]:
    """The definition, position by position, in float64."""
    x, dt, a, b, c, d, bias, state = (
        given[name].astype(np.float64) for name in ("x", "dt", "a", "b", "c", "d", "dt_bias", "state_in")
    )
    dt = np.clip(np.logaddexp(0, dt + bias), low, high)
    share = x.shape[2] // b.shape[2]
    b, c = np.repeat(b, share, 2), np.repeat(c, share, 2)
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        written = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        state = np.exp(dt[:, t] * a)[..., None, None] * state + written
        y[:, t] = (state * c[:, t, :, None]).sum(-1) + d[:, None] * x[:, t]
    return y, state


def pieces(given: Mapping[str, Array], part: slice) -> Arrays:
    """The inputs of some positions."""
    return {name: value[:, part] if name in ("x", "dt", "b", "c") else value for name, value in given.items()}

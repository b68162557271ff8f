"""What the kernels share: how they are compiled, float32 to bits and back, and checks of arguments.

A weight enters every kernel as bit patterns and a shift: ``bits << shift`` are the bits of the float32 value,
with shift 16 for bf16 (uint16) and 0 for float32 (uint32). So one kernel serves both, and no float copy of a
tensor is made.

A trap of numba when you edit a kernel: uint32 (op) uint32 and float32 (op) Python number are 64 bits wide. So
every constant has its own ``np.float32(...)`` or ``np.uint32(...)``, and every integer result is cast back.
Otherwise results are no longer fp32, and loops no longer become vectors.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from nemoquant.formats.kernel_cache import keep

Codes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]
Weight: TypeAlias = NDArray[np.uint16] | NDArray[np.float32]

SMALLEST_NORMAL = np.float32(2.0**-126)

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile for the CPU: no GIL, sums in their order, and x / 0 is Inf or NaN as in numpy.

    A check for division by zero would keep loops from becoming vectors.
    """
    return cast(F, keep(numba.njit(nogil=True, fastmath=False, error_model="numpy")(function)))


def contracted_kernel(function: F) -> F:
    """Like ``kernel``, but ``a * b + c`` may be rounded once: for numbers that only have to meet a bound."""
    return cast(F, keep(numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy")(function)))


@kernel
def float_of(bits: np.uint32) -> np.float32:
    return np.uint32(bits).view(np.float32)


@kernel
def bits_of(value: np.float32) -> np.uint32:
    return np.float32(value).view(np.uint32)


@kernel
def widen(bits: np.unsignedinteger, shift: np.uint32) -> np.float32:
    """The float32 value of one element of a weight."""
    return float_of(np.uint32(np.uint32(bits) << shift))


def weight_bits(weight: Weight) -> tuple[NDArray[np.unsignedinteger], np.uint32]:
    """A weight [out, in] as flat bit patterns and the shift that makes float32 of them; a view, read-only.

    Always read-only: numba would compile another version of each kernel for writable arrays, and not every
    weight is writable. Raises ValueError for a wrong dtype or layout.
    """
    if weight.ndim != 2 or not weight.flags.c_contiguous:
        layout = "C-contiguous" if weight.flags.c_contiguous else "strided"
        raise ValueError(
            f"weight: got a {layout} array of shape {weight.shape}, expected a C-contiguous [out, in]"
        )
    bits: NDArray[np.unsignedinteger]
    if weight.dtype == np.uint16:
        bits, shift = weight.view(np.uint16), np.uint32(16)
    elif weight.dtype == np.float32:
        bits, shift = weight.view(np.uint32), np.uint32(0)
    else:
        raise ValueError(f"weight: got dtype {weight.dtype}, expected uint16 (bf16 bit patterns) or float32")
    bits = bits.reshape(-1)
    bits.flags.writeable = False
    return bits, shift


def flat(array: NDArray[Any], dtype: type[np.generic], name: str) -> NDArray[Any]:
    """The array as one read-only row, copied only if it is strided.

    Raises ValueError for a dtype other than ``dtype``.
    """
    if array.dtype != dtype:
        raise ValueError(f"{name}: got dtype {array.dtype}, expected {np.dtype(dtype)}")
    row = np.ascontiguousarray(array).reshape(-1).view()
    row.flags.writeable = False
    return row


def output(out: Codes | None, shape: tuple[int, ...], name: str) -> Codes:
    """The caller's buffer for codes if it fits, else a new one."""
    return np.empty(shape, np.uint8) if out is None else _fitting(out, shape, np.uint8, name)


def block_outputs(
    shape: tuple[int, ...], out: tuple[Codes, Codes] | None, *, block: int, bits: int, name: str
) -> tuple[Codes, Codes]:
    """Buffers for a tensor [out, in]: codes of ``bits`` bits, and a byte for each ``block`` of inputs.

    Raises ValueError for an input dimension that the block does not divide; ``name`` is what the codes are
    called in messages.
    """
    rows, columns = shape
    if columns % block:
        raise ValueError(
            f"weight: got shape {tuple(shape)}, expected an input dimension (the last) that {block} divides"
        )
    codes, block_scales = out if out is not None else (None, None)
    return (
        output(codes, (rows, columns * bits // 8), f"out[0] ({name})"),
        output(block_scales, (rows, columns // block), "out[1] (block scales)"),
    )


def float_output(out: Floats | None, shape: tuple[int, ...]) -> Floats:
    """The caller's buffer for decoded values if it fits, else a new one."""
    return np.empty(shape, np.float32) if out is None else _fitting(out, shape, np.float32, "out")


def _fitting(out: NDArray[Any], shape: tuple[int, ...], dtype: type[np.generic], name: str) -> NDArray[Any]:
    if out.shape != shape or out.dtype != dtype or not (out.flags.c_contiguous and out.flags.writeable):
        expected = f"a writable C-contiguous {np.dtype(dtype)} of shape {shape}"
        raise ValueError(f"{name}: got {out.dtype} of shape {out.shape}, expected {expected}")
    return out


def checked_amax(amax: float | np.float32) -> np.float32:
    """A largest magnitude as fp32.

    Raises ValueError where it is negative, Inf or NaN: those are errors of the checkpoint, which must be
    reported before any scale is computed.
    """
    value = np.float32(amax)
    if not (np.isfinite(value) and value >= 0):
        raise ValueError(
            f"amax: got {value}, expected a finite number that is not negative; check weights for NaN and "
            f"Inf first"
        )
    return value


def tensor_scale(amax: float | np.float32, largest: float) -> tuple[np.float32, bool]:
    """``amax / largest`` in fp32, and whether it is degenerate: not a normal fp32 number.

    A degenerate scale is replaced by 1.0. Raises ValueError like :func:`checked_amax`.
    """
    scale = np.float32(checked_amax(amax) / np.float32(largest))
    degenerate = bool(scale < SMALLEST_NORMAL)
    return (np.float32(1.0) if degenerate else scale), degenerate


def checked_scale(decode_scale: float | np.float32, name: str) -> np.float32:
    """A scale per tensor as fp32; ValueError unless it is a positive finite number."""
    scale = np.float32(decode_scale)
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"{name}: got {scale}, expected a positive finite number")
    return scale

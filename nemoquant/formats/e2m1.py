"""E2M1: four bits, sign 1, exponent 2 (bias 1), mantissa 1.

It is ``float4_e2m1`` of the OCP MX formats and ``FLOAT4E2M1`` of ONNX. Values by code 0 to 7: 0, 0.5, 1, 1.5,
2, 3, 4, 6; bit 3 is the sign. No infinity, no NaN. Source: OCP Microscaling Formats (MX) v1.0, 5.3.3.

The sign bit is (value < 0), as in Model Optimizer: -0.0 gives 0x0, and a negative value that rounds to zero
gives 0x8.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoquant.formats.rounding import Codes, Floats, bits_of, flat, kernel

MAX = 6.0

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES: Floats = np.array([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], np.float32)
VALUES.flags.writeable = False


@kernel
def encode_one(value: np.float32) -> np.uint8:
    """The code of one finite float32: nearest, ties to the even code; magnitudes above 6 become 6.

    Adding 2^22, 2^23 or 2^24 makes the float32 addition itself round to a multiple of 0.5, 1 or 2, ties to
    even. The lowest bits of the sum count these multiples. The code is this count, plus 2 for magnitudes from
    2 on, or plus 4 (= 8 / 2) from 4 on.
    """
    magnitude = abs(value)
    if not magnitude < np.float32(6):
        magnitude = np.float32(6)
    anchor = np.float32(4194304)
    if magnitude >= np.float32(2):
        anchor = np.float32(8388608 + 2)
    if magnitude >= np.float32(4):
        anchor = np.float32(16777216 + 8)
    code = np.uint32(bits_of(np.float32(magnitude + anchor)) & np.uint32(7))
    sign = np.uint32(8) if value < np.float32(0) else np.uint32(0)
    return np.uint8(np.uint32(code | sign))


@kernel
def nearest(magnitude: np.float32) -> np.float32:
    """The E2M1 value nearest to a non-negative float32: ``VALUES[encode_one(magnitude)]``, no table."""
    if not magnitude < np.float32(6):
        magnitude = np.float32(6)
    anchor = np.float32(4194304)
    if magnitude >= np.float32(2):
        anchor = np.float32(8388608)
    if magnitude >= np.float32(4):
        anchor = np.float32(16777216)
    return np.float32(np.float32(magnitude + anchor) - anchor)


@kernel
def value_bits(code: np.uint32) -> np.uint32:
    """The float32 bits of ``VALUES[code]``, without the table.

    A table would keep a loop from becoming vectors. Subnormal numbers are avoided: they are slow on some
    CPUs.
    """
    magnitude = np.uint32(code & np.uint32(7))
    bits = np.uint32(np.uint32(magnitude << np.uint32(22)) + np.uint32(126 << 23))
    if magnitude < np.uint32(2):
        bits = np.uint32(0x3F000000) if magnitude == np.uint32(1) else np.uint32(0)
    return np.uint32(bits | np.uint32(np.uint32(code & np.uint32(8)) << np.uint32(28)))


@kernel
def _encode(values: Floats, codes: Codes) -> None:
    for i in range(values.shape[0]):
        codes[i] = encode_one(values[i])


@kernel
def pack_pairs(codes: Codes, packed: Codes) -> None:
    """Flat codes [2n] -> flat bytes [n]; codes at even indices go to the low nibble."""
    for i in range(packed.shape[0]):
        packed[i] = np.uint8(codes[2 * i] | np.uint8(codes[2 * i + 1] << np.uint8(4)))


def encode(values: Floats) -> Codes:
    """float32 of any shape -> uint8 codes 0 to 15 of that shape: nearest, ties to the even code.

    Magnitudes above 6, Inf too, become 6; the code of NaN is not defined. Raises ValueError for another
    dtype.
    """
    codes = np.empty(values.shape, np.uint8)
    _encode(flat(values, np.float32, "values"), codes.reshape(-1))
    return codes


def decode(codes: NDArray[Any]) -> Floats:
    """uint8 codes 0 to 15 of any shape -> float32 of that shape, exact.

    Raises ValueError for another dtype or a larger code.
    """
    if codes.dtype != np.uint8:
        raise ValueError(f"codes: got dtype {codes.dtype}, expected uint8")
    if codes.size and codes.max() > 15:
        raise ValueError(f"codes: got {codes.max()}, expected 0 to 15 (packed codes are for unpack)")
    values: Floats = VALUES[codes]
    return values


def pack(codes: Codes) -> Codes:
    """uint8 codes [..., 2n] -> bytes [..., n], codes at even indices in the low nibble.

    Raises ValueError for another dtype, an odd last dimension, or a code above 15.
    """
    row = flat(codes, np.uint8, "codes")
    if codes.ndim == 0 or codes.shape[-1] % 2:
        raise ValueError(f"codes: got shape {codes.shape}, expected an even last dimension")
    if row.size and row.max() > 15:
        raise ValueError(f"codes: got {row.max()}, expected 0 to 15")
    packed = np.empty((*codes.shape[:-1], codes.shape[-1] // 2), np.uint8)
    pack_pairs(row, packed.reshape(-1))
    return packed


def unpack(packed: Codes) -> Codes:
    """Bytes [..., n] -> uint8 codes 0 to 15 [..., 2n]; the inverse of ``pack``.

    Raises ValueError for another dtype or a scalar.
    """
    row = flat(packed, np.uint8, "packed")
    if packed.ndim == 0:
        raise ValueError("packed: got a scalar, expected at least one dimension")
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    pairs = codes.reshape(-1, 2)
    np.bitwise_and(row, 15, out=pairs[:, 0])
    np.right_shift(row, 4, out=pairs[:, 1])
    return codes

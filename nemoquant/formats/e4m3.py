"""E4M3: eight bits, sign 1, exponent 4 (bias 7), mantissa 3.

It is ``float8_e4m3fn`` of torch and ``F8_E4M3`` of safetensors. No infinity; 0x7F and 0xFF are NaN; largest
448; smallest normal 2^-6; subnormals are the multiples of 2^-9. Source: Micikevicius et al., "FP8 formats for
deep learning", 2022 (arXiv 2209.05433), table 1.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoquant.formats.rounding import Codes, Floats, bits_of, flat, float_of, kernel

MAX = 448.0
SMALLEST = 2.0**-9
ONE = 0x38
LARGEST_CODE = 0x7E


def _value(code: int) -> float:
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return math.copysign(math.nan, sign)
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


VALUES: Floats = np.array([_value(code) for code in range(256)], np.float32)
VALUES.flags.writeable = False


@kernel
def encode_one(value: np.float32) -> np.uint8:
    """The code of one float32: nearest, ties to even, the sign always kept.

    Magnitudes above 448, Inf too, become 448; NaN becomes NaN.
    """
    bits = bits_of(value)
    sign = np.uint32(np.uint32(bits >> np.uint32(24)) & np.uint32(0x80))
    magnitude_bits = np.uint32(bits & np.uint32(0x7FFFFFFF))
    magnitude = float_of(magnitude_bits)
    if not magnitude < np.float32(448):
        magnitude = np.float32(448)
    kept = bits_of(magnitude)
    # Normal: round off the lower 20 of 23 mantissa bits. The number added is half of their range, less one
    # where the kept part is even: ties go to even. A carry out of the mantissa correctly raises the exponent.
    # Then the exponent's bias changes from 127 to 7.
    odd = np.uint32(np.uint32(kept >> np.uint32(20)) & np.uint32(1))
    normal = np.uint32(np.uint32(np.uint32(kept + np.uint32(0x7FFFF)) + odd) >> np.uint32(20)) - np.uint32(
        (127 - 7) << 3
    )
    # Subnormal: just above 2^14 the spacing of float32 is 2^-9, so the addition itself rounds.
    subnormal = bits_of(np.float32(magnitude + np.float32(16384))) - np.uint32(0x46800000)
    code = np.uint32(subnormal) if magnitude < np.float32(0.015625) else np.uint32(normal)
    if magnitude_bits > np.uint32(0x7F800000):
        code = np.uint32(0x7F)
    return np.uint8(np.uint32(code | sign))


@kernel
def value_of(code: np.uint8) -> np.float32:
    """``VALUES[code]`` without the table.

    A table would keep a loop from becoming vectors. Subnormal numbers are avoided: they are slow on some
    CPUs.
    """
    magnitude = np.uint32(np.uint32(code) & np.uint32(0x7F))
    value = float_of(np.uint32(np.uint32(magnitude << np.uint32(20)) + np.uint32((127 - 7) << 23)))
    if magnitude < np.uint32(8):
        value = np.float32(np.float32(np.int32(magnitude)) * np.float32(0.001953125))
    if magnitude == np.uint32(0x7F):
        value = np.float32(np.nan)
    return float_of(
        np.uint32(bits_of(value) | np.uint32(np.uint32(np.uint32(code) & np.uint32(0x80)) << np.uint32(24)))
    )


@kernel
def _encode(values: Floats, codes: Codes) -> None:
    for i in range(values.shape[0]):
        codes[i] = encode_one(values[i])


def encode(values: Floats) -> Codes:
    """float32 of any shape -> uint8 codes of that shape: nearest, ties to even, saturated at 448.

    NaN gives 0x7F | sign, -0.0 gives 0x80. Raises ValueError for another dtype.
    """
    codes = np.empty(values.shape, np.uint8)
    _encode(flat(values, np.float32, "values"), codes.reshape(-1))
    return codes


def decode(codes: NDArray[Any]) -> Floats:
    """uint8 codes of any shape -> float32 of that shape, exact; 0x7F and 0xFF are NaN.

    Raises ValueError for another dtype.
    """
    if codes.dtype != np.uint8:
        raise ValueError(f"codes: got dtype {codes.dtype}, expected uint8")
    values: Floats = VALUES[codes]
    return values

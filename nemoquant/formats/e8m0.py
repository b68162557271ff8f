"""E8M0: eight bits of exponent (bias 127), no sign, no mantissa: powers of two from 2^-127 to 2^127.

It is ``float8_e8m0fnu`` of torch, and in safetensors often plain ``U8``. 0xFF is NaN; there is no zero and no
infinity. Source: OCP Microscaling Formats (MX) v1.0, 5.4.1.
"""

import numpy as np

from nemoquant.formats.rounding import Floats, kernel

NAN = 0xFF

VALUES: Floats = np.array([2.0 ** (code - 127) for code in range(NAN)] + [np.nan], np.float32)
VALUES.flags.writeable = False


@kernel
def ceil_code(bits: np.uint32) -> np.uint8:
    """The code of the smallest power of two that is not below a float32 with these bits, sign bit clear.

    2^-127 also for zero and what is below, 2^127 also for what is above, and Inf; NaN for NaN.
    """
    code = np.uint32(np.uint32(bits + np.uint32(0x7FFFFF)) >> np.uint32(23))
    if bits <= np.uint32(0x400000):  # 2^-127 is subnormal
        code = np.uint32(0)
    if code > np.uint32(254):
        code = np.uint32(254)
    if bits > np.uint32(0x7F800000):
        code = np.uint32(NAN)
    return np.uint8(code)


@kernel
def value_bits(code: np.uint32) -> np.uint32:
    """The float32 bits of ``VALUES[code]``, without the table.

    A table would keep a loop from becoming vectors.
    """
    bits = np.uint32(code << np.uint32(23))
    if code == np.uint32(0):
        bits = np.uint32(0x400000)
    if code == np.uint32(NAN):
        bits = np.uint32(0x7FC00000)
    return bits

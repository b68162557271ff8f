"""What all NVFP4 encodings share: block scales and codes, a tile of blocks at a time.

Each step runs over the whole tile in one loop that becomes vectors, with scratch memory that stays in the
first-level cache.

Codes are computed without a division. ``e2m1(w / d)`` grows with |w|, so a code is a count: how many of the
seven codes above 0 does |w| reach? The least magnitude that reaches a code follows from d alone, and a tensor
has only 126 different d (``thresholds``). Bit patterns of magnitudes keep their order, so the comparison is
one of integers, of 16 bits for bf16.
"""

import numpy as np

from nemoquant.formats import e2m1, e4m3
from nemoquant.formats.blocks import Bits
from nemoquant.formats.rounding import Codes, Floats, bits_of, float_of, kernel, widen

BLOCK = 16
TILE = 64  # blocks

_E4M3 = e4m3.VALUES
# By code: the midpoint between its value and that of the code below.
_MIDPOINTS: Floats = np.array([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
_encode_e2m1 = e2m1.encode_one
_encode_e4m3 = e4m3.encode_one
_INFINITY = np.uint32(0x7F800000)


@kernel
def _reaches(bits: np.uint32, scale: np.float32, code: int) -> bool:
    """Whether the magnitude with these bits has at least this code.

    For code 0: whether its quotient is not zero, so that a sign would count.
    """
    quotient = np.float32(float_of(bits) / scale)
    return bool(quotient > np.float32(0)) if code == 0 else bool(_encode_e2m1(quotient) >= np.uint8(code))


@kernel
def _least_reaching(scale: np.float32, code: int) -> np.uint32:
    """The bits of the smallest float32 that ``_reaches`` the code, by bisection.

    Those of Inf if no finite one does.
    """
    low, high = np.uint32(0), _INFINITY  # low never reaches: 0 / scale is 0
    guess = bits_of(np.float32(_MIDPOINTS[code] * scale))
    # Start with a narrow interval around the midpoint, if the result is inside.
    if np.uint32(8) < guess < np.uint32(_INFINITY - np.uint32(8)):
        near, far = np.uint32(guess - np.uint32(4)), np.uint32(guess + np.uint32(4))
        if not _reaches(near, scale, code):
            low = near
        if _reaches(far, scale, code):
            high = far
    elif code == 0 and _reaches(np.uint32(1), scale, code):
        return np.uint32(1)
    while np.uint32(high - low) > np.uint32(1):
        middle = np.uint32(low + np.uint32(np.uint32(high - low) >> np.uint32(1)))
        if _reaches(middle, scale, code):
            high = middle
        else:
            low = middle
    return high


@kernel
def thresholds(shift: np.uint32, global_scale: np.float32, reached: Bits) -> None:
    """``reached[s, c]`` = the pattern of the least magnitude that has code c or more under block scale s.

    [128, 8], patterns of the weight's type and of its dtype. Column 0 has the sign bit: it is the least
    pattern of a negative value whose sign counts (a quotient may underflow to zero). A pattern above all
    finite ones means "never", as in row 0, where the scale is 0.
    """
    part = reached.dtype.type
    sign = np.uint64(1) << np.uint64(31 - shift)
    below_one = np.uint64((np.uint64(1) << np.uint64(shift)) - np.uint64(1))  # rounds patterns up
    for s in range(reached.shape[0]):
        scale = np.float32(_E4M3[s] * global_scale)
        for code in range(8):
            least = np.uint64(_least_reaching(scale, code) if s > 0 else _INFINITY)
            pattern = np.uint64(np.uint64(least + below_one) >> np.uint64(shift))
            reached[s, code] = part(pattern + sign if code == 0 else pattern)


@kernel
def scale_codes(
    magnitudes: Bits,
    shift: np.uint32,
    factor: np.float32,
    onto: np.float32,
    least: np.float32,
    zeros: np.uint8,
    codes: Codes,
) -> None:
    """``codes[b]`` = E4M3 of ``max(amax / onto, least)``; ``zeros`` where block b is all zeros.

    amax is ``factor`` times the block's largest magnitude. With ``onto`` = 6 global scales, amax becomes 6.
    """
    for b in range(magnitudes.shape[0]):
        scale = np.float32(np.float32(widen(magnitudes[b], shift) * factor) / onto)
        if scale < least:  # false for NaN
            scale = least
        code = np.uint8(_encode_e4m3(scale))
        codes[b] = code if magnitudes[b] != 0 else zeros


@kernel
def write_codes(
    bits: Bits, scale_codes: Codes, reached: Bits, words: Bits, scratch: Bits, packed: Codes
) -> None:
    """``packed[b]`` = the codes of block b, two per byte.

    Args:
        bits: [n, 16], patterns of the weight.
        scale_codes: [n], the block scales.
        reached: from ``thresholds``.
        words, scratch: [8 n] of words, and the same memory as [16 n] of the bits' dtype.
        packed: [n, 8], or flat [8 n].
    """
    part, word = scratch.dtype.type, words.dtype.type
    mask = part((word(1) << word(8 * scratch.itemsize - 1)) - word(1))
    none, one, eight = part(0), part(1), part(8)
    codes = scratch.reshape(-1, BLOCK)
    for b in range(scale_codes.shape[0]):
        s = scale_codes[b]
        r0, r1, r2, r3 = reached[s, 0], reached[s, 1], reached[s, 2], reached[s, 3]
        r4, r5, r6, r7 = reached[s, 4], reached[s, 5], reached[s, 6], reached[s, 7]
        for i in range(BLOCK):
            pattern = bits[b, i]
            magnitude = part(pattern & mask)
            code = one if magnitude >= r1 else none
            code = part(code + (one if magnitude >= r2 else none))
            code = part(code + (one if magnitude >= r3 else none))
            code = part(code + (one if magnitude >= r4 else none))
            code = part(code + (one if magnitude >= r5 else none))
            code = part(code + (one if magnitude >= r6 else none))
            code = part(code + (one if magnitude >= r7 else none))
            codes[b, i] = part(code + (eight if pattern >= r0 else none))
    shift = word(8 * scratch.itemsize - 4)
    for i in range(packed.shape[0]):
        packed[i] = np.uint8(word(words[i] | word(words[i] >> shift)) & word(255))

"""Quantization noise of a tensor: energy of values and errors, and numbers of clipped and lost values.

SQNR = 10 log10(sum of w^2 / sum of (w - decoded)^2) dB
saturated: larger than the largest value that the scale can represent, and so decoded to that
flushed:   not zero, but decoded to zero
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemoquant.formats.rounding import Floats, Weight, flat, kernel, weight_bits, widen

_LANES = 16  # running sums, added up in a fixed order: vectors of float64
_CHUNK = 128  # elements that a count of one byte holds: their comparisons become vectors
BEYOND_ROUNDING = 1 + 2.0**-20  # a scale is amax / limit in fp32: amax itself must not count as larger


@dataclass
class Noise:
    """Sums over any number of tensors; add them up with ``+=``.

    Attributes:
        signal, error: sums of w^2 and of (w - decoded)^2, float64.
        saturated, flushed, count: numbers of values.
    """

    signal: float = 0.0
    error: float = 0.0
    saturated: int = 0
    flushed: int = 0
    count: int = 0

    def __iadd__(self, other: "Noise") -> "Noise":
        self.signal += other.signal
        self.error += other.error
        self.saturated += other.saturated
        self.flushed += other.flushed
        self.count += other.count
        return self

    @property
    def sqnr_db(self) -> float | None:
        """SQNR in dB; None where it is not a finite number: no error at all, no signal, or NaN."""
        return decibels(self.signal, self.error)


def decibels(signal: float, error: float) -> float | None:
    """``10 log10(signal / error)`` of two energies; None where that is not a finite number."""
    if not (0 < signal < math.inf and 0 < error < math.inf):
        return None
    return 10 * (math.log10(signal) - math.log10(error))


@kernel
def _add(
    value: np.float32, decoded: np.float32, limit: np.float32, lane: int, sums: NDArray[np.float64]
) -> None:
    wide = np.float64(value)
    difference = wide - np.float64(decoded)
    magnitude = abs(value)
    sums[0, lane] += wide * wide
    sums[1, lane] += difference * difference
    one, none = np.float64(1), np.float64(0)
    sums[2, lane] += one if magnitude > limit else none
    sums[3, lane] += one if (magnitude > np.float32(0)) & (decoded == np.float32(0)) else none


@kernel
def _measure(
    bits: NDArray[np.unsignedinteger],
    shift: np.uint32,
    decoded: Floats,
    limit: np.float32,
    sums: NDArray[np.float64],
) -> None:
    # The inner loop has a constant length and no branches, so it becomes vectors.
    for start in range(0, bits.shape[0] // _LANES * _LANES, _LANES):
        for lane in range(_LANES):
            _add(widen(bits[start + lane], shift), decoded[start + lane], limit, lane, sums)
    for i in range(bits.shape[0] // _LANES * _LANES, bits.shape[0]):
        _add(widen(bits[i], shift), decoded[i], limit, i % _LANES, sums)


@kernel
def _zeros(bits: NDArray[np.unsignedinteger], magnitude: np.unsignedinteger) -> int:
    count, none = 0, np.uint8(0)
    for start in range(0, bits.shape[0] // _CHUNK * _CHUNK, _CHUNK):
        some = np.uint8(0)
        for i in range(start, start + _CHUNK):
            some = np.uint8(some + np.uint8((bits[i] & magnitude) == none))
        count += int(some)
    for i in range(bits.shape[0] // _CHUNK * _CHUNK, bits.shape[0]):
        count += int((bits[i] & magnitude) == none)
    return count


def zeros(bits: NDArray[np.unsignedinteger]) -> int:
    """How many of these bit patterns are zero but for their highest bit, the sign; any shape, no copy."""
    magnitude = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    return int(_zeros(flat(bits, bits.dtype.type, "bits"), magnitude))


def measure(values: Weight, decoded: Floats, limit: float | np.float32) -> Noise:
    """Compare the values of a tensor with their decoded codes.

    Args:
        values: [rows, in], uint16 bf16 patterns or float32, C-contiguous.
        decoded: float32 of that shape.
        limit: the largest magnitude that values of this tensor can be decoded to; larger values count as
            saturated.
    Raises:
        ValueError: wrong dtypes or layouts, or shapes that do not match.
    """
    bits, shift = weight_bits(values)
    if decoded.shape != values.shape:
        raise ValueError(f"decoded: got shape {decoded.shape}, expected {values.shape}")
    sums = np.zeros((4, _LANES), np.float64)
    largest = np.float32(min(float(limit), float(np.finfo(np.float32).max)))
    _measure(bits, shift, flat(decoded, np.float32, "decoded"), largest, sums)
    signal, error, saturated, flushed = (float(s) for s in sums.sum(1))
    return Noise(signal, error, int(saturated), int(flushed), bits.size)

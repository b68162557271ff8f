"""What quantization did to a tensor: energy of its values and of their errors, and how many values were clipped or lost.

    SQNR = 10 log10(sum of w^2 / sum of (w - decoded)^2) dB
    saturated: decoded to the largest value that its scale can represent, and larger than that
    flushed:   not zero, and decoded to zero
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemoquant.formats import e2m1, e4m3
from nemoquant.formats.rounding import Codes, Floats, Weight, flat, kernel, weight_bits, widen

_LANES = 16  # running sums side by side, in a fixed order: vectors of float64, and a block of NVFP4
_E4M3 = e4m3.VALUES


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
        """None where it is not a finite number: no error at all, no signal, or NaN."""
        return decibels(self.signal, self.error)


def decibels(signal: float, error: float) -> float | None:
    """``10 log10(signal / error)`` of two energies; None where that is not a finite number."""
    if not (0 < signal < math.inf and 0 < error < math.inf):
        return None
    return 10 * (math.log10(signal) - math.log10(error))


@kernel
def _add(value: np.float32, decoded: np.float32, limit: np.float32, lane: int, sums: NDArray[np.float64]) -> None:
    wide = np.float64(value)
    difference = wide - np.float64(decoded)
    magnitude, kept = abs(value), abs(decoded)
    sums[0, lane] += wide * wide
    sums[1, lane] += difference * difference
    one, none = np.float64(1), np.float64(0)
    sums[2, lane] += one if (magnitude > kept) & (kept >= limit) & (kept > np.float32(0)) else none
    sums[3, lane] += one if (magnitude > np.float32(0)) & (kept == np.float32(0)) else none


@kernel
def _measure(
    bits: NDArray[np.unsignedinteger], shift: np.uint32, decoded: Floats, limits: Floats, block: int, sums: NDArray[np.float64]
) -> None:
    for start in range(0, bits.shape[0] // _LANES * _LANES, _LANES):  # of constant length inside, without branches: vectors
        limit = limits[start // block]
        for lane in range(_LANES):
            _add(widen(bits[start + lane], shift), decoded[start + lane], limit, lane, sums)
    for i in range(bits.shape[0] // _LANES * _LANES, bits.shape[0]):
        _add(widen(bits[i], shift), decoded[i], limits[i // block], i % _LANES, sums)


def measure(values: Weight, decoded: Floats, limits: Floats, block: int) -> Noise:
    """Compare ``values`` [rows, in] (uint16 bf16 patterns or float32, C-contiguous) with what they were decoded to.

    Args:
        decoded: float32 of that shape, C-contiguous.
        limits: float32, flat: the largest magnitude that each run of ``block`` values can be decoded to.
        block: 16, or the whole tensor.
    Raises:
        ValueError: wrong dtypes, layouts or sizes.
    """
    bits, shift = weight_bits(values)
    if decoded.shape != values.shape or limits.size * block < bits.size:
        raise ValueError(f"decoded: got shape {decoded.shape} and {limits.size} limits, expected {values.shape} in blocks of {block}")
    sums = np.zeros((4, _LANES), np.float64)
    _measure(bits, shift, flat(decoded, np.float32, "decoded"), flat(limits, np.float32, "limits"), block, sums)
    signal, error, saturated, flushed = (float(s) for s in sums.sum(1))
    return Noise(signal, error, int(saturated), int(flushed), bits.size)


def fp8_limits(decode_scale: float | np.float32) -> Floats:
    """The one limit of a tensor with an FP8 scale, [1]."""
    return np.array([np.float32(e4m3.MAX) * np.float32(decode_scale)], np.float32)


def nvfp4_limits(block_scales: Codes, global_decode_scale: float | np.float32) -> Floats:
    """A limit for each NVFP4 block, flat."""
    limits: Floats = np.float32(e2m1.MAX) * (_E4M3[block_scales.reshape(-1)] * np.float32(global_decode_scale))
    return limits

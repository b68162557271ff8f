"""The largest magnitude of a weight, from its bits: as integers, magnitudes keep their order, Inf above them,
NaN on top."""

import numpy as np

from nemoquant.formats import Device, gpu
from nemoquant.formats.rounding import Weight, weight_bits

_CHUNK = 1 << 17  # elements that stay in the cache between the two passes


def amax(weight: Weight | gpu.OnGpu, device: Device = "cpu") -> np.float32:
    """max |w| of a weight [out, in] (uint16 bf16 patterns or float32, C-contiguous) as fp32, exact.

    NaN if any element is NaN, else inf if any is Inf; 0.0 of an empty weight. Raises ValueError for a wrong
    dtype or layout.
    """
    if gpu.chosen(device):
        weight = gpu.put(weight)
    if isinstance(weight, gpu.OnGpu):
        return gpu.amax(weight)
    bits, shift = weight_bits(weight)
    width = 8 * bits.itemsize
    magnitude_mask = (1 << (width - 1)) - 1
    largest = 0
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        positive = int(
            chunk.view(f"i{bits.itemsize}").max()
        )  # the sign bit makes every negative value a negative integer
        negative = (
            int(chunk.max()) & magnitude_mask
        )  # and the largest unsigned one; with no negative value, the same as above
        largest = max(largest, positive, negative)
    return np.uint32(largest << int(shift)).view(np.float32)

"""The largest magnitude of a weight, computed on its bit patterns.

As integers, magnitudes keep their order, with Inf above all numbers and NaN above Inf.
"""

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
        # As signed integers, negative values are negative: the maximum is the largest positive value.
        positive = int(chunk.view(f"i{bits.itemsize}").max())
        # As unsigned integers, negative values are the largest; without any, this is the maximum above.
        negative = int(chunk.max()) & magnitude_mask
        largest = max(largest, positive, negative)
    return np.uint32(largest << int(shift)).view(np.float32)

"""float32 to bf16 bit patterns, on the integers."""

from typing import Any

import numpy as np
import numpy.typing as npt

INFINITE = 0x7F80  # and what is above it, without the sign: Inf and NaN
Patterns = npt.NDArray[np.uint16]


def rounded(values: npt.NDArray[np.float32]) -> Patterns:
    """Nearest, ties to even; what is above bf16's largest number becomes Inf. NaN is not kept."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (bits >> np.uint32(16)).astype(np.uint16)


def rounded_up(value: np.float32) -> np.uint16:
    """The smallest bf16 number that is not below a positive one."""
    return np.uint16((int(value.view(np.uint32)) + 0xFFFF) >> 16)


def value_of(bits: Any) -> np.float32:
    """The number of a pattern."""
    return np.uint32(int(bits) << 16).view(np.float32)

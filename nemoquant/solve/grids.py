"""What the kernels need to know of a format: its codes, and the scales that a block can have."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from nemoquant.formats import FormatName, e4m3, e8m0, mxfp8, nvfp4_blocks
from nemoquant.formats.rounding import Floats

FP8_BLOCK = 16  # fp8 has no blocks: these columns are only handled together


class Grid(NamedTuple):
    """The values that a block of a weight can have: a code's value times a block scale's, rounded to float32.

    Attributes:
        four: whether codes are E2M1; else E4M3.
        block: inputs that share a scale.
        scales: what multiplies codes, by block scale [first to last are used]; a single one for fp8.
        first, last: the smallest and the largest block scale.
        reach: how many block scales on each side of a block's own the descent tries.
    """

    four: bool
    block: int
    scales: Floats
    first: int
    last: int
    reach: int


def _fp8(scale: np.float32) -> Grid:
    return Grid(False, FP8_BLOCK, np.array([scale], np.float32), 0, 0, 0)


def _mxfp8(scale: np.float32) -> Grid:  # noqa: ARG001  it has none of the whole tensor
    return Grid(False, mxfp8.BLOCK, e8m0.VALUES[: e8m0.NAN].copy(), 0, e8m0.NAN - 1, 1)


def _nvfp4(scale: np.float32) -> Grid:
    scales = e4m3.VALUES[: e4m3.LARGEST_CODE + 1] * np.float32(scale)
    return Grid(True, nvfp4_blocks.BLOCK, scales, 1, e4m3.LARGEST_CODE, 4)


GRIDS: Mapping[FormatName, Callable[[np.float32], Grid]] = MappingProxyType(
    {"fp8": _fp8, "mxfp8": _mxfp8, "nvfp4": _nvfp4}
)


def grid(format: FormatName, scale: np.float32) -> Grid:
    """The grid of a format, and of the scale of the whole tensor."""
    return GRIDS[format](scale)

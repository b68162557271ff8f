"""What a weight loses to a few values that are far larger than the rest of it.

The largest value decides the scale of a tensor, and the smallest numbers that the format has under this scale
may be larger than most of the tensor. Then an NVFP4 weight has block scales at the smallest, 2^-9, and FP8
codes become zero. (MXFP8 has no scale of the whole tensor: a large value costs its own block alone.)

Measured on normally distributed weights with one value that is so many times the largest of the others; SQNR
of the others:

    times      FP8: values lost, SQNR    NVFP4: block scales at 2^-9, values lost, SQNR
    1               0.00 %   31.6 dB          0 %      7 %    20.4 dB
    1,000           0.8 %    31.5 dB          0 %      7 %    20.4 dB
    10,000          8.2 %    24.5 dB          0 %      7 %    20.4 dB
    30,000         24 %      15.0 dB          0.1 %    7 %    19.6 dB
    100,000        70 %       4.5 dB         97 %      7 %    18.0 dB
    300,000        99.8 %     0.0 dB        100 %     20 %    16.2 dB
    1,000,000     100 %       0.0 dB        100 %     61 %     6.1 dB

In the demo model the worst of all weights has 0.02 % of its values lost in FP8 and MXFP8, and no block scale
at 2^-9. Codes of four bits are zero for up to 21 % of its values: there that says nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from nemoquant.errors import listing
from nemoquant.formats import FORMATS, FormatName
from nemoquant.formats.arithmetic import Encoded
from nemoquant.formats.noise import measure, zeros
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.formats.rounding import Codes, Weight, weight_bits

TOO_MUCH = 0.05  # of the block scales or values; 200 times the demo model's worst
LOOK_CLOSER = 64  # a piece with more zeros than one code in so many
WIDE_BITS = 8  # of a code; with fewer, many are zero in any weight
MXFP8_ADVICE = "`format: mxfp8`, which has no scale of the whole tensor, or "


@dataclass(frozen=True)
class Lost:
    """Counts over pieces of a weight, to be added up.

    Attributes:
        floored, blocks: block scales that are the smallest there is, and all of them.
        flushed, values: values that are not zero and became zero, and all that are not zero. (All of a piece
            that was not looked at closely: it has hardly a zero.)
    """

    floored: int = 0
    blocks: int = 0
    flushed: int = 0
    values: int = 0

    def __add__(self, other: "Lost") -> "Lost":
        return Lost(
            self.floored + other.floored,
            self.blocks + other.blocks,
            self.flushed + other.flushed,
            self.values + other.values,
        )

    def too_much(self, format: FormatName) -> bool:
        """Whether a user should know."""
        if self.floored > TOO_MUCH * self.blocks:
            return True
        return FORMATS[format].weight_bits >= WIDE_BITS and self.flushed > TOO_MUCH * self.values

    def words(self) -> str:
        """Both shares."""
        zero = f"{self.flushed / self.values:.1%} of its nonzero values became zero"
        if not self.floored:
            return zero
        return f"{self.floored / self.blocks:.1%} of its block scales are the smallest there is, {zero}"


def lost_to_scale(
    format: FormatName, weight: Callable[[], Weight], encoded: Encoded, scale: np.float32
) -> Lost:
    """What a piece of a weight lost.

    Values are compared one by one only where something is lost: the piece has block scales that are the
    smallest, or, with codes of eight bits, more than a few zeros.

    Args:
        weight: gives it, [out, in], uint16 bf16 patterns or float32; called only where values are compared,
            because a fold's product takes long.
    """
    arithmetic, blocks = ARITHMETIC[format], encoded.block_scales
    bits = FORMATS[format].weight_bits
    if bits >= WIDE_BITS:
        worn = zeros(encoded.codes) * LOOK_CLOSER > encoded.codes.size
    else:
        worn = blocks is not None and arithmetic.floored(blocks) > 0
    if not worn:
        return Lost(0, 0 if blocks is None else blocks.size, 0, encoded.codes.size * 8 // bits)
    values = weight()
    return lost_of(format, values, blocks, measure(values, arithmetic.decode(encoded, scale), np.inf).flushed)


def lost_of(format: FormatName, weight: Weight, block_scales: Codes | None, flushed: int) -> Lost:
    """What a weight [out, in] lost, ``flushed`` of whose values became zero."""
    values = weight.size - zeros(weight_bits(weight)[0])
    if block_scales is None:
        return Lost(0, 0, flushed, values)
    return Lost(ARITHMETIC[format].floored(block_scales), block_scales.size, flushed, values)


def lost_warnings(found: Mapping[str, Lost], formats: Mapping[str, FormatName]) -> list[str]:
    """Warnings that name the modules that lost too much, if there are any; ``formats`` are by module."""
    by_tensor = [module for module in found if FORMATS[formats[module]].global_scale]
    by_block = [module for module in found if module not in by_tensor]
    warnings = []
    for modules, scales, advice in (
        (by_tensor, "a scale that a few very large ones decide", MXFP8_ADVICE),
        (by_block, "scales of their blocks, which a few very large ones decide", ""),
    ):
        if modules:
            shares = [f"{module} ({found[module].words()})" for module in modules]
            warnings.append(
                f"{len(modules)} weights lost small values to {scales}: {listing(shares)}; are the large "
                f"values right? Else {advice}`format: source` keeps the small ones"
            )
    return warnings

"""What the formats' kernels in Triton share: bits of a weight, E4M3 codes, the largest magnitude.

All kernels give the same bytes as those for the CPU. Every operation that rounds is either one IEEE operation
(``div_rn``, a product, a float64 sum in index order; launches forbid fused multiply-add), or integer
arithmetic on bit patterns.

A weight is flat patterns and a shift, as for the CPU: ``pattern << shift`` are the bits of the float32 value.
Patterns are signed: int16 for bf16, int32 for float32.

(Triton's language only looks like Python: it has its own constants, and annotations that are no types. So
kernels are not type-checked; what launches them is.)
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def float_bits(pattern, shift):
    return pattern.to(tl.int32) << shift


@triton.jit
@no_type_check
def magnitude_bits(pattern, shift):
    return float_bits(pattern, shift) & 0x7FFFFFFF


@triton.jit
@no_type_check
def e4m3_code(bits):
    """The E4M3 code of magnitudes by their float32 bits; see ``e4m3.encode_one``."""
    kept = tl.minimum(bits, 0x43E00000)  # 448
    normal = ((kept + 0x7FFFF + ((kept >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (kept.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(kept < 0x3C800000, subnormal, normal)
    return tl.where(bits > 0x7F800000, 0x7F, code)


@triton.jit
@no_type_check
def amax_kernel(weight, shift, largest, count, LANES: tl.constexpr):
    """``largest`` [1] int32, 0 on entry: the bits of the largest magnitude."""
    offsets = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    bits = magnitude_bits(tl.load(weight + offsets, mask=offsets < count, other=0), shift)
    tl.atomic_max(largest, tl.max(bits, axis=0))

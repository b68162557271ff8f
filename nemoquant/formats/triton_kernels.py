"""The kernels of this package in Triton, for GPUs: the same bytes as those for the CPU.

Every operation that rounds is either one IEEE operation (``div_rn``, a product, a float64 sum in index order;
launches forbid fused multiply-add), or integer arithmetic on bit patterns. What depends on a block scale
alone comes from the CPU's own tables: ``reached``, the ``nvfp4_blocks.thresholds`` of float32, and
``scales``, d by E4M3 code. One lane computes a block of 16. The search is plain: all 126 scales.

A weight is flat patterns and a shift, as for the CPU: ``pattern << shift`` are the bits of the float32 value.
Patterns are signed: int16 for bf16, int32 for float32.
"""

# mypy: ignore-errors
# (Triton's language only looks like Python: it has its own constants, and annotations that are no types.)

import triton
import triton.language as tl

_FOUR_OVER_SIX = tl.constexpr(1)
_MSE = tl.constexpr(2)
_ACTIVATIONS = tl.constexpr(3)


@triton.jit
def _magnitude_bits(pattern, shift):
    return (pattern.to(tl.int32) << shift) & 0x7FFFFFFF


@triton.jit
def _e4m3(bits):
    """The E4M3 code of magnitudes by their float32 bits; see ``e4m3.encode_one``."""
    kept = tl.minimum(bits, 0x43E00000)  # 448
    normal = ((kept + 0x7FFFF + ((kept >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (kept.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(kept < 0x3C800000, subnormal, normal)
    return tl.where(bits > 0x7F800000, 0x7F, code)


@triton.jit
def _e2m1_value(code):
    """The magnitude of a code 0 to 7, as float32; see ``e2m1.value_bits``."""
    bits = tl.where(code < 2, code * 0x3F000000, (code << 22) + (126 << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _e2m1_code(magnitude, reached, scale_code, mask):
    """How many of the thresholds of this block scale the magnitude's bits reach."""
    code = tl.zeros_like(magnitude)
    for c in tl.static_range(1, 8):
        code += (magnitude >= tl.load(reached + scale_code * 8 + c, mask=mask, other=0)).to(tl.int32)
    return code


@triton.jit
def amax_kernel(weight, shift, largest, count, LANES: tl.constexpr):
    """``largest`` [1] int32, 0 on entry: the bits of the largest magnitude."""
    offsets = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    bits = _magnitude_bits(tl.load(weight + offsets, mask=offsets < count, other=0), shift)
    tl.atomic_max(largest, tl.max(bits, axis=0))


@triton.jit
def fp8_encode_kernel(weight, shift, decode_scale, codes, count, LANES: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = offsets < count
    value = (tl.load(weight + offsets, mask=mask, other=0).to(tl.int32) << shift).to(tl.float32, bitcast=True)
    quotient = tl.div_rn(value, tl.zeros_like(value) + decode_scale).to(tl.int32, bitcast=True)
    tl.store(
        codes + offsets, (_e4m3(quotient & 0x7FFFFFFF) | ((quotient >> 24) & 0x80)).to(tl.uint8), mask=mask
    )


@triton.jit
def fp8_decode_kernel(codes, table, decode_scale, values, count, LANES: tl.constexpr):
    """``table`` [256] float32: the value of each code."""
    offsets = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = offsets < count
    value = tl.load(table + tl.load(codes + offsets, mask=mask, other=0).to(tl.int32), mask=mask, other=0.0)
    tl.store(values + offsets, value * decode_scale, mask=mask)


@triton.jit
def _error(weight, first, shift, scale_code, reached, scales, mask):
    """The error of blocks under a scale, exactly as defined."""
    scale = tl.load(scales + scale_code, mask=mask, other=1.0).to(tl.float64)
    error = tl.zeros_like(scale)
    for i in tl.static_range(16):
        magnitude = _magnitude_bits(tl.load(weight + first + i, mask=mask, other=0), shift)
        value = _e2m1_value(_e2m1_code(magnitude, reached, scale_code, mask)).to(tl.float64)
        difference = magnitude.to(tl.float32, bitcast=True).to(tl.float64) - value * scale
        error += difference * difference
    return error


@triton.jit
def _scale_code(amax, onto):
    quotient = tl.div_rn(amax, tl.zeros_like(amax) + onto)
    return _e4m3(tl.maximum(quotient, 0.001953125).to(tl.int32, bitcast=True))


@triton.jit
def nvfp4_encode_kernel(
    weight,
    shift,
    onto,
    reached,
    scales,
    packed,
    block_scales,
    count,
    METHOD: tl.constexpr,
    LANES: tl.constexpr,
):
    """Blocks of a weight -> ``packed`` [8 count], ``block_scales`` [count]; ``onto`` is 6 global scales."""
    block = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = block < count
    first = block * 16
    largest = tl.zeros([LANES], tl.int32)
    for i in tl.static_range(16):
        largest = tl.maximum(largest, _magnitude_bits(tl.load(weight + first + i, mask=mask, other=0), shift))
    amax = largest.to(tl.float32, bitcast=True)
    if METHOD == _ACTIVATIONS:  # no lower bound: a block may round to zero, and NaN makes its block NaN
        chosen = _e4m3(tl.div_rn(amax, tl.zeros_like(amax) + onto).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        empty = 0
    else:
        chosen = _scale_code(amax, onto)
        empty = 0x38
    if METHOD == _FOUR_OVER_SIX:
        four = _scale_code(amax * 1.5, onto)
        error = _error(weight, first, shift, chosen, reached=reached, scales=scales, mask=mask)
        chosen = tl.where(
            _error(weight, first, shift, four, reached=reached, scales=scales, mask=mask) < error,
            four,
            chosen,
        )
    if METHOD == _MSE:
        chosen = tl.zeros([LANES], tl.int32) + 1
        error = _error(weight, first, shift, chosen, reached=reached, scales=scales, mask=mask)
        for code in range(2, 127):
            candidate = tl.zeros([LANES], tl.int32) + code
            other = _error(weight, first, shift, candidate, reached=reached, scales=scales, mask=mask)
            chosen = tl.where(other < error, candidate, chosen)
            error = tl.where(other < error, other, error)
    chosen = tl.where(largest == 0, empty, chosen)
    tl.store(block_scales + block, chosen.to(tl.uint8), mask=mask)

    signed = tl.load(reached + chosen * 8, mask=mask, other=0)
    for i in tl.static_range(8):
        pair = tl.zeros([LANES], tl.int32)
        for half in tl.static_range(2):
            bits = tl.load(weight + first + 2 * i + half, mask=mask, other=0).to(tl.int32) << shift
            magnitude = bits & 0x7FFFFFFF
            code = _e2m1_code(magnitude, reached, chosen, mask)
            code += tl.where((bits < 0) & (magnitude >= signed), 8, 0)
            pair += code << (4 * half)
        tl.store(packed + block * 8 + i, pair.to(tl.uint8), mask=mask)


@triton.jit
def nvfp4_decode_kernel(packed, block_scales, scales, values, count, LANES: tl.constexpr):
    """``count`` bytes of codes -> float32 [2 count]. ``scales`` [256]: d by E4M3 code."""
    offsets = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = offsets < count
    pair = tl.load(packed + offsets, mask=mask, other=0).to(tl.int32)
    scale = tl.load(
        scales + tl.load(block_scales + offsets // 8, mask=mask, other=0).to(tl.int32), mask=mask, other=0.0
    )
    for half in tl.static_range(2):
        code = (pair >> (4 * half)) & 15
        bits = _e2m1_value(code & 7).to(tl.int32, bitcast=True) | ((code & 8) << 28)
        tl.store(values + 2 * offsets + half, bits.to(tl.float32, bitcast=True) * scale, mask=mask)

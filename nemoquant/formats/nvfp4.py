"""NVFP4: E2M1 codes in blocks of 16 along the input dimension, one E4M3 scale a block, one fp32 scale a tensor.

    value = code * d,    d = fp32(block_scale * global_decode_scale)
    codes = e2m1(w / d), divided in fp32, the quotient rounded once

The three methods differ in how a block gets its scale; a block of zeros gets 1.0 in all of them.

max            global_decode_scale = amax / (6 * 448),
               block_scale = e4m3(clamp(block_amax / (6 * global_decode_scale), 2^-9, 448)).
               Source: NVIDIA, "Pretraining large language models with NVFP4", 2025 (arXiv 2509.25149); Model Optimizer's bytes.
mse            the same global scale; of the 126 positive finite E4M3 values the one with the least error, ties to the smaller.
four_over_six  global_decode_scale = amax / (6 * 256); block_scale as in max (M = 6), or from 6/4 of the block amax (M = 4): the
               largest value lands on 6 or on 4. The one with less error, ties to M = 6.
               Source: Cook et al., "Four over six", 2025 (arXiv 2512.02010).

The error of a block is the float64 sum, in index order, of (w - code * d)^2.

Activations are encoded at run time (``encode_activations``): the global scale is the calibrated ``input_scale``, the block's scale is
e4m3(block_amax / (6 * global)) without the lower bound: it may round to zero, and the whole block with it, as in the kernels of
vLLM and TensorRT-LLM (``cvt_warp_fp16_to_fp4``). What exceeds 448 * 6 global scales is clipped.
(Model Optimizer's fake quantizer also drops blocks whose scale is below 1e-5.)
"""

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nemoquant.formats import e2m1, e4m3
from nemoquant.formats.rounding import (
    Codes,
    Floats,
    Weight,
    checked_scale,
    flat,
    float_of,
    float_output,
    kernel,
    output,
    tensor_scale,
    weight_bits,
    widen,
)

Method: TypeAlias = Literal["max", "mse", "four_over_six"]
Bits: TypeAlias = NDArray[np.unsignedinteger]
Doubles: TypeAlias = NDArray[np.float64]

BLOCK = 16

_LARGEST = {"max": 6.0 * 448.0, "mse": 6.0 * 448.0, "four_over_six": 6.0 * 256.0}

_E2M1 = e2m1.VALUES
_E4M3 = e4m3.VALUES
_ONE = e4m3.ONE
_LAST = e4m3.LARGEST_CODE  # 126: the codes 1 to 126 are the positive finite values, in ascending order
_STEP = 8  # block scales tried at once: a vector of float64
_encode_e2m1 = e2m1.encode_one
_nearest_e2m1 = e2m1.nearest
_encode_e4m3 = e4m3.encode_one


def global_decode_scale(amax: float | np.float32, method: Method = "max") -> np.float32:
    """``amax / (6 * 448)`` in fp32, or ``amax / (6 * 256)`` for four_over_six; 1.0 where ``is_degenerate(amax, method)``.

    Raises ValueError if amax is negative, Inf or NaN, or the method is unknown.
    """
    return tensor_scale(amax, _largest(method))[0]


def is_degenerate(amax: float | np.float32, method: Method = "max") -> bool:
    """Whether amax is 0 or so small that its scale is not a normal fp32 number: such a weight is written as ``zeros(shape)``."""
    return tensor_scale(amax, _largest(method))[1]


def _largest(method: Method) -> float:
    if method not in _LARGEST:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(_LARGEST)}")
    return _LARGEST[method]


@kernel
def _scale_code(amax: np.float32, global_scale: np.float32) -> np.uint8:
    """The E4M3 code of a block scale that puts amax on 6."""
    scale = np.float32(amax / np.float32(np.float32(6) * global_scale))
    if not scale > np.float32(0.001953125):
        scale = np.float32(0.001953125)
    return np.uint8(_encode_e4m3(scale))


@kernel
def _errors(magnitudes: Floats, scales: Floats, errors: Doubles) -> None:
    """``errors[k]`` = the error of a block with ``scales[k]``. Signs do not matter to it: rounding is symmetric.

    The scales are the vector's lanes (the loop over the block unrolls), so that each lane keeps the order of its sum.
    """
    for k in range(scales.shape[0]):
        scale = scales[k]
        error = np.float64(0)
        for i in range(BLOCK):
            code = _nearest_e2m1(np.float32(magnitudes[i] / scale))
            difference = np.float64(magnitudes[i]) - np.float64(code) * np.float64(scale)
            error += difference * difference
        errors[k] = error


@kernel
def _error_below(magnitudes: Floats, scale: np.float32) -> np.float64:
    """A lower bound of the error of this scale *and of every larger one*.

    What is at most a quarter of d rounds to zero and costs its square. These terms stand in the error's sum too, in the same
    order, and rounded addition is monotone: leaving out the other terms cannot make the sum larger, not by a bit.
    """
    quarter = np.float64(0.25) * np.float64(scale)
    error = np.float64(0)
    for i in range(BLOCK):
        magnitude = np.float64(magnitudes[i])
        error += magnitude * magnitude if magnitude <= quarter else np.float64(0)
    return error


@kernel
def _search(magnitudes: Floats, amax: np.float32, center: int, scales: Floats, errors: Doubles) -> np.uint8:
    """The E4M3 code, of all 126, with the least error; ties to the smaller. ``scales[code]`` is d, ``center`` method max's code.

    Works outwards from the center, a vector of codes at a time, and stops in each direction where a bound proves that nothing
    further can win: downwards the largest value is clipped and costs (amax - 6 d)^2 alone, more with every smaller d; upwards
    ``_error_below``. A smaller scale wins ties, hence ``>`` downwards and ``>=`` upwards.
    """
    first = max(center - 3, 1)
    last = min(first + _STEP - 1, _LAST)
    best, least = first, np.float64(np.inf)
    _errors(magnitudes, scales[first : last + 1], errors)
    for k in range(last + 1 - first):
        better = errors[k] < least
        best, least = (first + k if better else best), (errors[k] if better else least)

    while first > 1:
        high = first - 1
        clipped = np.float64(amax) - np.float64(6) * np.float64(scales[high])
        if clipped > np.float64(0) and clipped * clipped > least:
            break
        first = max(high - _STEP + 1, 1)
        _errors(magnitudes, scales[first : high + 1], errors)
        for k in range(high - first, -1, -1):
            better = errors[k] <= least
            best, least = (first + k if better else best), (errors[k] if better else least)

    while last < _LAST:
        low = last + 1
        if _error_below(magnitudes, scales[low]) >= least:
            break
        last = min(low + _STEP - 1, _LAST)
        _errors(magnitudes, scales[low : last + 1], errors)
        for k in range(last + 1 - low):
            better = errors[k] < least
            best, least = (low + k if better else best), (errors[k] if better else least)
    return np.uint8(best)


@kernel
def _block_amax(bits: Bits, shift: np.uint32, block: int) -> np.float32:
    """max |w| of a block, found among integers: with floats, NaN makes the order matter, and the loop no vector."""
    largest = np.uint32(0)
    for i in range(BLOCK):
        largest = max(largest, np.uint32(np.uint32(np.uint32(bits[block, i]) << shift) & np.uint32(0x7FFFFFFF)))
    return float_of(largest)


@kernel
def _magnitudes(bits: Bits, shift: np.uint32, block: int, magnitudes: Floats) -> None:
    for i in range(BLOCK):
        magnitudes[i] = abs(widen(bits[block, i], shift))


@kernel
def _write_codes(bits: Bits, shift: np.uint32, block: int, scale: np.float32, codes: Codes, packed: Codes) -> None:
    for i in range(BLOCK):
        codes[i] = _encode_e2m1(np.float32(widen(bits[block, i], shift) / scale))
    for i in range(BLOCK // 2):
        packed[block, i] = np.uint8(codes[2 * i] | np.uint8(codes[2 * i + 1] << np.uint8(4)))


@kernel
def _encode_max(bits: Bits, shift: np.uint32, global_scale: np.float32, packed: Codes, block_scales: Codes) -> None:
    codes = np.empty(BLOCK, np.uint8)
    for block in range(bits.shape[0]):
        amax = _block_amax(bits, shift, block)
        code = _scale_code(amax, global_scale) if amax > np.float32(0) else np.uint8(_ONE)
        block_scales[block] = code
        _write_codes(bits, shift, block, np.float32(_E4M3[code] * global_scale), codes, packed)


@kernel
def _encode_mse(bits: Bits, shift: np.uint32, global_scale: np.float32, packed: Codes, block_scales: Codes) -> None:
    codes, magnitudes, errors = np.empty(BLOCK, np.uint8), np.empty(BLOCK, np.float32), np.empty(_STEP, np.float64)
    scales = _E4M3[: _LAST + 1] * global_scale
    for block in range(bits.shape[0]):
        amax = _block_amax(bits, shift, block)
        code = np.uint8(_ONE)
        if amax > np.float32(0):
            _magnitudes(bits, shift, block, magnitudes)
            code = _search(magnitudes, amax, int(_scale_code(amax, global_scale)), scales, errors)
        block_scales[block] = code
        _write_codes(bits, shift, block, scales[code], codes, packed)


@kernel
def _encode_four_over_six(bits: Bits, shift: np.uint32, global_scale: np.float32, packed: Codes, block_scales: Codes) -> None:
    codes, magnitudes = np.empty(BLOCK, np.uint8), np.empty(BLOCK, np.float32)
    scales, errors = np.empty(2, np.float32), np.empty(2, np.float64)
    for block in range(bits.shape[0]):
        amax = _block_amax(bits, shift, block)
        code, scale = np.uint8(_ONE), global_scale
        if amax > np.float32(0):
            _magnitudes(bits, shift, block, magnitudes)
            onto_six = _scale_code(amax, global_scale)
            onto_four = _scale_code(np.float32(amax * np.float32(1.5)), global_scale)
            scales[0] = np.float32(_E4M3[onto_six] * global_scale)
            scales[1] = np.float32(_E4M3[onto_four] * global_scale)
            _errors(magnitudes, scales, errors)
            code, scale = (onto_four, scales[1]) if errors[1] < errors[0] else (onto_six, scales[0])
        block_scales[block] = code
        _write_codes(bits, shift, block, scale, codes, packed)


@kernel
def _encode_activations(bits: Bits, shift: np.uint32, global_scale: np.float32, packed: Codes, block_scales: Codes) -> None:
    codes = np.empty(BLOCK, np.uint8)
    for block in range(bits.shape[0]):
        amax = _block_amax(bits, shift, block)
        code = _encode_e4m3(np.float32(amax / np.float32(np.float32(6) * global_scale)))
        block_scales[block] = code
        if code == np.uint8(0):
            packed[block] = np.uint8(0)
        else:
            _write_codes(bits, shift, block, np.float32(_E4M3[code] * global_scale), codes, packed)


_KERNELS = {"max": _encode_max, "mse": _encode_mse, "four_over_six": _encode_four_over_six}


@kernel
def _decode(packed: Codes, block_scales: Codes, global_scale: np.float32, values: Floats) -> None:
    for block in range(block_scales.shape[0]):
        scale = np.float32(_E4M3[block_scales[block]] * global_scale)
        for i in range(block * BLOCK // 2, (block + 1) * BLOCK // 2):
            values[2 * i] = np.float32(_E2M1[packed[i] & np.uint8(15)] * scale)
            values[2 * i + 1] = np.float32(_E2M1[packed[i] >> np.uint8(4)] * scale)


def encode(
    weight: Weight,
    global_decode_scale: float | np.float32,
    method: Method = "max",
    out: tuple[Codes, Codes] | None = None,
) -> tuple[Codes, Codes]:
    """Weight [out, in] (uint16 bf16 patterns or float32, C-contiguous, finite) -> codes [out, in/2], E4M3 scales [out, in/16].

    Both are uint8, the codes packed two a byte. ``out`` is a pair of buffers of these shapes to write into and return. The scale
    must be the one of the same method. Raises ValueError for a wrong dtype, layout or buffer, an input dimension that 16 does not
    divide, an unknown method, or a scale that is not positive.
    """
    bits, shift = weight_bits(weight)
    scale = checked_scale(global_decode_scale, "global_decode_scale")
    _largest(method)
    packed, block_scales = _outputs(weight.shape, out)
    _KERNELS[method](bits.reshape(-1, BLOCK), shift, scale, packed.reshape(-1, BLOCK // 2), block_scales.reshape(-1))
    return packed, block_scales


def encode_activations(values: Floats, global_decode_scale: float | np.float32) -> tuple[Codes, Codes]:
    """A GEMM's input [tokens, in] (float32, C-contiguous) -> codes [tokens, in/2], E4M3 scales [tokens, in/16], both uint8.

    NaN makes its block's scale, and so all of its block, NaN. Raises ValueError for a wrong dtype or layout, an input dimension that
    16 does not divide, or a scale that is not positive.
    """
    bits, shift = weight_bits(values)
    scale = checked_scale(global_decode_scale, "global_decode_scale")
    packed, block_scales = _outputs(values.shape, None)
    _encode_activations(bits.reshape(-1, BLOCK), shift, scale, packed.reshape(-1, BLOCK // 2), block_scales.reshape(-1))
    return packed, block_scales


def zeros(shape: tuple[int, int], out: tuple[Codes, Codes] | None = None) -> tuple[Codes, Codes]:
    """A degenerate weight [out, in]: codes 0x00 [out, in/2], block scales 1.0 (0x38) [out, in/16].

    (Divided by the scale 1.0, tiny negatives would give the code 0x8.)
    """
    packed, block_scales = _outputs(shape, out)
    packed.fill(0)
    block_scales.fill(_ONE)
    return packed, block_scales


def _outputs(shape: tuple[int, ...], out: tuple[Codes, Codes] | None) -> tuple[Codes, Codes]:
    rows, columns = shape
    if columns % BLOCK:
        raise ValueError(f"weight: got shape {tuple(shape)}, expected an input dimension (the last) that {BLOCK} divides")
    packed, block_scales = out if out is not None else (None, None)
    return (
        output(packed, (rows, columns // 2), "out[0] (packed codes)"),
        output(block_scales, (rows, columns // BLOCK), "out[1] (block scales)"),
    )


def decode(packed: Codes, block_scales: Codes, global_decode_scale: float | np.float32, out: Floats | None = None) -> Floats:
    """Packed codes [out, in/2], E4M3 scales [out, in/16], both uint8 -> float32 [out, in] ``= code * fp32(block * global)``.

    ``out`` is a float32 buffer [out, in] to write into and return.
    Raises ValueError for a wrong dtype, shapes that do not belong together, or a scale that is not positive.
    """
    scale = checked_scale(global_decode_scale, "global_decode_scale")
    rows, blocks = block_scales.shape
    if packed.shape != (rows, blocks * BLOCK // 2):
        raise ValueError(
            f"packed: got shape {packed.shape}, expected {(rows, blocks * BLOCK // 2)} for scales {block_scales.shape}"
        )
    values = float_output(out, (rows, blocks * BLOCK))
    _decode(flat(packed, np.uint8, "packed"), flat(block_scales, np.uint8, "block_scales"), scale, values.reshape(-1))
    return values

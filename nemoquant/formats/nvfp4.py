"""NVFP4: E2M1 codes in blocks of 16 inputs, one E4M3 scale per block, one fp32 scale per tensor.

    value = code * d,    d = fp32(block_scale * global_decode_scale)
    codes = e2m1(w / d), divided in fp32, and the quotient rounded once, to E2M1

The three methods differ in how a block gets its scale; a block of zeros gets the scale 1.0 in all of them.

max            global_decode_scale = amax / (6 * 448),
               block_scale = e4m3(clamp(block_amax / (6 * global_decode_scale), 2^-9, 448)). Source: NVIDIA,
               "Pretraining large language models with NVFP4", 2025 (arXiv 2509.25149); Model Optimizer's
               bytes.
mse            the same global scale; block_scale is the one with the least error of the 126 positive finite
               E4M3 values, ties to the smaller.
four_over_six  global_decode_scale = amax / (6 * 256); block_scale as in max (M = 6), or from 6/4 of the block
               amax (M = 4): the largest value becomes 6 or 4. The one with less error, ties to M = 6.
               Source: Cook et al., "Four over six", 2025 (arXiv 2512.02010).

The error of a block is the float64 sum, in index order, of (w - code * d)^2.

Activations are encoded at run time (``encode_activations``). The global scale is the calibrated
``input_scale``. The block's scale is e4m3(block_amax / (6 * global)) without the lower bound: it may round to
zero, and the whole block with it, as in the kernels of vLLM and TensorRT-LLM (``cvt_warp_fp16_to_fp4``).
Magnitudes above 448 * 6 * global are clipped. (Model Optimizer's fake quantizer also drops blocks whose scale
is below 1e-5.)
"""

from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from nemoquant.formats import FORMATS, Device, ScaleMethod, blocks, e2m1, e4m3, gpu, nvfp4_blocks
from nemoquant.formats.arithmetic import Encoded, TensorScale
from nemoquant.formats.blocks import PAIR, Bits
from nemoquant.formats.noise import BEYOND_ROUNDING
from nemoquant.formats.nvfp4_blocks import BLOCK, TILE
from nemoquant.formats.nvfp4_search import choose_four_over_six, choose_least_error
from nemoquant.formats.rounding import (
    Codes,
    Floats,
    Weight,
    block_outputs,
    checked_scale,
    flat,
    float_output,
    kernel,
    tensor_scale,
    weight_bits,
)

_LARGEST: dict[ScaleMethod, float] = {"max": 6.0 * 448.0, "mse": 6.0 * 448.0, "four_over_six": 6.0 * 256.0}

_value_e4m3 = e4m3.value_of
_value_bits = e2m1.value_bits
_largest_magnitudes = blocks.largest
_scale_codes = nvfp4_blocks.scale_codes
_spread = blocks.spread
_thresholds = nvfp4_blocks.thresholds
_write_codes = nvfp4_blocks.write_codes


def global_decode_scale(amax: float | np.float32, method: str = "max") -> np.float32:
    """``amax / (6 * 448)`` in fp32, for four_over_six ``amax / (6 * 256)``; 1.0 if degenerate.

    Degenerate as in ``is_degenerate``. Raises ValueError if amax is negative, Inf or NaN, or the method is
    unknown.
    """
    return tensor_scale(amax, _largest(method))[0]


def is_degenerate(amax: float | np.float32, method: str = "max") -> bool:
    """Whether amax is 0, or so small that its scale is not a normal fp32 number.

    Such a weight is written as ``zeros(shape)``. Raises ValueError like ``global_decode_scale``.
    """
    return tensor_scale(amax, _largest(method))[1]


def _largest(method: str) -> float:
    return _LARGEST[FORMATS["nvfp4"].checked_method(method)]


@kernel
def _block_scales(
    pairs: Bits,
    shift: np.uint32,
    global_scale: np.float32,
    least: np.float32,
    zeros: np.uint8,
    words: Bits,
    scratch: Bits,
    magnitudes: Bits,
    codes: Codes,
) -> None:
    """The scale of each block, which follows from its largest magnitude, one tile at a time.

    ``words`` and ``scratch`` as for ``largest``.
    """
    onto = np.float32(np.float32(6) * global_scale)
    for start in range(0, codes.shape[0], TILE):
        end = min(start + TILE, codes.shape[0])
        _largest_magnitudes(pairs[8 * start : 8 * end], words, scratch, magnitudes[start:end])
        _scale_codes(
            magnitudes[start:end],
            shift,
            np.float32(1),
            onto=onto,
            least=least,
            zeros=zeros,
            codes=codes[start:end],
        )


@kernel
def _write(
    bits: Bits,
    shift: np.uint32,
    global_scale: np.float32,
    words: Bits,
    scratch: Bits,
    scales: Codes,
    packed: Codes,
) -> None:
    """The codes under the given block scales, one tile at a time.

    ``words`` and ``scratch`` as for ``write_codes``.
    """
    reached = np.empty((128, 8), bits.dtype)
    _thresholds(shift, global_scale, reached)
    for start in range(0, scales.shape[0], TILE):
        end = min(start + TILE, scales.shape[0])
        _write_codes(bits[start:end], scales[start:end], reached, words, scratch, packed[8 * start : 8 * end])


def _encode(
    values: Weight, global_scale: np.float32, method: ScaleMethod | None, packed: Codes, block_scales: Codes
) -> None:
    """Encode weights by ``method``, or activations where it is None; both outputs are flat rows."""
    flat_bits, shift = weight_bits(values)
    bits, pairs = flat_bits.reshape(-1, BLOCK), flat_bits.view(PAIR[flat_bits.dtype])
    least, zeros = (np.float32(e4m3.SMALLEST), np.uint8(e4m3.ONE)) if method else (np.float32(0), np.uint8(0))
    words = np.empty(TILE * BLOCK // 2, pairs.dtype)
    scratch = words.view(bits.dtype)
    magnitudes = np.empty(block_scales.size, bits.dtype)
    _block_scales(
        pairs,
        shift,
        global_scale,
        least=least,
        zeros=zeros,
        words=words,
        scratch=scratch,
        magnitudes=magnitudes,
        codes=block_scales,
    )
    match method:
        case None | "max":
            pass
        case "mse":
            choose_least_error(bits, shift, magnitudes, global_scale, block_scales)
        case "four_over_six":
            choose_four_over_six(bits, shift, magnitudes, global_scale, block_scales)
        case _:
            assert_never(method)
    _write(bits, shift, global_scale, words=words, scratch=scratch, scales=block_scales, packed=packed)


@kernel
def _decode_pairs(packed: Codes, values: NDArray[np.uint64]) -> None:
    """float32 values in pairs, as bits, so that each pair is one store."""
    for i in range(packed.shape[0]):
        pair = np.uint32(packed[i])
        low, high = _value_bits(np.uint32(pair & np.uint32(15))), _value_bits(np.uint32(pair >> np.uint32(4)))
        values[i] = np.uint64(np.uint64(low) | np.uint64(np.uint64(high) << np.uint64(32)))


@kernel
def _multiply(values: Floats, scales: Floats) -> None:
    for i in range(values.shape[0]):
        values[i] = np.float32(values[i] * scales[i])


@kernel
def _decode(
    packed: Codes, block_scales: Codes, global_scale: np.float32, pairs: NDArray[np.uint64], values: Floats
) -> None:
    """``pairs`` [8 n] and ``values`` [16 n] are the same memory."""
    scales, scratch, spread = (
        np.empty(TILE, np.float32),
        np.empty(4 * TILE, np.uint64),
        np.empty(8 * TILE, np.uint64),
    )
    for start in range(0, block_scales.shape[0], TILE):
        end = min(start + TILE, block_scales.shape[0])
        _decode_pairs(packed[8 * start : 8 * end], pairs[8 * start : 8 * end])
        for b in range(end - start):
            scales[b] = np.float32(_value_e4m3(block_scales[start + b]) * global_scale)
        _spread(scales.view(np.uint32), scratch, spread)
        _multiply(values[BLOCK * start : BLOCK * end], spread.view(np.float32))


def encode(
    weight: Weight | gpu.OnGpu,
    global_decode_scale: float | np.float32,
    method: str = "max",
    out: tuple[Codes, Codes] | None = None,
    device: Device = "cpu",
) -> tuple[Codes, Codes]:
    """Weight [out, in] -> packed codes [out, in/2] and E4M3 block scales [out, in/16], both uint8.

    The weight is uint16 bf16 patterns or float32, C-contiguous and finite; codes are packed two per byte.
    ``out`` is a pair of buffers of these shapes to write into and return. ``global_decode_scale`` must be the
    one of the same method. Raises ValueError for a wrong dtype, layout or buffer, an input dimension that 16
    does not divide, an unknown method, or a scale that is not positive.
    """
    if gpu.chosen(device):
        weight = gpu.put(weight)
    if not isinstance(weight, gpu.OnGpu):
        weight_bits(weight)
    scale = checked_scale(global_decode_scale, "global_decode_scale")
    known = FORMATS["nvfp4"].checked_method(method)
    packed, block_scales = _outputs(weight.shape, out)
    if isinstance(weight, gpu.OnGpu):
        from nemoquant.formats import nvfp4_gpu

        nvfp4_gpu.encode(weight, scale, known, packed, block_scales)
    else:
        _encode(weight, scale, known, packed.reshape(-1), block_scales.reshape(-1))
    return packed, block_scales


def encode_activations(values: Floats, global_decode_scale: float | np.float32) -> tuple[Codes, Codes]:
    """A GEMM's input [tokens, in] -> packed codes [tokens, in/2], E4M3 block scales [tokens, in/16].

    The input is float32 and C-contiguous, both results are uint8. NaN makes the scale of its block NaN, and
    so the whole block. Raises ValueError for a wrong dtype or layout, an input dimension that 16 does not
    divide, or a scale that is not positive.
    """
    weight_bits(values)
    scale = checked_scale(global_decode_scale, "global_decode_scale")
    packed, block_scales = _outputs(values.shape, None)
    _encode(values, scale, None, packed.reshape(-1), block_scales.reshape(-1))
    return packed, block_scales


def zeros(shape: tuple[int, int], out: tuple[Codes, Codes] | None = None) -> tuple[Codes, Codes]:
    """A degenerate weight [out, in]: codes 0x00 [out, in/2], block scales 1.0 (0x38) [out, in/16].

    (Divided by the scale 1.0, tiny negative values would give the code 0x8.)
    """
    packed, block_scales = _outputs(shape, out)
    packed.fill(0)
    block_scales.fill(e4m3.ONE)
    return packed, block_scales


def _outputs(shape: tuple[int, ...], out: tuple[Codes, Codes] | None) -> tuple[Codes, Codes]:
    return block_outputs(shape, out, block=BLOCK, bits=4, name="packed codes")


def decode(
    packed: Codes,
    block_scales: Codes,
    global_decode_scale: float | np.float32,
    out: Floats | None = None,
    device: Device = "cpu",
) -> Floats:
    """Packed codes [out, in/2] and E4M3 block scales [out, in/16] -> float32 [out, in].

    Both inputs are uint8; a value is ``code * fp32(block_scale * global_decode_scale)``. ``out`` is a float32
    buffer [out, in] to write into and return. Raises ValueError for a wrong dtype, shapes that do not match,
    or a scale that is not positive.
    """
    scale = checked_scale(global_decode_scale, "global_decode_scale")
    rows, blocks = block_scales.shape
    if packed.shape != (rows, blocks * BLOCK // 2):
        raise ValueError(
            f"packed: got shape {packed.shape}, expected {(rows, blocks * BLOCK // 2)} for scales "
            f"{block_scales.shape}"
        )
    values = float_output(out, (rows, blocks * BLOCK))
    codes, scales, row = (
        flat(packed, np.uint8, "packed"),
        flat(block_scales, np.uint8, "block_scales"),
        values.reshape(-1),
    )
    if gpu.chosen(device):
        from nemoquant.formats import nvfp4_gpu

        values[...] = nvfp4_gpu.decoded(packed, block_scales, scale).cpu().numpy()
    else:
        _decode(codes, scales, scale, row.view(np.uint64), row)
    return values


class Nvfp4:
    """See :class:`nemoquant.formats.arithmetic.Arithmetic`."""

    format = FORMATS["nvfp4"]

    def decode_scale(self, amax: float | np.float32, method: str = "max") -> TensorScale:
        return TensorScale(*tensor_scale(amax, _largest(method)))

    def encode(self, weight: Weight | gpu.OnGpu, scale: np.float32, method: str = "max") -> Encoded:
        return Encoded(*encode(weight, scale, method))

    def zeros(self, shape: tuple[int, int]) -> Encoded:
        return Encoded(*zeros(shape))

    def decode(
        self, encoded: Encoded, scale: np.float32, out: Floats | None = None, device: Device = "cpu"
    ) -> Floats:
        assert encoded.block_scales is not None
        return decode(encoded.codes, encoded.block_scales, scale, out, device)

    def decoded_on_gpu(self, encoded: Encoded, scale: np.float32) -> Any:
        from nemoquant.formats import nvfp4_gpu

        assert encoded.block_scales is not None
        return nvfp4_gpu.decoded(encoded.codes, encoded.block_scales, scale)

    def encode_inputs(self, x: Floats, scale: np.float32) -> Encoded:
        return Encoded(*encode_activations(x, scale))

    def round_trip_on_gpu(self, x: Any, scale: np.float32) -> Any:
        from nemoquant.formats import nvfp4_gpu

        return nvfp4_gpu.rounded(x, scale)

    def limit(self, scale: np.float32) -> float:
        """The largest value in a block with the largest scale.

        A block's own scale is rounded to the nearest E4M3 value, so its largest value may be clipped by up to
        a sixteenth. That belongs to the format and counts as error, not as saturation.
        """
        return BEYOND_ROUNDING * e2m1.MAX * e4m3.MAX * float(scale)

    def floored(self, block_scales: Codes) -> int:
        """2^-9. (A block of zeros has 1.0.)"""
        return int(np.count_nonzero(block_scales == 1))

    def bad_scales(self, block_scales: Codes) -> int:
        """Not one of the 126 positive finite E4M3 values."""
        return int(np.count_nonzero((block_scales < 1) | (block_scales > e4m3.LARGEST_CODE)))

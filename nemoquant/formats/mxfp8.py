"""MXFP8: E4M3 codes in blocks of 32 inputs, one E8M0 scale per block, no scale of the whole tensor.

    value = code * 2^e,    block_scale = e + 127
    e     = the smallest integer with fp32(block_amax / 448) <= 2^e, at least -127 and at most 127
    codes = e4m3(w * 2^-e), rounded once

A block's largest value becomes a code between 224 and 448: rounded up, the scale makes none saturate. (But
248 * 2^120 and more is rounded to 2^128, which float32 does not have, and so is decoded to Inf.) A block of
zeros gets the byte 0, which is 2^-127. Source: OCP Microscaling Formats (MX) v1.0, 6.3, for the format;
for the scale Model Optimizer 0.47 (``MXFP8QTensor``). (OCP's own example takes the power of two at or below
block_amax / 256, which clips the largest values.)

The exponent is read from the bits of the quotient. Model Optimizer takes ceil(log2(quotient)) in fp32; a few
ulp above a power of two that logarithm is a whole number already. So for some float32 blocks their scale is
half of ours, and the largest value saturates: an amax of 7.0000005 gives 2^-6 there, 2^-5 here. A bf16 amax
is never that near to 448 * 2^e without being equal, and all bytes agree.

Inputs are encoded at run time in the same way. NaN makes the scale of its block NaN (0xFF), and so the whole
block, whatever its codes, which are e4m3 of the values as they are. Inf gives its block 2^127, as the clamp
says: Inf is decoded to Inf, because 448 * 2^127 is above float32's largest number, and most other values to
zero. (Model Optimizer writes the same bytes for Inf, but has no NaN scales.)
"""

from typing import Any

import numpy as np

from nemoquant.formats import FORMATS, Device, blocks, e4m3, e8m0, gpu
from nemoquant.formats.arithmetic import Encoded, TensorScale
from nemoquant.formats.blocks import PAIR, Bits
from nemoquant.formats.rounding import (
    Codes,
    Floats,
    Weight,
    bits_of,
    block_outputs,
    checked_amax,
    flat,
    float_of,
    float_output,
    kernel,
    weight_bits,
    widen,
)

BLOCK = 32
LARGEST = float(np.nextafter(np.float32(248 * 2.0**120), np.float32(0)))  # what rounds to 240 * 2^120
_TILE = 64  # blocks

_encode_one = e4m3.encode_one
_value_of = e4m3.value_of
_ceil_code = e8m0.ceil_code
_scale_bits = e8m0.value_bits
_NAN = e8m0.NAN
_largest = blocks.largest
_larger_of_pairs = blocks.larger_of_pairs


@kernel
def _block_scales(magnitudes: Bits, shift: np.uint32, codes: Codes, factors: Floats) -> None:
    """The scale of each block from the pattern of its largest magnitude, and 1 / scale as float32.

    1 / scale is 2^(127 - code), the value of the code 254 - code; 1.0 where the scale is NaN.
    """
    for b in range(magnitudes.shape[0]):
        quotient = np.float32(widen(magnitudes[b], shift) / np.float32(448))
        code = np.uint32(_ceil_code(bits_of(quotient)))
        codes[b] = np.uint8(code)
        inverse = _scale_bits(np.uint32(np.uint32(254) - code))
        factors[b] = np.float32(1) if code == np.uint32(_NAN) else float_of(inverse)


@kernel
def _write_codes(bits: Bits, shift: np.uint32, factors: Floats, codes: Codes) -> None:
    """``bits`` and ``codes`` [n, 32]."""
    for b in range(factors.shape[0]):
        factor = factors[b]
        for i in range(BLOCK):
            codes[b, i] = _encode_one(np.float32(widen(bits[b, i], shift) * factor))


@kernel
def _encode(bits: Bits, pairs: Bits, shift: np.uint32, codes: Codes, block_scales: Codes) -> None:
    """A tile of blocks at a time, whose weights are still in the cache when their scales are known.

    Args:
        bits, pairs: [n, 32] patterns of the weight, and the same memory as flat words of two.
        codes: [n, 32].
        block_scales: [n].
    """
    words, both = np.empty(16 * _TILE, pairs.dtype), np.empty(_TILE, pairs.dtype)
    scratch, halves = words.view(bits.dtype), both.view(bits.dtype)
    magnitudes, factors = np.empty(_TILE, bits.dtype), np.empty(_TILE, np.float32)
    for start in range(0, block_scales.shape[0], _TILE):
        end = min(start + _TILE, block_scales.shape[0])
        n = end - start
        _largest(pairs[16 * start : 16 * end], words, scratch, halves[: 2 * n])
        _larger_of_pairs(both[:n], magnitudes[:n])
        _block_scales(magnitudes[:n], shift, block_scales[start:end], factors[:n])
        _write_codes(bits[start:end], shift, factors[:n], codes[start:end])


@kernel
def _decode(codes: Codes, block_scales: Codes, values: Floats) -> None:
    """``codes`` and ``values`` [n, 32]."""
    for b in range(block_scales.shape[0]):
        scale = float_of(_scale_bits(np.uint32(block_scales[b])))
        for i in range(BLOCK):
            values[b, i] = np.float32(_value_of(codes[b, i]) * scale)


def encode(
    weight: Weight | gpu.OnGpu, out: tuple[Codes, Codes] | None = None, device: Device = "cpu"
) -> tuple[Codes, Codes]:
    """Weight [out, in] -> E4M3 codes [out, in] and E8M0 block scales [out, in/32], both uint8.

    The weight is uint16 bf16 patterns or float32, C-contiguous and finite. ``out`` is a pair of buffers of
    these shapes to write into and return. Raises ValueError for a wrong dtype, layout or buffer, or an input
    dimension that 32 does not divide.
    """
    if gpu.chosen(device):
        weight = gpu.put(weight)
    if isinstance(weight, gpu.OnGpu):
        from nemoquant.formats import mxfp8_gpu

        codes, block_scales = _outputs(weight.shape, out)
        mxfp8_gpu.encode(weight, codes, block_scales)
        return codes, block_scales
    bits, shift = weight_bits(weight)
    codes, block_scales = _outputs(weight.shape, out)
    pairs = bits.view(PAIR[bits.dtype])
    _encode(bits.reshape(-1, BLOCK), pairs, shift, codes.reshape(-1, BLOCK), block_scales.reshape(-1))
    return codes, block_scales


def encode_activations(values: Floats) -> tuple[Codes, Codes]:
    """A GEMM's input [tokens, in] -> E4M3 codes [tokens, in], E8M0 block scales [tokens, in/32], both uint8.

    The input is float32 and C-contiguous; see the top of this file for NaN and Inf. Raises ValueError for a
    wrong dtype or layout, or an input dimension that 32 does not divide.
    """
    if values.dtype != np.float32:
        raise ValueError(f"values: got dtype {values.dtype}, expected float32")
    return encode(values)


def zeros(shape: tuple[int, int], out: tuple[Codes, Codes] | None = None) -> tuple[Codes, Codes]:
    """A degenerate weight [out, in]: codes 0x00 [out, in], block scales 2^-127 (0x00) [out, in/32].

    (Encoded, negative zeros would give the code 0x80.)
    """
    codes, block_scales = _outputs(shape, out)
    codes.fill(0)
    block_scales.fill(0)
    return codes, block_scales


def _outputs(shape: tuple[int, ...], out: tuple[Codes, Codes] | None) -> tuple[Codes, Codes]:
    return block_outputs(shape, out, block=BLOCK, bits=8, name="codes")


def decode(codes: Codes, block_scales: Codes, out: Floats | None = None, device: Device = "cpu") -> Floats:
    """E4M3 codes [out, in] and E8M0 block scales [out, in/32], both uint8 -> float32 [out, in].

    A value is ``code * 2^(block_scale - 127)``, exact with subnormal results too; Inf above float32's largest
    number. ``out`` is a float32 buffer [out, in] to write into and return. Raises ValueError for a wrong
    dtype, or shapes that do not match.
    """
    rows, count = block_scales.shape
    if codes.shape != (rows, count * BLOCK):
        raise ValueError(
            f"codes: got shape {codes.shape}, expected {(rows, count * BLOCK)} for scales "
            f"{block_scales.shape}"
        )
    values = float_output(out, codes.shape)
    row, scales = flat(codes, np.uint8, "codes"), flat(block_scales, np.uint8, "block_scales")
    if gpu.chosen(device):
        from nemoquant.formats import mxfp8_gpu

        values[...] = mxfp8_gpu.decoded(codes, block_scales).cpu().numpy()
    else:
        _decode(row.reshape(-1, BLOCK), scales, values.reshape(-1, BLOCK))
    return values


def _check_scale(scale: np.float32) -> None:
    if scale != 1:
        raise ValueError(f"scale: got {scale}, expected 1.0: mxfp8 has no scale of the whole tensor")


class Mxfp8:
    """See :class:`nemoquant.formats.arithmetic.Arithmetic`; each method refuses a scale other than 1.0."""

    format = FORMATS["mxfp8"]

    def decode_scale(self, amax: float | np.float32, method: str = "max") -> TensorScale:
        self.format.checked_method(method)
        return TensorScale(np.float32(1), degenerate=bool(checked_amax(amax) == 0))

    def encode(self, weight: Weight | gpu.OnGpu, scale: np.float32, method: str = "max") -> Encoded:
        self.format.checked_method(method)
        _check_scale(scale)
        return Encoded(*encode(weight))

    def zeros(self, shape: tuple[int, int]) -> Encoded:
        return Encoded(*zeros(shape))

    def decode(
        self, encoded: Encoded, scale: np.float32, out: Floats | None = None, device: Device = "cpu"
    ) -> Floats:
        assert encoded.block_scales is not None
        _check_scale(scale)
        return decode(encoded.codes, encoded.block_scales, out, device)

    def decoded_on_gpu(self, encoded: Encoded, scale: np.float32) -> Any:
        from nemoquant.formats import mxfp8_gpu

        assert encoded.block_scales is not None
        _check_scale(scale)
        return mxfp8_gpu.decoded(encoded.codes, encoded.block_scales)

    def encode_inputs(self, x: Floats, scale: np.float32) -> Encoded:
        _check_scale(scale)
        return Encoded(*encode_activations(x))

    def round_trip_on_gpu(self, x: Any, scale: np.float32) -> Any:
        from nemoquant.formats import mxfp8_gpu

        _check_scale(scale)
        return mxfp8_gpu.rounded(x)

    def limit(self, scale: np.float32) -> float:
        """The largest number that is not decoded to Inf; below it no value saturates."""
        _check_scale(scale)
        return LARGEST

    def floored(self, block_scales: Codes) -> int:  # noqa: ARG002
        """2^-127 serves values below any bf16 number that is normal; blocks of zeros have it too."""
        return 0

    def bad_scales(self, block_scales: Codes) -> int:
        """NaN. (The byte 0, which is 2^-127, is right for blocks of zeros.)"""
        return int(np.count_nonzero(block_scales == e8m0.NAN))

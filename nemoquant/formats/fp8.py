"""FP8 per tensor: one fp32 ``decode_scale`` multiplies E4M3 codes into values.

    decode_scale = amax / 448        codes = e4m3(w / decode_scale)

Both divisions are in fp32, and the fp32 quotient is rounded once, to E4M3. (Model Optimizer 0.47 divides a
bf16 weight in bf16, and so rounds twice.)
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoquant.formats import FORMATS, Device, e4m3, gpu
from nemoquant.formats.arithmetic import Encoded, TensorScale
from nemoquant.formats.noise import BEYOND_ROUNDING
from nemoquant.formats.rounding import (
    Codes,
    Floats,
    Weight,
    checked_scale,
    flat,
    float_output,
    kernel,
    output,
    tensor_scale,
    weight_bits,
    widen,
)

_value_of = e4m3.value_of
_encode_one = e4m3.encode_one


def decode_scale(amax: float | np.float32) -> np.float32:
    """``amax / 448`` in fp32; 1.0 where ``is_degenerate(amax)``.

    Raises ValueError if amax is negative, Inf or NaN.
    """
    return tensor_scale(amax, e4m3.MAX)[0]


def is_degenerate(amax: float | np.float32) -> bool:
    """Whether amax is 0, or so small that its scale is not a normal fp32 number.

    Such a weight is written as ``zeros(shape)``. Raises ValueError like ``decode_scale``.
    """
    return tensor_scale(amax, e4m3.MAX)[1]


@kernel
def _encode(
    bits: NDArray[np.unsignedinteger], shift: np.uint32, decode_scale: np.float32, codes: Codes
) -> None:
    for i in range(bits.shape[0]):
        codes[i] = _encode_one(np.float32(widen(bits[i], shift) / decode_scale))


@kernel
def _decode(codes: Codes, decode_scale: np.float32, values: Floats) -> None:
    for i in range(codes.shape[0]):
        values[i] = np.float32(_value_of(codes[i]) * decode_scale)


def encode(
    weight: Weight | gpu.OnGpu,
    decode_scale: float | np.float32,
    out: Codes | None = None,
    device: Device = "cpu",
) -> Codes:
    """Weight [out, in] (uint16 bf16 patterns or float32, C-contiguous, finite) -> uint8 E4M3 codes [out, in].

    ``out`` is a uint8 buffer [out, in] to write into and return. Magnitudes above ``448 * decode_scale``
    saturate; so a scale that a group shares must come from the largest amax in it. Raises ValueError for a
    wrong dtype, layout or buffer, or a scale that is not positive.
    """
    if gpu.chosen(device):
        weight = gpu.put(weight)
    scale = checked_scale(decode_scale, "decode_scale")
    codes = output(out, weight.shape, "out")
    if isinstance(weight, gpu.OnGpu):
        from nemoquant.formats import fp8_gpu

        fp8_gpu.encode(weight, scale, codes)
    else:
        _encode(*weight_bits(weight), scale, codes.reshape(-1))
    return codes


def zeros(shape: tuple[int, int], out: Codes | None = None) -> Codes:
    """The codes of a degenerate weight [out, in]: all 0x00.

    (Divided by the scale 1.0, tiny negative values would give 0x80.)
    """
    codes = output(out, tuple(shape), "out")
    codes.fill(0)
    return codes


def decode(
    codes: Codes, decode_scale: float | np.float32, out: Floats | None = None, device: Device = "cpu"
) -> Floats:
    """uint8 E4M3 codes of any shape -> ``value * decode_scale``, float32 of that shape, one fp32 rounding.

    ``out`` is a float32 buffer of that shape to write into and return.
    Raises ValueError for another dtype or a scale that is not positive.
    """
    scale = checked_scale(decode_scale, "decode_scale")
    values = float_output(out, codes.shape)
    row = flat(codes, np.uint8, "codes")
    if gpu.chosen(device):
        from nemoquant.formats import fp8_gpu

        values[...] = fp8_gpu.decoded(codes, scale).cpu().numpy()
    else:
        _decode(row, scale, values.reshape(-1))
    return values


class Fp8:
    """See :class:`nemoquant.formats.arithmetic.Arithmetic`."""

    format = FORMATS["fp8"]

    def decode_scale(self, amax: float | np.float32, method: str = "max") -> TensorScale:
        self.format.checked_method(method)
        return TensorScale(*tensor_scale(amax, e4m3.MAX))

    def encode(self, weight: Weight | gpu.OnGpu, scale: np.float32, method: str = "max") -> Encoded:
        self.format.checked_method(method)
        return Encoded(encode(weight, scale), None)

    def zeros(self, shape: tuple[int, int]) -> Encoded:
        return Encoded(zeros(shape), None)

    def decode(
        self, encoded: Encoded, scale: np.float32, out: Floats | None = None, device: Device = "cpu"
    ) -> Floats:
        return decode(encoded.codes, scale, out, device)

    def decoded_on_gpu(self, encoded: Encoded, scale: np.float32) -> Any:
        from nemoquant.formats import fp8_gpu

        return fp8_gpu.decoded(encoded.codes, scale)

    def encode_inputs(self, x: Floats, scale: np.float32) -> Encoded:
        return Encoded(encode(x, scale), None)

    def round_trip_on_gpu(self, x: Any, scale: np.float32) -> Any:
        from nemoquant.formats import fp8_gpu

        return fp8_gpu.rounded(x, scale)

    def limit(self, scale: np.float32) -> float:
        return BEYOND_ROUNDING * e4m3.MAX * float(scale)

    def floored(self, block_scales: Codes) -> int:  # noqa: ARG002
        return 0

    def bad_scales(self, block_scales: Codes) -> int:  # noqa: ARG002
        return 0

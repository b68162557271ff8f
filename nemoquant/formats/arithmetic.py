"""The object that each format's module offers: everything that the stages after the plan ask of a format.

A weight or input has three parts: codes, block scales (None where the format has none), and the scale of the
whole tensor (1.0 where the format has none).
"""

from typing import Any, NamedTuple, Protocol

import numpy as np

from nemoquant.formats import Device, Format
from nemoquant.formats.gpu import OnGpu
from nemoquant.formats.rounding import Codes, Floats, Weight


class Encoded(NamedTuple):
    """Codes, uint8 [out, in] or packed [out, in/2], and block scales, uint8 [out, in/block] or None."""

    codes: Codes
    block_scales: Codes | None


class TensorScale(NamedTuple):
    """The scale of a whole tensor, and whether the tensor is degenerate: too small for a scale, all zeros."""

    value: np.float32
    degenerate: bool


class Arithmetic(Protocol):
    """One format's arithmetic. A value is ``code * scale`` in fp32, see the module of the format."""

    @property
    def format(self) -> Format:
        """Its row in the table of formats."""

    def decode_scale(self, amax: float | np.float32, method: str = "max") -> TensorScale:
        """The scale of a tensor whose largest magnitude is ``amax``.

        Raises ValueError for an amax that is negative, Inf or NaN, and for an unknown method.
        """

    def encode(self, weight: Weight | OnGpu, scale: np.float32, method: str = "max") -> Encoded:
        """A weight [out, in] (uint16 bf16 patterns or float32, C-contiguous, finite), encoded where it is.

        Raises ValueError for a wrong dtype or layout, or a dimension that the block does not divide.
        """

    def zeros(self, shape: tuple[int, int]) -> Encoded:
        """A degenerate weight [out, in]."""

    def decode(
        self, encoded: Encoded, scale: np.float32, out: Floats | None = None, device: Device = "cpu"
    ) -> Floats:
        """The values, float32 [out, in], in ``out`` where that is given.

        Raises ValueError for a wrong dtype, or shapes that do not match.
        """

    def decoded_on_gpu(self, encoded: Encoded, scale: np.float32) -> Any:
        """:meth:`decode` as a tensor on the GPU."""

    def encode_inputs(self, x: Floats, scale: np.float32) -> Encoded:
        """A GEMM's input, float32 [tokens, in], as engines encode it; ``scale`` is its calibrated one."""

    def round_trip_on_gpu(self, x: Any, scale: np.float32) -> Any:
        """A float32 tensor [..., in] on the GPU through :meth:`encode_inputs` and back, as a new tensor."""

    def limit(self, scale: np.float32) -> float:
        """The largest magnitude that a tensor with this scale can hold."""

    def floored(self, block_scales: Codes) -> int:
        """How many block scales are the smallest there is, so that their blocks are rounded more coarsely.

        0 for formats without block scales, or whose range holds those of any weight.
        """

    def bad_scales(self, block_scales: Codes) -> int:
        """How many block scales no encoder writes: NaN, negative, or zero. 0 for formats without them."""


def round_trip(arithmetic: Arithmetic, x: Floats, scale: np.float32, out: Floats) -> None:
    """Fake quantization on the CPU: ``x`` [tokens, in] through codes and back, into ``out``."""
    arithmetic.decode(arithmetic.encode_inputs(x, scale), scale, out)

"""Quantized weights and activations in an engine's arithmetic: decoded in slices of rows, in threads.

The arithmetic is that of the formats: a weight is ``code * scale`` in fp32; an input is encoded with its
calibrated scale, where the format has one, and with block scales computed at run time, and decoded again.
Products are in float32. On a GPU all of this runs there: only codes and scales of a weight are copied.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from nemoquant.formats import FORMATS, FormatName, gpu, noise
from nemoquant.formats.arithmetic import Encoded, round_trip
from nemoquant.formats.noise import Noise
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.formats.rounding import Floats, Weight

# Elements of a tensor that one thread works on at a time: they stay in its caches from encoding to the sums.
PIECE_ELEMENTS = 1 << 18


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _in_pieces(function: Callable[[slice], Noise | None], rows: int, width: int) -> list[Noise | None]:
    """``function`` of slices that cover ``rows`` rows, in torch's number of threads; results in order."""
    step = max(1, PIECE_ELEMENTS // max(1, width))
    pieces = [slice(start, start + step) for start in range(0, rows, step)]
    if len(pieces) < 2:
        return [function(piece) for piece in pieces]
    return list(_pool(torch.get_num_threads()).map(function, pieces))


def _total(parts: list[Noise | None]) -> Noise:
    total = Noise()
    for part in parts:
        assert part is not None
        total += part
    return total


@dataclass(frozen=True)
class PackedWeight:
    """A mapped weight [out, in] of a quantized checkpoint; ``taps.product`` decodes it by ``to``.

    Attributes:
        encoded: codes and block scales.
        scale: the decode scale of the whole tensor, 1.0 where the format has none.
    """

    format: FormatName
    encoded: Encoded
    scale: np.float32

    dtype = torch.uint8

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.encoded.codes.shape
        return rows, width * 8 // FORMATS[self.format].weight_bits

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def __getitem__(self, rows: slice) -> "PackedWeight":
        codes, blocks = self.encoded
        part = Encoded(codes[rows], None if blocks is None else blocks[rows])
        return PackedWeight(self.format, part, self.scale)

    def to(self, like: Tensor) -> Tensor:
        """Decoded, with the dtype and device of ``like``."""
        if gpu.computes(like.device):
            on_gpu: Tensor = ARITHMETIC[self.format].decoded_on_gpu(self.encoded, self.scale)
            return on_gpu.to(like.dtype)
        values = np.empty(self.shape, np.float32)
        _in_pieces(lambda rows: self[rows].decode(values[rows]), *self.shape)
        return torch.from_numpy(values).to(like)

    def decode(self, out: Floats) -> None:
        """Write the values into a float32 buffer [out, in]."""
        ARITHMETIC[self.format].decode(self.encoded, self.scale, out)

    @property
    def limit(self) -> float:
        """The largest magnitude that it can represent."""
        return ARITHMETIC[self.format].limit(self.scale)

    def noise(self, weight: Weight) -> Noise:
        """Noise against the source's ``weight`` [out, in], bf16 bit patterns or float32."""

        def piece(rows: slice) -> Noise:
            part = self[rows]
            values = np.empty(part.shape, np.float32)
            part.decode(values)
            return noise.measure(weight[rows], values, self.limit)

        return _total(_in_pieces(piece, *self.shape))


def plain_noise(weight: Weight, other: Weight) -> Noise:
    """Noise of ``other`` against ``weight``: unquantized, [out, in], bf16 bit patterns or float32."""

    def piece(rows: slice) -> Noise:
        part = other[rows]
        values = (
            part if part.dtype == np.float32 else torch.from_numpy(part).view(torch.bfloat16).float().numpy()
        )
        return noise.measure(weight[rows], np.ascontiguousarray(values), np.inf)

    return _total(_in_pieces(piece, *weight.shape))


def rounded(x: Tensor, format: FormatName, scale: np.float32) -> Tensor:
    """``x`` [..., in] float32 as :func:`fake_quantize` rounds it, in a third of the time."""
    arithmetic = ARITHMETIC[format]
    if gpu.computes(x.device):
        on_gpu: Tensor = arithmetic.round_trip_on_gpu(x, scale)
        return on_gpu
    values: Floats = x.contiguous().view(-1, x.shape[-1]).numpy()
    out = np.empty_like(values)
    _in_pieces(lambda rows: round_trip(arithmetic, values[rows], scale, out[rows]), *values.shape)
    return torch.from_numpy(out).view(x.shape)


def fake_quantize(x: Tensor, format: FormatName, scale: np.float32) -> tuple[Tensor, Noise]:
    """``x`` [..., in] float32 encoded and decoded, as a new tensor, and the noise that this added.

    Args:
        scale: the calibrated one of the whole input, 1.0 where the format has none; blocks get theirs here.
    """
    arithmetic = ARITHMETIC[format]
    limit = arithmetic.limit(scale)
    if gpu.computes(x.device):
        on_gpu = rounded(x, format, scale)
        return on_gpu, _noise_on_gpu(x, on_gpu, limit)
    values: Floats = x.contiguous().view(-1, x.shape[-1]).numpy()
    out = np.empty_like(values)

    def piece(rows: slice) -> Noise:
        part = values[rows]
        round_trip(arithmetic, part, scale, out[rows])
        return noise.measure(part, out[rows], limit)

    total = _total(_in_pieces(piece, *values.shape))
    return torch.from_numpy(out).view(x.shape), total


def _noise_on_gpu(values: Tensor, decoded: Tensor, limit: float) -> Noise:
    """``noise.measure`` of float32 tensors on their device.

    Differences are rounded to float32 before their squares are summed in float64.
    """
    magnitude = values.abs()
    sums = [
        torch.linalg.vector_norm(values, dtype=torch.float64).square(),
        torch.linalg.vector_norm(values - decoded, dtype=torch.float64).square(),
        (magnitude > min(limit, torch.finfo(torch.float32).max)).sum().double(),
        ((magnitude > 0) & (decoded == 0)).sum().double(),
    ]
    signal, error, saturated, flushed = torch.stack(sums).tolist()  # one wait for the GPU
    return Noise(signal, error, int(saturated), int(flushed), values.numel())

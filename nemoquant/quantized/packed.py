"""Quantized weights and activations in an engine's arithmetic: decoded in slices of rows, in threads.

The arithmetic is that of the formats: a weight is ``code * scale`` in fp32; an input is encoded with its
calibrated scale (NVFP4 also with block scales, computed at run time) and decoded again. Products are in
float32. On a GPU all of this runs there (``formats/gpu.py``): only codes and scales of a weight are copied.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from nemoquant.formats import fp8, gpu, noise, nvfp4
from nemoquant.formats.noise import Noise
from nemoquant.formats.rounding import Codes, Floats, Weight

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
        codes: uint8 [out, in] (fp8) or [out, in/2] (nvfp4).
        block_scales: E4M3 codes, uint8 [out, in/16], nvfp4 only.
        scale: the decode scale of the whole tensor.
    """

    format: str
    codes: Codes
    block_scales: Codes | None
    scale: np.float32

    dtype = torch.uint8

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * (1 if self.block_scales is None else 2)

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def __getitem__(self, rows: slice) -> "PackedWeight":
        blocks = None if self.block_scales is None else self.block_scales[rows]
        return PackedWeight(self.format, self.codes[rows], blocks, self.scale)

    def to(self, like: Tensor) -> Tensor:
        """Decoded, with the dtype and device of ``like``."""
        if gpu.computes(like.device):
            return self._decoded_on_gpu().to(like.dtype)
        values = np.empty(self.shape, np.float32)
        _in_pieces(lambda rows: self[rows].decode(values[rows]), *self.shape)
        return torch.from_numpy(values).to(like)

    def _decoded_on_gpu(self) -> Tensor:
        """Decoded on the GPU, float32."""
        decoded: Tensor = (
            gpu.fp8_decoded(self.codes, self.scale)
            if self.block_scales is None
            else gpu.nvfp4_decoded(self.codes, self.block_scales, self.scale)
        )
        return decoded

    def decode(self, out: Floats) -> None:
        """Write the values into a float32 buffer [out, in]."""
        if self.block_scales is None:
            fp8.decode(self.codes, self.scale, out)
        else:
            nvfp4.decode(self.codes, self.block_scales, self.scale, out)

    @property
    def limit(self) -> float:
        """The largest magnitude that it can represent."""
        return _limit(self.format, self.scale)

    def noise(self, weight: Weight) -> Noise:
        """Noise against the source's ``weight`` [out, in], bf16 bit patterns or float32."""

        def piece(rows: slice) -> Noise:
            part = self[rows]
            values = np.empty(part.shape, np.float32)
            part.decode(values)
            return noise.measure(weight[rows], values, self.limit)

        return _total(_in_pieces(piece, *self.shape))


def _limit(format: str, scale: np.float32) -> float:
    return noise.fp8_limit(scale) if format == "fp8" else noise.nvfp4_limit(scale)


def plain_noise(weight: Weight, other: Weight) -> Noise:
    """Noise of ``other`` against ``weight``: unquantized, [out, in], bf16 bit patterns or float32."""

    def piece(rows: slice) -> Noise:
        part = other[rows]
        values = (
            part if part.dtype == np.float32 else torch.from_numpy(part).view(torch.bfloat16).float().numpy()
        )
        return noise.measure(weight[rows], np.ascontiguousarray(values), np.inf)

    return _total(_in_pieces(piece, *weight.shape))


def fake_quantize(x: Tensor, format: str, scale: np.float32) -> tuple[Tensor, Noise]:
    """``x`` [..., in] float32 encoded and decoded, as a new tensor, and the noise that this added.

    Args:
        format: ``fp8`` (``code = e4m3(x / scale)``) or ``nvfp4`` (``scale`` is the global one; blocks of 16
            get theirs here).
    """
    if gpu.computes(x.device):
        rounded: Tensor = (gpu.fp8_rounded if format == "fp8" else gpu.nvfp4_rounded)(x, scale)
        return rounded, _noise_on_gpu(x, rounded, _limit(format, scale))
    values: Floats = x.contiguous().view(-1, x.shape[-1]).numpy()
    out = np.empty_like(values)

    def piece(rows: slice) -> Noise:
        part = values[rows]
        if format == "fp8":
            encoded = PackedWeight(format, fp8.encode(part, scale), None, scale)
        else:
            encoded = PackedWeight(format, *nvfp4.encode_activations(part, scale), scale)
        encoded.decode(out[rows])
        return noise.measure(part, out[rows], encoded.limit)

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

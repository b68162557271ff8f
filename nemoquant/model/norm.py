"""RMS norms (Zhang and Sennrich 2019, arXiv:1910.07467), in float32, rounded once to the compute dtype.

Both norms compute blocks of rows, so that float32 intermediates stay in the caches and take little memory
beside the layer.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1 << 18  # elements


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of about ``BLOCK`` elements that cover ``rows`` rows of ``width`` elements."""
    size = max(1, BLOCK // width)
    return (slice(start, start + size) for start in range(0, rows, size))


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` over the last dimension, which is kept as 1."""
    return torch.rsqrt(
        torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps)
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)``, the mean over the last dimension.

    x [..., D], weight [D] -> shape and dtype of x.
    """
    rows, factor = x.reshape(-1, x.shape[-1]), weight.to(x.device).float()
    y = torch.empty_like(rows)
    for part in blocks(*rows.shape):
        block = rows[part].float()
        torch.mul(block * inverse_rms(block, eps), factor, out=y[part])
    return y.view(x.shape)


def gated_group_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """The norm before a Mamba-2 mixer's last projection: gate by ``silu(z)``, then one RMS per group.

    Args:
        y: [..., D] float32, the scan's output.
        z: [..., D], the gate, in the compute dtype.
        weight: [D].
        groups: number of equal, contiguous groups of channels in D.
    Returns:
        [..., D] in the dtype of ``z``.
    """
    shape = (-1, groups, z.shape[-1] // groups)
    gates, rows, factor = z.reshape(shape), y.reshape(shape), weight.to(z.device).float().view(shape[1:])
    out = torch.empty_like(gates)
    for part in blocks(gates.shape[0], z.shape[-1]):
        gated = F.silu(gates[part].float()).mul_(rows[part])
        torch.mul(gated.mul_(inverse_rms(gated, eps)), factor, out=out[part])
    return out.view(z.shape)

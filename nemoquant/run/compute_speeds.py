"""This machine's speed in the parts of calibration: products, and the rest of a Mamba-2 mixer."""

from collections.abc import Callable

import torch
from torch import Tensor

from nemoquant.calibrate.batch import Batch, RowBatch, rows_of
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.formats import Device
from nemoquant.formats.gpu import torch_device
from nemoquant.machine import torch_threads
from nemoquant.model import names
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.reference import layer_forward
from nemoquant.model.taps import product
from nemoquant.run.timing import seconds

MIXER_TOKENS = 256


def compute_speeds(
    checkpoint: Checkpoint,
    config: NemotronHConfig,
    batch: Batch,
    *,
    row_batch: RowBatch,
    threads: int,
    device: Device,
) -> tuple[float, float, float]:
    """``product``, ``expert`` and ``mixer`` of :class:`nemoquant.run.speeds.Speeds`.

    They are measured with ``threads`` threads, or on a GPU.
    """
    c, tokens = config, batch.length
    like = torch.empty(0, dtype=getattr(torch, batch.dtype), device=torch_device(device))
    with torch_threads(threads):
        together = min(1024, tokens * min(rows_of(row_batch, kind) for kind in set(c.layers)))
        fast = _product(together, c.hidden_size, min(2048, 2 * c.hidden_size), 2, like)
        expert = fast
        if c.count("moe"):
            moe = c.of_layer(c.layers.index("moe"))
            share = max(1, int(tokens * rows_of(row_batch, "moe") * moe.routed_share))
            expert = _product(share, moe.expert_input, moe.moe_intermediate_size, 8, like)
        mixer = _mixer(checkpoint, c, min(tokens, MIXER_TOKENS), fast, like) if c.count("mamba") else 0.0
    return fast, expert, mixer


def _product(tokens: int, width: int, out: int, weights: int, like: Tensor) -> float:
    """flop/s over several weights, so that they do not all fit a cache; dtype and device are of ``like``."""
    x = like.new_ones(tokens, width)
    matrices = like.new_ones(weights, out, width)
    _seconds(lambda: product(x, matrices[0]), like)  # compiles it for this shape
    return 2 * x.numel() * out * weights / _seconds(lambda: [product(x, m) for m in matrices], like)


def _mixer(checkpoint: Checkpoint, config: NemotronHConfig, tokens: int, rate: float, like: Tensor) -> float:
    """Seconds a token of the first Mamba-2 layer, without its products."""
    layer = config.layers.index("mamba")
    weights = LayerWeights(checkpoint, names.layer(layer))
    own = config.of_layer(layer)
    x = like.new_ones(1, tokens, own.hidden_size)
    _seconds(lambda: layer_forward(own, "mamba", weights, x), like)
    took = _seconds(lambda: layer_forward(own, "mamba", weights, x), like)
    weights.release()
    elements = own.hidden_size * (2 * own.mamba_inner + own.conv_channels + own.mamba_num_heads)
    return max(0.0, took - 2 * tokens * elements / rate) / tokens


def _seconds(work: Callable[[], object], like: Tensor) -> float:
    """Duration of ``work`` in seconds, until the device of ``like`` has finished it."""

    def done() -> None:
        work()
        if like.is_cuda:
            torch.cuda.synchronize(like.device)

    return seconds(done)

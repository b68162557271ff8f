"""One layer over all rows, in batches of rows and segments of positions: they bound the memory.

Streams, scan states and figures are on the CPU. A device holds one batch and segment at a time, and the
weights as they are used.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemoquant.evaluate.metrics import shared
from nemoquant.evaluate.schema import Error, Routing
from nemoquant.formats.noise import decibels
from nemoquant.model import names
from nemoquant.model.config import LayerKind, NemotronHConfig
from nemoquant.model.kinds import KINDS
from nemoquant.model.mamba2 import MambaState
from nemoquant.model.moe import route
from nemoquant.model.norm import rms_norm
from nemoquant.model.reference import LayerState, layer_forward
from nemoquant.model.taps import Scope, Tap, Weights

BATCH_BYTES = 384 << 20  # of a layer's intermediate values, about
# On a GPU a batch copies all experts' weights there, which takes longer than its products: so it is larger.
MOE_BATCH_BYTES = 2 << 30
SEGMENT = 2048  # positions of a row that go through a layer at once; its state carries over

Sink = Callable[[slice, slice, Tensor], None]  # rows, positions, the layer's output there


@dataclass
class Energy:
    """Sums of squares, float64: of a difference, and of the signal that it is compared with."""

    error: float = 0.0
    signal: float = 0.0

    def add(self, value: Tensor, reference: Tensor, base: Tensor | None = None) -> None:
        """Add ``value`` against ``reference``; the signal is the change from ``base`` to ``reference``."""
        self.error += _square(value - reference)
        self.signal += _square(reference if base is None else reference - base)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.error) and math.isfinite(self.signal)

    def result(self) -> Error:
        relative = math.sqrt(self.error / self.signal) if self.signal else float(self.error > 0)
        return Error(relative=relative, sqnr_db=decibels(self.signal, self.error))


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def batches(
    config: NemotronHConfig, kind: LayerKind, rows: int, length: int, device: torch.device
) -> Iterator[slice]:
    """Slices of rows whose intermediate values fit ``BATCH_BYTES``, or ``MOE_BATCH_BYTES`` on a GPU."""
    width = KINDS[kind].live_values(config) + 3 * config.hidden_size  # float32 values a token
    room = BATCH_BYTES
    if kind == "moe" and device.type != "cpu":
        room = MOE_BATCH_BYTES
    size = max(1, room // (4 * width * min(length, SEGMENT)))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def run_layer(
    config: NemotronHConfig,
    kind: LayerKind,
    weights: Weights,
    x: Tensor,
    tap: Tap,
    sink: Sink,
    *,
    device: torch.device,
) -> Tensor | None:
    """``layer_forward`` of x [rows, length, hidden] on ``device``; outputs go to ``sink``, on the CPU.

    Returns:
        the scan's states after the last position [rows, heads, head_dim, state]; None if not a Mamba-2 layer.
    """
    states = []
    for rows in batches(config, kind, x.shape[0], x.shape[1], device):
        state: LayerState = None
        for start in range(0, x.shape[1], SEGMENT):
            part = slice(start, min(start + SEGMENT, x.shape[1]))
            y, state = layer_forward(config, kind, weights, x[rows, part].to(device), state, tap)
            sink(rows, part, y.cpu())
        if isinstance(state, MambaState):
            states.append(state.ssm.cpu())
    return torch.cat(states) if states else None


def into(out: Tensor) -> Sink:
    """A sink that stores everything in ``out`` [rows, length, hidden]."""

    def keep(rows: slice, part: slice, y: Tensor) -> None:
        out[rows, part] = y

    return keep


@torch.no_grad()
def choices(config: NemotronHConfig, weights: Weights, x: Tensor, device: torch.device) -> NDArray[np.int64]:
    """The router's choice for x [rows, length, hidden]: expert ids [rows * length, k], ascending in a row."""
    norm, mixer = weights["norm.weight"], Scope(weights, names.MIXER)
    tokens = x.flatten(0, 1)
    parts = (part.to(device) for part in torch.split(tokens, SEGMENT))
    ids = [route(config, mixer, rms_norm(part, norm, config.norm_eps))[0].cpu() for part in parts]
    return torch.cat(ids).sort(-1).values.numpy()


def routing(config: NemotronHConfig, reference: NDArray[np.int64], candidate: NDArray[np.int64]) -> Routing:
    """Compare two models' choices [tokens, k] for the same tokens."""
    same = shared(reference, candidate)
    count = reference.shape[1]
    return Routing(
        flipped=1 - same.mean() / count,
        tokens_with_flip=(same < count).mean(),
        tokens_per_expert=np.bincount(candidate.reshape(-1), minlength=config.n_routed_experts).tolist(),
        tokens_per_expert_reference=np.bincount(
            reference.reshape(-1), minlength=config.n_routed_experts
        ).tolist(),
    )

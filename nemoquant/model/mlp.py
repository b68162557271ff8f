"""The dense MLP block, without a gate: ``down(relu(up(x))^2)``. Shared experts are such MLPs too."""

from torch import Tensor

from nemoquant.model.config import NemotronHConfig
from nemoquant.model.taps import Tap, Weights, linear, squared_relu


def mlp(weights: Weights, x: Tensor, tap: Tap) -> Tensor:
    """``up_proj``, squared relu, ``down_proj``: x [tokens, hidden] -> [tokens, hidden]."""
    return linear("down_proj", squared_relu(linear("up_proj", x, weights, tap)), weights, tap)


def forward(
    config: NemotronHConfig,
    weights: Weights,
    x: Tensor,
    state: None,
    tap: Tap,
) -> tuple[Tensor, None]:
    """x [batch, length, hidden], already normalised -> (y of that shape, no state)."""
    return mlp(weights, x.flatten(0, 1), tap).view_as(x), None

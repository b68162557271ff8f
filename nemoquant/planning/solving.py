"""Words, bounds and defaults of recipes beyond formats: solving, folds, headroom. Imports nothing heavy."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from nemoquant.formats import Method

FoldName = Literal["latent", "norm", "gate", "expert"]
FOLDS: tuple[FoldName, ...] = get_args(FoldName)
MOST_DESCENT = 16
Propagate = Literal["source", "quantized"]
PROPAGATE: tuple[Propagate, ...] = get_args(Propagate)
Outputs = Literal["equal", "loss"]
OUTPUTS: tuple[Outputs, ...] = get_args(Outputs)
MOST_HEADROOM = 16.0
DAMPING, DESCENT = 0.1, 1  # found on the trained models, see docs/accuracy.md


class Overrides(NamedTuple):
    """What a user asks for in place of the recipe's own; None leaves that. Fields as in ``RunOptions``."""

    method: Method | None = None
    folds: Sequence[FoldName] | None = None
    descent: int | None = None
    propagate: Propagate | None = None
    outputs: Outputs | None = None
    headroom: float | None = None

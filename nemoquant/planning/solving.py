"""Words and defaults of recipes for codes that are solved for, and for folds. Imports nothing heavy."""

from typing import Literal, get_args

FoldName = Literal["latent", "norm", "gate", "expert"]
FOLDS: tuple[FoldName, ...] = get_args(FoldName)
MOST_DESCENT = 16
Propagate = Literal["source", "quantized"]
PROPAGATE: tuple[Propagate, ...] = get_args(Propagate)
DAMPING, DESCENT = 0.1, 1  # found on the trained models, see docs/accuracy.md

"""Words, bounds and defaults of recipes beyond formats: solving, folds, headroom. Imports nothing heavy."""

from typing import Literal, get_args

FoldName = Literal["latent", "norm", "gate", "expert"]
FOLDS: tuple[FoldName, ...] = get_args(FoldName)
MOST_DESCENT = 16
MOST_HEADROOM = 16.0
DAMPING, DESCENT = 0.1, 1  # found on the trained models, see docs/accuracy.md

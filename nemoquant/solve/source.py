"""What solving reads of the source: weights with their folds."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoquant.calibrate.derived import check_finite
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.formats import FormatName
from nemoquant.formats.amax import amax
from nemoquant.formats.arithmetic import Encoded
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.formats.rounding import Floats
from nemoquant.planning.row import Row
from nemoquant.solve.folds.layer import Folds


def folded(checkpoint: Checkpoint, folds: Folds, row: Row) -> Floats:
    """A weight [out, in] as float32, with its fold; memory of its own.

    Mapped pages are released after they were read: later they would stay.
    """
    source = checkpoint.array(row.name)
    transform = folds.get(row.name)
    weight = floats(source if transform is None else transform.apply(source))
    weight = weight.copy() if np.may_share_memory(weight, source) else weight
    checkpoint.release([row.name])
    return weight


def floats(weight: NDArray[Any]) -> Floats:
    """bf16 patterns, float16 or float32 -> float32, C-contiguous."""
    if weight.dtype == np.uint16:  # at once: a head's patterns as integers would take as much again
        weight = np.left_shift(weight, np.uint32(16), dtype=np.uint32).view(np.float32)
    return np.ascontiguousarray(weight, np.float32)


def largest(row: Row, weight: Floats) -> np.float32:
    """max |w|.

    Raises:
        WeightError: NaN or Inf in it.
    """
    return check_finite(row.name, amax(weight))


def shared_maxima(checkpoint: Checkpoint, folds: Folds, rows: Iterable[Row]) -> dict[str, np.float32]:
    """The largest magnitude of each scale group of weights; raises WeightError as :func:`largest`."""
    found: dict[str, np.float32] = {}
    for row in rows:
        if row.weight_group:
            here = largest(row, folded(checkpoint, folds, row))
            found[row.weight_group] = max(here, found.get(row.weight_group, here))
    return found


def squares(format: FormatName, weight: Floats, encoded: Encoded, scale: np.float32) -> tuple[float, float]:
    """Sums of (w - q)^2 and w^2 of some rows, in float64."""
    error = weight.astype(np.float64)
    signal = float(np.vdot(error, error))
    error -= ARITHMETIC[format].decode(encoded, scale)
    return float(np.vdot(error, error)), signal


def relative(parts: Iterable[tuple[float, float]]) -> float:
    """||w - q||^2 / ||w||^2 from the sums of all slices; 0 of a weight of zeros."""
    pairs = list(parts)
    signal = math.fsum(signal for _, signal in pairs)
    return math.fsum(error for error, _ in pairs) / signal if signal else 0.0

"""The folds that a recipe asks for, chosen for one layer from its inputs and weights."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from nemoquant.calibrate.inputs import InputFile
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.model.config import NemotronHConfig
from nemoquant.planning.plan import Plan
from nemoquant.planning.row import Row
from nemoquant.solve.folds.layer import Folds, layer_folds, readers
from nemoquant.solve.metric import gram
from nemoquant.solve.taps import input_of, router_of

NARROW = 8  # bits: codes with fewer lose small values next to large ones


class LayerFolds:
    """Chooses the folds of a plan.

    Attributes:
        taps: the inputs that it looks at.
    """

    def __init__(self, plan: Plan, checkpoint: Checkpoint) -> None:
        self._config, self._checkpoint, self._kinds = plan.config, checkpoint, plan.recipe.folds
        self._readers = [{s.role for s in readers(self._config, i)} for i in range(len(self._config.layers))]
        self.taps = {tap for row in plan.quantized for tap in self._looks_at(row)}

    def _looks_at(self, row: Row) -> Iterator[str]:
        """The inputs that the wanted folds of a row's input are chosen by."""
        if row.layer is None or not _narrow(row):
            return
        if "norm" in self._kinds and row.role in self._readers[row.layer]:
            yield _norm_tap(row)
        if (
            ("gate" in self._kinds and row.role == "mamba.out_proj")
            or ("latent" in self._kinds and has_matrix(self._config, row))
            or ("expert" in self._kinds and row.role.endswith(".down_proj"))
        ):
            yield input_of(row)

    def choose(self, layer: int, rows: Sequence[Row], inputs: InputFile) -> Folds:
        """The folds of one layer; ``rows`` are its quantized ones."""
        moments: dict[str, NDArray[np.float64]] = {}
        ups = [row for row in rows if has_matrix(self._config, row) and input_of(row) in inputs]
        if "latent" in self._kinds and ups:
            width = ups[0].shape[1]
            # one matrix for all experts: what counts is its sum
            moments[ups[0].module] = gram((x for row in ups for x in inputs.pieces(input_of(row))), width)
        for row in rows:
            for tap in self._looks_at(row):
                if (
                    tap in inputs
                    and tap not in moments
                    and not (has_matrix(self._config, row) and tap == row.module)
                ):
                    moments[tap] = _squares(inputs, tap, row.shape[1])
        quantized = {row.name for row in rows if _narrow(row)}
        found = layer_folds(
            self._config, layer, self._kinds, weight=self._weight, moments=moments, quantized=quantized
        )
        return {name: fold for name, fold in found.items() if not fold.is_identity}

    def _weight(self, name: str) -> NDArray[np.generic]:
        found = self._checkpoint.array(name).copy()
        self._checkpoint.release([name])
        return found


def has_matrix(config: NemotronHConfig, row: Row) -> bool:
    """Whether the fold ``latent`` has a matrix for this weight's input."""
    if row.role != "experts.up_proj" or row.layer is None:
        return False
    return bool(config.of_layer(row.layer).moe_latent_size)


def _narrow(row: Row) -> bool:
    return row.number is not None and row.number.weight_bits < NARROW


def _norm_tap(row: Row) -> str:
    """The tap of a layer's norm, which this row reads; an expert reads only some of its tokens."""
    if row.expert is None:
        return input_of(row)
    return router_of(row.layer or 0)


def _squares(inputs: InputFile, tap: str, width: int) -> NDArray[np.float64]:
    """sum of x^2 by channel of an input, float64 [width]."""
    total = np.zeros(width)
    for piece in inputs.pieces(tap):
        total += np.einsum("ij,ij->j", piece, piece, dtype=np.float64)
    return total

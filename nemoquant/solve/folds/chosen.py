"""The folds that a recipe asks for, chosen for one layer from its inputs and weights."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from nemoquant.calibrate.inputs import InputFile
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.formats.rounding import Floats
from nemoquant.model import names
from nemoquant.planning.plan import Plan, Row
from nemoquant.solve.folds import choose
from nemoquant.solve.folds.layer import (
    Folds,
    compose,
    expert_transforms,
    gate_transforms,
    latent_transforms,
    norm_transforms,
    pairs,
    readers,
)
from nemoquant.solve.folds.transform import Transform
from nemoquant.solve.metric import gram
from nemoquant.solve.source import floats, input_of


class LayerFolds:
    """Chooses the folds of a plan.

    Attributes:
        taps: the inputs that it looks at.
    """

    def __init__(self, plan: Plan, checkpoint: Checkpoint) -> None:
        self.config, self.checkpoint, self.wanted = plan.config, checkpoint, set(plan.recipe.folds)
        kinds = {kind: i for i, kind in enumerate(self.config.layers)}  # one layer of each
        self._readers = {kind: {s.role for s in readers(self.config, i)} for kind, i in kinds.items()}
        self.taps = {
            tap
            for row in plan.quantized
            if row.layer is not None and not row.role.startswith("mtp.")
            for tap in self._looks_at(row)
        }

    def _looks_at(self, row: Row) -> Iterator[str]:
        """The inputs that the wanted folds of a row's input are chosen by."""
        role = row.role
        if "norm" in self.wanted and self._reads_norm(row):
            yield _norm_tap(row)
        if (
            ("gate" in self.wanted and role == "mamba.out_proj")
            or ("latent" in self.wanted and role == "experts.up_proj" and bool(self.config.moe_latent_size))
            or ("expert" in self.wanted and role.endswith(".down_proj"))
        ):
            yield input_of(row)

    def _reads_norm(self, row: Row) -> bool:
        return row.layer is not None and row.role in self._readers[self.config.layers[row.layer]]

    def choose(self, layer: int, rows: Sequence[Row], inputs: InputFile) -> Folds:
        """The folds of one layer; one that would not be exact for a tensor is left out.

        Args:
            rows: the layer's quantized rows.
        """
        parts = (self._norm, self._gate, self._latent, self._expert)
        found: Folds = {}
        for name, part in zip(("norm", "gate", "latent", "expert"), parts, strict=True):
            if name in self.wanted:
                new = part(layer, rows, inputs)
                together = compose(found, new)
                if all(self._exact(tensor, together[tensor]) for tensor in new):
                    found = together
        return {name: fold for name, fold in found.items() if not fold.is_identity}

    def _exact(self, name: str, fold: Transform) -> bool:
        found = fold.exact(self.checkpoint.array(name))
        self.checkpoint.release([name])
        return found

    def _weight(self, row: Row) -> Floats:
        found = floats(self.checkpoint.array(row.name))
        self.checkpoint.release([row.name])
        return found

    def _energy(self, rows: Iterable[Row]) -> NDArray[np.float64]:
        return np.asarray(sum(choose.energy(self._weight(row)) for row in rows))

    def _norm(self, layer: int, rows: Sequence[Row], inputs: InputFile) -> Folds:
        reading = [row for row in rows if self._reads_norm(row)]
        if not reading or (tap := _norm_tap(reading[0])) not in inputs:
            return {}
        h = _mean_square(inputs, tap, reading[0].shape[1])
        g = self._energy(reading)
        if not choose.outliers(h, g):
            return {}
        return norm_transforms(self.config, layer, choose.channel_exponents(h, g))

    def _gate(self, layer: int, rows: Sequence[Row], inputs: InputFile) -> Folds:
        reading = [row for row in rows if row.role == "mamba.out_proj" and input_of(row) in inputs]
        if not reading:
            return {}
        h, g = _mean_square(inputs, input_of(reading[0]), reading[0].shape[1]), self._energy(reading)
        if not choose.outliers(h, g):
            return {}
        return gate_transforms(self.config, layer, choose.channel_exponents(h, g))

    def _latent(self, layer: int, rows: Sequence[Row], inputs: InputFile) -> Folds:
        reading = [row for row in rows if row.role == "experts.up_proj"]
        if not self.config.moe_latent_size or not any(input_of(row) in inputs for row in reading):
            return {}
        width = reading[0].shape[1]
        h, g = np.zeros((width, width)), np.zeros((width, width))
        for row in reading:
            h += gram(inputs.pieces(input_of(row)), width)
            weight = self._weight(row).astype(np.float64)
            g += weight.T @ weight
        if not h.any() or not g.any():
            return {}
        return latent_transforms(self.config, layer, *choose.latent_matrix(h, g))

    def _expert(self, layer: int, rows: Sequence[Row], inputs: InputFile) -> Folds:
        found: Folds = {}
        downs = {row.name: row for row in rows if row.role.endswith(".down_proj")}
        for module, (_, down) in pairs(self.config, layer).items():
            row = downs.get(down.name)
            if row is None or input_of(row) not in inputs:
                continue
            h = _mean_square(inputs, input_of(row), row.shape[1])
            g = choose.energy(self._weight(row))
            if choose.outliers(h, g, power=2):
                exponents = choose.channel_exponents(h, g, power=2)
                found |= expert_transforms(self.config, layer, module, exponents)
        return found


def _norm_tap(row: Row) -> str:
    """The tap of a layer's norm, which this row reads; an expert reads only some of its tokens."""
    if row.expert is None:
        return input_of(row)
    return f"{names.layer(row.layer or 0)}{names.MIXER}{names.ROUTER}"


def _mean_square(inputs: InputFile, tap: str, width: int) -> NDArray[np.float64]:
    """sum of x^2 by channel of an input, float64 [width]; only ratios matter."""
    total = np.zeros(width)
    for piece in inputs.pieces(tap):
        total += np.einsum("ij,ij->j", piece, piece, dtype=np.float64)
    return total

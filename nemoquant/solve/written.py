"""A layer's tensors as the output will have them, as far as they are known: folded, solved, encoded."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemoquant.calibrate.derived import weight_scale
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.weights import TORCH, LayerWeights
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.planning.row import Row
from nemoquant.quantized.packed import PackedWeight
from nemoquant.solve.folds.layer import Folds
from nemoquant.solve.source import folded, largest
from nemoquant.solve.store import SolvedFile


class Written:
    """The quantized tensors of one layer.

    Attributes:
        folds: of the layer's tensors.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        rows: Sequence[Row],
        folds: Folds,
        shared: Mapping[str, np.float32],
        solved: SolvedFile,
    ) -> None:
        """``rows``: the layer's quantized ones. ``shared``: largest magnitude by scale group of weights."""
        self.checkpoint, self.folds = checkpoint, folds
        self._rows = {row.name: row for row in rows}
        self._shared, self._solved = shared, solved
        self._known = {row.name for row in rows if not row.solved}
        self._folded: dict[str, NDArray[Any]] = {}

    def add(self, rows: Sequence[Row]) -> None:
        """These have been solved."""
        self._known |= {row.name for row in rows}

    def changed(self, name: str, source: NDArray[Any]) -> NDArray[Any]:
        """A tensor with its fold. Those that stay unquantized are folded once, not in each batch."""
        if name in self._rows:
            return self.folds[name].apply(source)
        if name not in self._folded:
            self._folded[name] = self.folds[name].apply(source)
        return self._folded[name]

    def get(self, name: str) -> PackedWeight | None:
        """A tensor's codes; None of one that is not solved yet, or not quantized."""
        if name not in self._known:
            return None
        row = self._rows[name]
        assert row.format != "source"
        if row.solved:
            stored = self._solved.get(name)
            return PackedWeight(row.format, stored.encoded, np.float32(stored.record.scale))
        weight = folded(self.checkpoint, self.folds, row)
        shared = self._shared[row.weight_group] if row.weight_group else largest(row, weight)
        scale, degenerate = weight_scale(row, shared)
        arithmetic = ARITHMETIC[row.format]
        encoded = (
            arithmetic.zeros((row.shape[0], row.shape[1]))
            if degenerate
            else arithmetic.encode(weight, scale, row.plain_method)
        )
        return PackedWeight(row.format, encoded, scale)


class FoldedWeights(LayerWeights):
    """The tensors under a prefix with their folds, as ``layer_forward`` takes them."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, folds: Folds) -> None:
        super().__init__(checkpoint, prefix)
        self._folds = folds

    def __getitem__(self, name: str) -> Tensor:
        full = self.prefix + name
        if full not in self._folds:
            return super().__getitem__(name)
        changed = self._changed(full)
        kept = changed.dtype == self.checkpoint.array(full).dtype
        return torch.from_numpy(changed).view(
            TORCH[self.checkpoint.tensors[full].dtype] if kept else torch.float32
        )

    def _changed(self, full: str) -> NDArray[Any]:
        return self._folds[full].apply(self.hold(full))


class WrittenWeights(FoldedWeights):
    """The same as they are written, as far as that is known; those of ``without`` are zero."""

    def __init__(self, written: Written, prefix: str, without: Collection[str] = ()) -> None:
        super().__init__(written.checkpoint, prefix, written.folds)
        self._written, self._without = written, without

    def __getitem__(self, name: str) -> Tensor:
        full = self.prefix + name
        if full in self._without:
            return torch.zeros(self.checkpoint.tensors[full].shape, dtype=torch.bfloat16)
        packed = self._written.get(full)
        if packed is not None:
            return cast(Tensor, packed)  # it decodes itself where it is used
        return super().__getitem__(name)

    def _changed(self, full: str) -> NDArray[Any]:
        return self._written.changed(full, self.hold(full))

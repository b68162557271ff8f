"""A source's weights with the folds of a checkpoint that was made from it: what its codes stand for."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nemoquant.checkpoint.weights import TORCH, LayerWeights
from nemoquant.solve.folds.layer import Folds


class FoldedWeights(Mapping[str, Tensor]):
    """The tensors under a prefix, folded when they are looked up; others are the source's own."""

    def __init__(self, source: LayerWeights, folds: Folds) -> None:
        self._source, self._folds = source, folds

    def __getitem__(self, name: str) -> Tensor:
        fold = self._folds.get(full := self._source.prefix + name)
        if fold is None:
            return self._source[name]
        folded = torch.from_numpy(fold.apply(self._source.hold(full)))
        # with a matrix on the right the result is float32, else of the source's dtype
        return folded.view(torch.float32 if fold.right is not None else TORCH[self._dtype(full)])

    def _dtype(self, name: str) -> str:
        return self._source.checkpoint.tensors[name].dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

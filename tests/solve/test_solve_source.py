"""What solving reads of the source."""

from types import SimpleNamespace

import numpy as np
import pytest

from nemoquant.solve.folds.transform import Transform
from nemoquant.solve.source import folded


class Mapped:
    """A checkpoint of one weight that nothing reads after its release: its pages would be resident again."""

    def __init__(self, weight: np.ndarray) -> None:
        self.weight = weight

    def array(self, _: str) -> np.ndarray:
        return self.weight

    def release(self, _: list[str]) -> None:
        self.weight[...] = 0


@pytest.mark.parametrize("fold", [None, Transform(columns=np.zeros(32, np.int8))])
@pytest.mark.parametrize("dtype", [np.uint16, np.float16, np.float32])
def test_a_weight_is_read_before_its_pages_are_released(dtype, fold):
    weight = np.full((4, 32), 0x3F80 if dtype == np.uint16 else 1, dtype)
    folds = {} if fold is None else {"w": fold}
    read = folded(Mapped(weight), folds, SimpleNamespace(name="w"))
    assert read.dtype == np.float32 and (read == 1).all()

"""The distance between arrays or tensors."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def _float64(values: Any) -> NDArray[np.float64]:
    return values.detach().double().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float64)


def relative_error(found: Any, expected: Any) -> float:
    """Norm of the difference over the norm of the expected value, in float64."""
    found, expected = _float64(found), _float64(expected)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

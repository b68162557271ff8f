"""Weights for the format tests."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

Bits = NDArray[np.uint16]
Floats = NDArray[np.float32]

ROWS, COLUMNS = 24, 160


@pytest.fixture(scope="session")
def to_bf16() -> Callable[[Floats], Bits]:
    """Cuts float32 values to bf16 patterns.

    The direction of rounding does not matter, because the weights are random or exact.
    """
    return lambda values: (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.fixture(scope="session")
def to_float() -> Callable[[Bits], Floats]:
    return lambda bits: (bits.astype(np.uint32) << 16).view(np.float32)


def _spread(kind: str, rng: np.random.Generator) -> Floats:
    """Distributions for a quantizer's different paths; first in float64, where powers do not overflow."""
    shape = (ROWS, COLUMNS)
    normal = rng.standard_normal(shape)
    values = {
        "normal": normal * 0.02,
        "laplace": rng.laplace(size=shape) * 0.01,
        "uniform": rng.uniform(-1, 1, shape),
        "outliers": normal * np.where(rng.random(shape) < 0.01, 1000, 1),
        "rows of many magnitudes": normal * 10.0 ** rng.integers(-9, 3, (ROWS, 1)),
        "all magnitudes": np.sign(normal) * 2.0 ** rng.uniform(-40, 10, shape),
        "sparse": np.where(rng.random(shape) < 0.95, 0, normal),
        "a lattice, rich in ties": rng.integers(-24, 25, shape) * 0.25,
        "constant": np.full(shape, -0.75),
        "near the smallest normal bf16": normal * 2.0**-105,
        "one value and zeros": np.eye(ROWS, COLUMNS) * 3,
        "negative zeros and tiny negatives": np.where(
            rng.random(shape) < 0.5, -0.0, -1e-6 * rng.random(shape)
        )
        + np.eye(*shape),
    }[kind]
    return values.astype(np.float32)


SPREADS = (
    "normal",
    "laplace",
    "uniform",
    "outliers",
    "rows of many magnitudes",
    "all magnitudes",
    "sparse",
    "a lattice, rich in ties",
    "constant",
    "near the smallest normal bf16",
    "one value and zeros",
    "negative zeros and tiny negatives",
)


@pytest.fixture(params=SPREADS)
def bf16_weight(request: pytest.FixtureRequest, to_bf16: Callable[[Floats], Bits]) -> Bits:
    """A weight [24, 160] as bf16 patterns, once for each distribution."""
    return to_bf16(_spread(request.param, np.random.default_rng(SPREADS.index(request.param))))

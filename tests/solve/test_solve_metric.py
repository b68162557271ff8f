"""The metric: Gram matrix, damping, factor, and what is refused."""

import numpy as np
import pytest
import torch

from nemoquant.solve.metric import gram, prepare


def inputs(tokens: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((tokens, width)) @ rng.standard_normal((width, width))).astype(np.float32)


def test_gram_is_the_sum_over_all_pieces_in_float64():
    x = inputs(1500, 48)
    total = gram([x[:7], x[7:1400], x[1400:]], 48)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(total, wide.T @ wide, rtol=1e-12, atol=1e-9)
    assert total.dtype == np.float64
    assert np.array_equal(total, total.T)


def test_gram_of_more_inputs_than_a_strip_has():
    x = inputs(20, 8)[:, np.arange(1100) % 8]
    wide = x.astype(np.float64)
    np.testing.assert_allclose(gram([x], 1100), wide.T @ wide, rtol=1e-12, atol=1e-9)


def test_gram_of_nothing_is_zero():
    assert not gram([], 16).any()


@pytest.mark.parametrize("piece", [np.zeros((3, 16)), np.zeros((3, 8), np.float32), np.zeros(16, np.float32)])
def test_gram_refuses_other_pieces(piece):
    with pytest.raises(ValueError, match=r"pieces: got .*, expected float32 \[tokens, 16\]"):
        gram([piece], 16)


@pytest.mark.parametrize("tokens", [1, 10, 200])
@pytest.mark.parametrize("damping", [0.01, 4.0])
def test_the_factor_gives_the_damped_metric_back(tokens, damping):
    x = inputs(tokens, 40)
    x[:, 7] = 0
    total = gram([x], 40)
    metric = prepare(total, tokens, damping)
    expected = total / tokens + damping * np.diag(total).mean() / tokens * np.eye(40)
    np.testing.assert_allclose(metric.matrix, expected, rtol=1e-12)
    assert metric.unit == pytest.approx(np.diag(expected).mean(), rel=1e-12)
    lower = metric.factor.lower.astype(np.float64)
    assert np.array_equal(lower, np.tril(lower))
    assert (np.diag(lower) == 1).all()
    # The factorisation is in float32, with sums of 40.
    np.testing.assert_allclose(
        lower.T * metric.factor.pivots @ lower, expected, rtol=0, atol=4e-6 * abs(expected).max()
    )


def test_nothing_observed_is_empty():
    assert prepare(np.zeros((16, 16)), 0, 0.01).empty
    assert prepare(np.zeros((16, 16)), 10, 0.01).empty
    assert not prepare(np.eye(16), 10, 0.01).empty


@pytest.mark.parametrize(
    ("matrix", "tokens", "damping", "message"),
    [
        (np.full((4, 4), np.nan), 1, 0.01, "gram: got NaN or Inf"),
        (np.diag([1, 1, np.inf, 1]), 1, 0.01, "gram: got NaN or Inf"),
        (np.full((4, 4), np.nan), 0, 0.01, "gram: got NaN or Inf"),
        (np.eye(4, dtype=np.float32), 1, 0.01, "gram: got float32"),
        (np.zeros((4, 3)), 1, 0.01, r"gram: got float64 \(4, 3\)"),
        (np.eye(4), -1, 0.01, "tokens: got -1"),
        (np.eye(4), 1, 0.0, "damping: got 0.0"),
        (np.eye(4), 1, np.nan, "damping: got nan"),
    ],
)
def test_refused(matrix, tokens, damping, message):
    with pytest.raises(ValueError, match=message):
        prepare(matrix, tokens, damping)


def test_a_matrix_that_is_no_gram_matrix_has_no_factor():
    with pytest.raises(ValueError, match="gram: got a matrix that is not positive semidefinite"):
        _ = prepare(np.array([[1.0, 2.0], [2.0, 1.0]]), 1, 0.01).factor


def test_where_float32_fails_the_factor_is_of_float64():
    """One token, and hardly any damping: float32 has too few digits for it."""
    x = np.random.default_rng(0).standard_normal((1, 400)).astype(np.float32)
    metric = prepare(gram([x], 400), 1, 1e-9)
    assert int(torch.linalg.cholesky_ex(torch.from_numpy(metric.units.copy()))[1])
    assert (metric.factor.pivots > 0).all()
    assert np.isfinite(metric.factor.lower).all()

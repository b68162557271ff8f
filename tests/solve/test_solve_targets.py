"""Targets against the least squared error that numpy finds on the tokens, with the ridge as more of them."""

import numpy as np
import pytest

from nemoquant.solve.metric import gram
from nemoquant.solve.targets import cross, inner_target, writer_target

TOKENS, WIDTH, OUT = 300, 24, 10


@pytest.fixture
def random():
    return np.random.default_rng(3)


def least_squares(z, y, weight, ridge):
    """argmin |y - z V'|^2 + r |V - W|^2, from stacked rows."""
    root = np.sqrt(ridge * np.mean(np.sum(z.astype(np.float64) ** 2, 0)))
    rows = np.concatenate([z.astype(np.float64), root * np.eye(z.shape[1])])
    wanted = np.concatenate([y.astype(np.float64), root * weight.T])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0].T


def inputs(random, tokens=TOKENS):
    mix = random.standard_normal((WIDTH, WIDTH))
    x = (random.standard_normal((tokens, WIDTH)) @ mix).astype(np.float32)
    z = (x + 0.3 * random.standard_normal(x.shape)).astype(np.float32)
    return x, z, random.standard_normal((OUT, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("ridge", [1e-3, 0.3, 10.0])
@pytest.mark.parametrize("tokens", [5, TOKENS])
def test_a_weight_inside_a_layer(random, ridge, tokens):
    x, z, weight = inputs(random, tokens)
    found = inner_target(gram([z], WIDTH), cross([(x - z, z)], WIDTH, WIDTH), ridge)(weight)
    np.testing.assert_allclose(found, least_squares(z, x @ weight.T, weight, ridge), rtol=2e-4, atol=2e-4)
    assert found.dtype == np.float32 and found.flags.c_contiguous


@pytest.mark.parametrize("ridge", [1e-3, 0.3, 10.0])
def test_a_writer_takes_up_what_the_stream_lacks(random, ridge, monkeypatch):
    monkeypatch.setattr("nemoquant.solve.targets._ELEMENTS", 3 * WIDTH)  # a few rows at a time
    x, z, weight = inputs(random)
    y = (x @ weight.T + random.standard_normal((TOKENS, OUT))).astype(np.float32)
    found = writer_target(gram([z], WIDTH), cross([(y, z)], OUT, WIDTH), ridge)(weight)
    np.testing.assert_allclose(found, least_squares(z, y, weight, ridge), rtol=2e-4, atol=2e-4)


def test_without_an_error_the_weight_stays(random):
    x, _, weight = inputs(random)
    moments = gram([x], WIDTH)
    inner = inner_target(moments, cross([(x - x, x)], WIDTH, WIDTH), 0.3)(weight)
    assert np.array_equal(inner, weight)
    writer = writer_target(moments, cross([(x @ weight.T, x)], OUT, WIDTH), 0.3)(weight)
    np.testing.assert_allclose(writer, weight, atol=1e-5)


def test_sums_of_products_by_pieces(random):
    x, z, _ = inputs(random)
    pieces = [(x[:7], z[:7]), (x[7:], z[7:])]
    np.testing.assert_allclose(cross(pieces, WIDTH, WIDTH), x.T.astype(np.float64) @ z, rtol=1e-12, atol=1e-9)

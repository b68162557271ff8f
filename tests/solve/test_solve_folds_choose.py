"""How folds are chosen: balance, rotation, exponents, and what counts as an outlier."""

import numpy as np
import pytest

from nemoquant.solve.folds import choose


def moments(n, seed, spread=1.0):
    """A full-rank [n, n] with channels of different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * n, n)) * np.exp(spread * rng.standard_normal(n))
    return x.T @ x


def test_latent_matrix_balances():
    n = 48
    h, g = moments(n, 0, 1.5), 1e4 * moments(n, 1)
    m, inverse = (a.astype(float) for a in choose.latent_matrix(h, g))
    left = h + 0.01 * np.trace(h) / n * np.eye(n)
    right = g + 0.01 * np.trace(g) / n * np.eye(n)
    one, two = m @ left @ m.T, inverse.T @ right @ inverse
    assert np.abs(one - two).max() < 1e-4 * np.abs(one).max()  # float32 and the condition of M
    # The rotation spreads what is left of outliers: all channels are of about one size.
    share = np.diag(one) / np.diag(one).mean()
    assert share.max() / share.min() < 5
    assert np.diag(left).max() / np.diag(left).min() > 200
    assert np.abs(m @ inverse - np.eye(n)).max() < 1e-5


def test_latent_matrix_is_the_same_each_time():
    for a, b in zip(*(choose.latent_matrix(moments(16, 0), moments(16, 1)) for _ in range(2)), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)


def test_rotation_is_orthogonal_and_has_no_structure():
    q = choose.rotation(64)
    assert np.abs(q @ q.T - np.eye(64)).max() < 1e-13
    assert np.abs(q).max() < 0.7


def test_directions_without_tokens():
    """With fewer tokens than channels H has no inverse; the damping gives it one."""
    x = np.random.default_rng(0).standard_normal((5, 32))
    m, inverse = choose.latent_matrix(x.T @ x, moments(32, 1))
    assert np.isfinite(m).all()
    assert np.isfinite(inverse).all()


@pytest.mark.parametrize(
    ("h", "g", "message"),
    [
        (np.zeros((4, 4)), np.eye(4), "h: got a mean diagonal of 0.0"),
        (np.eye(4), np.full((4, 4), np.nan), "g: got a mean diagonal of nan"),
        (np.eye(4), np.eye(3), r"g: got shape \(3, 3\), expected that of h, \(4, 4\)"),
        (np.ones(4), np.eye(4), r"h: got shape \(4,\), expected \[n, n\]"),
    ],
)
def test_moments_that_are_refused(h, g, message):
    with pytest.raises(ValueError, match=message):
        choose.latent_matrix(h, g)


def test_channel_exponents():
    """s = (G / H)^(1/4), over the geometric mean: with H times 2^8 a channel gets 2^-2."""
    h = np.array([1, 2.0**8, 1, 2.0**-8])
    np.testing.assert_array_equal(choose.channel_exponents(h, np.ones(4)), [0, -2, 0, 2])
    np.testing.assert_array_equal(choose.channel_exponents(np.ones(4), h), [0, 2, 0, -2])
    np.testing.assert_array_equal(choose.channel_exponents(1e9 * h, 1e-5 * np.ones(4)), [0, -2, 0, 2])
    np.testing.assert_array_equal(choose.channel_exponents(h, np.ones(4), power=2), [0, -1, 0, 1])
    assert choose.channel_exponents(h, h).dtype == np.int8


def test_dead_channels_are_left_alone():
    np.testing.assert_array_equal(choose.channel_exponents([0, 1, 2.0**8], [1, 0, 1]), [0, 0, 0])
    np.testing.assert_array_equal(choose.channel_exponents([0, 0], [1, 1]), [0, 0])
    extreme = choose.channel_exponents([1e-300, 1e300], [1, 1])
    np.testing.assert_array_equal(extreme, [choose.MOST_EXPONENT, -choose.MOST_EXPONENT])
    assert not choose.outliers(np.zeros(16), np.zeros(16))


def test_noise_by_hand():
    """Two blocks: the largest of each times the sum of the other side."""
    h, g = np.ones(32), np.full(32, 2.0)
    h[3], g[20] = 100, 5
    first, second = 100 * 32 + 2 * 115, 1 * 35 + 5 * 16
    assert choose.noise(h, g) == first + second
    assert choose.noise(h[:20], g[:20]) == first + 1 * 8 + 2 * 4  # a block of four


def test_outliers():
    rng = np.random.default_rng(0)
    g = np.exp(0.5 * rng.standard_normal(256))
    h = np.exp(0.5 * rng.standard_normal(256))  # the demo model's norms: 0.36 of log2 of the square root
    assert not choose.outliers(h, g)
    one = h.copy()
    one[77] *= 2.0**14
    one_g = g.copy()
    one_g[77] /= 2.0**14
    assert choose.outliers(one, one_g)
    assert choose.remaining(one, one_g, np.where(np.arange(256) == 77, -7, 0)) < 0.05


def test_energy():
    weight = np.array([[3, 1], [4, -2]], np.float32)
    np.testing.assert_array_equal(choose.energy(weight), [25, 5])

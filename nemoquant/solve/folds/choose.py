"""Which fold a layer gets, from second moments of inputs and from weights; all in float64.

The error that quantization adds to a product grows with the size of its input times the weight's noise, and
with the size of the weight times the input's noise. ``H`` stands for the inputs, the mean of ``x x'``, and
``G`` for the weights that read them, the sum of ``W' W``. A fold ``x -> M x``, ``W -> W M^-1`` keeps the
product and makes of them ``M H M'`` and ``M^-T G M^-1``. Both kinds of noise are balanced where these two are
equal.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nemoquant.solve.folds.transform import BLOCK_ROWS, widen

Vector = NDArray[np.float64]

DAMPING = 0.01  # of the mean diagonal, added to H and G: directions that no token used are known poorly
BLOCK = 16  # channels that share a scale, in NVFP4
# Of the noise, at most so much is left where a fold of powers of two is chosen. The demo model's norms would
# keep 0.68 and more: with NVFP4 everywhere that took 0 to 5 % of its KL, up to four standard errors. Norms
# with channels 8 to 64 times as large as the others keep less than 0.01, and there it took 95 %.
WORTH = 0.5
SEED = 20240717  # of the rotation
MOST_EXPONENT = 24  # of a channel


def energy(weight: NDArray[Any]) -> Vector:
    """The diagonal of ``W' W``. Add up those of all readers.

    Some rows at a time: the widest weights of a model have a gigabyte in float64.

    Args:
        weight: [out, in], uint16 (bf16 patterns), float16 or float32.
    Returns:
        float64 [in].
    """
    sums = np.zeros(weight.shape[1])
    for start in range(0, len(weight), BLOCK_ROWS):
        rows = widen(weight[start : start + BLOCK_ROWS])
        sums += np.einsum("oi,oi->i", rows, rows)
    return sums


def rotation(n: int) -> NDArray[np.float64]:
    """An orthogonal matrix [n, n] without structure: the Q of a Gaussian matrix, the same at each call."""
    q, r = np.linalg.qr(np.random.default_rng(SEED).standard_normal((n, n)))
    return np.asarray(q * np.sign(np.diag(r)))


def latent_matrix(h: ArrayLike, g: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The balanced and rotated matrix between fc1 and the experts' up projections.

    With ``H = L L'`` and ``L' G L = U S U'`` it is ``M = Q S^(1/4) U' L^-1``: then ``M H M'`` and
    ``M^-T G M^-1`` are both ``Q S^(1/2) Q'``. The rotation ``Q`` spreads what is left of outliers over all
    channels.

    Args:
        h: [n, n], second moments of what the up projections read.
        g: [n, n], the sum of ``up' up`` over the experts.
    Returns:
        ``M`` and its inverse, float32 [n, n]; the inverse is that of the float32 ``M``, computed in float64.
    Raises:
        ValueError: shapes that do not match, values that are not finite, or moments that are all zero.
    """
    h, g = _damped(h, "h"), _damped(g, "g")
    if h.shape != g.shape:
        raise ValueError(f"g: got shape {g.shape}, expected that of h, {h.shape}")
    low = np.linalg.cholesky(h)
    s, u = np.linalg.eigh(low.T @ g @ low)
    # U' L^-1 is the transpose of L^-T U
    left = np.linalg.solve(low.T, u * s**0.25).T
    m = (rotation(len(h)) @ left).astype(np.float32)
    return m, np.linalg.inv(m.astype(np.float64)).astype(np.float32)


def _damped(moments: ArrayLike, name: str) -> NDArray[np.float64]:
    m = np.asarray(moments, np.float64)
    if m.ndim != 2 or m.shape[0] != m.shape[1]:
        raise ValueError(f"{name}: got shape {m.shape}, expected [n, n]")
    mean = np.trace(m) / max(1, len(m))
    if not (np.isfinite(m).all() and mean > 0):
        raise ValueError(f"{name}: got a mean diagonal of {mean}, expected finite values and a positive mean")
    damped: NDArray[np.float64] = (m + m.T) / 2 + DAMPING * mean * np.eye(len(m))
    return damped


def channel_exponents(h_diag: ArrayLike, g_diag: ArrayLike, power: int = 1) -> NDArray[np.int8]:
    """Exponents ``e`` so that channels times ``2^(power * e)``, and columns divided by it, are balanced.

    ``s = (G / H)^(1/4)`` for each channel, divided by the geometric mean of all. A channel that is always
    zero, or not finite, on either side, is left alone.

    Args:
        h_diag: [n], mean squares of the channels.
        g_diag: [n], diagonal of ``W' W`` of their readers.
        power: 2 where the channel follows the square of what is scaled, as behind relu^2.
    Returns:
        int8 [n].
    """
    h, g = np.asarray(h_diag, np.float64), np.asarray(g_diag, np.float64)
    used = (h > 0) & (g > 0) & np.isfinite(h) & np.isfinite(g)
    exponents = np.zeros(h.shape)
    if used.any():
        wanted = (np.log2(g[used]) - np.log2(h[used])) / 4
        exponents[used] = np.rint((wanted - wanted.mean()) / power)
    return np.clip(exponents, -MOST_EXPONENT, MOST_EXPONENT).astype(np.int8)


def noise(h_diag: ArrayLike, g_diag: ArrayLike) -> float:
    """What quantization in blocks would add to a product, up to a factor that only the format decides.

    The largest value of a block decides the error of all its values. So an input's block adds its largest
    mean square times the sum of ``G``, a weight's block its largest ``G`` times the sum of the mean squares.

    Args:
        h_diag: [n], mean squares of the channels.
        g_diag: [n], diagonal of ``W' W`` of their readers.
    """
    pad = (0, -np.size(h_diag) % BLOCK)
    h, g = (np.pad(np.asarray(d, np.float64), pad).reshape(-1, BLOCK) for d in (h_diag, g_diag))
    return float((h.max(1) * g.sum(1) + g.max(1) * h.sum(1)).sum())


def remaining(h_diag: ArrayLike, g_diag: ArrayLike, exponents: NDArray[np.integer[Any]]) -> float:
    """The share of :func:`noise` that is left if channels are multiplied by ``2^exponents``; 1 without any.

    Args:
        exponents: [n] of the channels themselves: with ``power`` times those of ``channel_exponents``.
    """
    before = noise(h_diag, g_diag)
    scale = np.ldexp(1.0, 2 * exponents.astype(np.int32))
    after = noise(np.asarray(h_diag) * scale, np.asarray(g_diag) / scale)
    return after / before if before else 1.0


def outliers(h_diag: ArrayLike, g_diag: ArrayLike, power: int = 1) -> bool:
    """Whether a few channels are so much larger than their neighbours that powers of two help.

    Measured by what :func:`channel_exponents`, of the same arguments, would leave of the noise.
    """
    exponents = power * channel_exponents(h_diag, g_diag, power).astype(np.int32)
    return remaining(h_diag, g_diag, exponents) < WORTH

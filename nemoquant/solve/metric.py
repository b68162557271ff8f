"""The metric H of a GEMM's inputs, in which the error of its weights counts.

    H = X' X / tokens + damping * mean(diagonal of X' X / tokens) * I
    H = L' D L,    L unit lower triangular, D diagonal and positive

With e = w - q, the objective ``e' H e`` is ``sum_j D_j (L e)_j^2``. (L e)_j has no error after the j-th, so
choosing codes in order makes each term small in turn:

    q_j = round(w_j + sum_{k<j} L_jk (w_k - q_k))

That is Babai's nearest plane, and GPTQ (Frantar et al., 2022, arXiv 2210.17323) does the same with the
Cholesky factor of the inverse of H, which is therefore never needed. L' D L is the Cholesky factorisation of
H with the order of its rows and columns reversed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from nemoquant.formats.rounding import Floats

Doubles = NDArray[np.float64]

_ROWS = 1024  # tokens at a time in float64, and inputs of a strip of the Gram matrix
_STRIP = 64  # of a strip that is copied to the other side of the diagonal: what is read stays in the cache


@dataclass(frozen=True)
class Factor:
    """``L`` [in, in] float32, unit lower triangular, and ``D`` [in] float64, in the metric's units."""

    lower: Floats
    pivots: Doubles


@dataclass(frozen=True)
class Metric:
    """What :func:`prepare` makes. It can be shared by threads.

    Attributes:
        matrix: H, float64 [in, in].
        unit: mean of H's diagonal.
        empty: whether nothing was observed; H is zero then, and has no factor.
    """

    matrix: Doubles
    unit: float
    empty: bool

    @cached_property
    def units(self) -> Floats:
        """H / unit in float32, for products of matrices."""
        found: Floats = np.empty(self.matrix.shape, np.float32)
        return np.divide(self.matrix, self.unit, out=found, casting="same_kind")

    @cached_property
    def factor(self) -> Factor:
        """L and D. Raises ValueError where H is not positive definite, so not of a Gram matrix.

        Factored in float32, twice as fast: with a damping of 0.01, a single token and up, the objective from
        it was within 6e-6 of the exact one. In float64 where that fails.
        """
        lower, pivots = triangular(torch.from_numpy(self.units), torch.from_numpy(self.matrix), self.unit)
        return Factor(lower.numpy(), pivots.numpy())


def triangular(units: torch.Tensor, matrix: torch.Tensor, unit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """L, float32 [in, in], and D, float64 [in], of a matrix float64 [in, in], on the matrix's device.

    ``units`` is matrix / unit in float32.

    Raises ValueError where it is not positive definite.
    """
    found, info = torch.linalg.cholesky_ex(units.flip(0, 1), upper=True)
    if int(info):
        found, info = torch.linalg.cholesky_ex((matrix / unit).flip(0, 1), upper=True)
    if int(info):
        raise ValueError(
            "gram: got a matrix that is not positive semidefinite, expected a sum of x' x of inputs; "
            "compute it again with gram()"
        )
    # Turned back on both axes, that factor is lower triangular, and H = lower' lower.
    found = found.flip(0, 1)
    diagonal = found.diagonal().clone()
    return found.div_(diagonal[:, None]).float().contiguous(), unit * diagonal.double() ** 2


def gram(pieces: Iterable[Floats], width: int) -> Doubles:
    """The sum of x' x over all tokens, float64 [in, in], symmetric.

    ``pieces`` are float32 [tokens, in]; the result's last bits depend on their order and sizes. Raises
    ValueError for another dtype or shape.
    """
    total = torch.zeros((width, width), dtype=torch.float64)
    for piece in pieces:
        if piece.dtype != np.float32 or piece.ndim != 2 or piece.shape[1] != width:
            raise ValueError(f"pieces: got {piece.dtype} {piece.shape}, expected float32 [tokens, {width}]")
        for start in range(0, len(piece), _ROWS):
            x = torch.from_numpy(piece[start : start + _ROWS].astype(np.float64))
            for first in range(0, width, _ROWS):  # the part below the diagonal
                last = min(first + _ROWS, width)
                total[first:last, :last].addmm_(x[:, first:last].T, x[:, :last])
    whole: Doubles = total.numpy()
    for first in range(0, width, _STRIP):
        last = min(first + _STRIP, width)
        square = whole[first:last, first:last]
        whole[:first, first:last] = whole[first:last, :first].T
        square[...] = np.tril(square) + np.tril(square, -1).T
    return whole


def gram_products(width: int) -> int:
    """Products that :func:`gram` makes for each token: strips that end at the diagonal."""
    strips = ((first, min(first + _ROWS, width)) for first in range(0, width, _ROWS))
    return sum((last - first) * last for first, last in strips)


def prepare(gram: Doubles, tokens: int, damping: float) -> Metric:
    """The metric of inputs with this Gram matrix, float64 [in, in].

    It is empty for zero tokens or a zero matrix. Raises ValueError for NaN or Inf, another dtype or shape, a
    negative number of tokens, or a damping that is not a positive finite number.
    """
    if gram.dtype != np.float64 or gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram: got {gram.dtype} {gram.shape}, expected float64 [in, in]")
    if tokens < 0:
        raise ValueError(f"tokens: got {tokens}, expected zero or more")
    if not 0 < damping < np.inf:
        raise ValueError(f"damping: got {damping}, expected a positive finite number")
    if not np.isfinite(gram).all():
        raise ValueError("gram: got NaN or Inf, expected finite numbers; check the inputs that were observed")
    mean = float(np.diagonal(gram).mean()) / tokens if tokens else 0.0
    if not mean > 0:
        return Metric(np.zeros_like(gram), 0.0, empty=True)
    matrix = gram / tokens
    matrix[np.diag_indices_from(matrix)] += damping * mean
    return Metric(matrix, (1 + damping) * mean, empty=False)

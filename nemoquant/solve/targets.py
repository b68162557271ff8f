"""What a weight is solved for where its input differs from the source's: a target in its place.

With x the source's input, z the one that the quantized weights before give (rounded, as the GEMM gets it),
and y what the GEMM should put out, it is the weight with the least squared error that a ridge keeps near the
source's:

    W* = argmin_V  sum |y - V z|^2 + r |V - W|^2  =  (C + r W) (H + r I)^-1,    H = sum z z',  C = sum y z'

A weight inside a layer should put out y = W x, so that W* = W + W (sum (x - z) z') (H + r I)^-1. One that
writes the stream should put out what the stream lacks: y is the source's stream after the layer, less the
quantized one without this weight. So it takes up the errors of all layers before it.

The ridge is relative to the mean of H's diagonal. The same correction of the input's error, without the
stream's, is in GPTAQ (Li et al., 2025, arXiv 2504.02692) and Qronos (Zhang et al., 2025, arXiv 2505.11695).
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from nemoquant.formats.rounding import Floats
from nemoquant.solve.metric import Doubles

_ROWS = 1024  # tokens at a time in float64
_ELEMENTS = 1 << 20  # of a weight in float64 at a time

Target = Callable[[Floats], Floats]
"""A weight [out, in] float32, folded -> what it is solved for, its own memory."""


def cross(pairs: Iterable[tuple[Floats, Floats]], height: int, width: int) -> Doubles:
    """The sum of y z' over all tokens, float64 [height, width].

    ``pairs``: y [tokens, height] and z [tokens, width], float32.
    """
    total = torch.zeros((height, width), dtype=torch.float64)
    for y, z in pairs:
        for start in range(0, len(y), _ROWS):
            part = slice(start, start + _ROWS)
            total.addmm_(torch.from_numpy(y[part]).double().T, torch.from_numpy(z[part]).double())
    found: Doubles = total.numpy()
    return found


def inner_target(gram: Doubles, missed: Doubles, ridge: float) -> Target:
    """Of weights inside a layer.

    Args:
        gram: H, float64 [in, in], not zero.
        missed: sum of (x - z) z', float64 [in, in].
        ridge: r over the mean of H's diagonal, above 0.
    """
    right = torch.cholesky_solve(torch.from_numpy(missed).T, _factor(gram, ridge)).T
    return lambda weight: _by_rows(weight, lambda part, _: part + part @ right)


def writer_target(gram: Doubles, wanted: Doubles, ridge: float) -> Target:
    """Of one weight [out, in] that writes the stream; ``wanted``: C, float64 [out, in]. Else as above."""
    factor, strength = _factor(gram, ridge), ridge * float(np.diagonal(gram).mean())
    whole = torch.from_numpy(wanted)
    return lambda weight: _by_rows(
        weight, lambda part, rows: torch.cholesky_solve((whole[rows] + strength * part).T, factor).T
    )


def _factor(gram: Doubles, ridge: float) -> torch.Tensor:
    damped = torch.from_numpy(gram.copy())
    damped.diagonal().add_(ridge * float(np.diagonal(gram).mean()))
    factor: torch.Tensor = torch.linalg.cholesky(damped)
    return factor


def _by_rows(weight: Floats, change: Callable[[torch.Tensor, slice], torch.Tensor]) -> Floats:
    found: Floats = np.empty_like(weight)
    step = max(1, _ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        found[rows] = change(torch.from_numpy(weight[rows]).double(), rows).numpy()
    return found

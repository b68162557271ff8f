"""Codes of a weight for the error ``tr(O E H E')``: H [in, in] of its inputs, O [out, out] of its outputs.

With all other rows held, row i of E = W - Q costs ``O_ii d' H d``, d = e_i + sum_{k != i} O_ik / O_ii e_k,
and what does not depend on it. So it is solved as any row, for w_i + sum_{k != i} O_ik / O_ii e_k in the
place of w_i. With O = L' D L and only rows before i in the sum, weighted by L_ik, it is GPTQ on both sides
(Tseng et al., 2025, arXiv 2505.22988). Rows are coupled by O's elements beside its diagonal alone.
"""

import numpy as np
import torch

from nemoquant.formats import FormatName, e2m1
from nemoquant.formats.arithmetic import Encoded
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.formats.rounding import Floats
from nemoquant.solve.descent import descend_panel
from nemoquant.solve.gptq import solve_panel
from nemoquant.solve.grids import Grid, grid
from nemoquant.solve.metric import Doubles, Metric, triangular
from nemoquant.solve.solver import solve


def output_side(gradients: Floats, damping: float, scarce: float = 0.0) -> Doubles:
    """O of gradients [tokens, out], with a mean diagonal of 1, and damping * (1 + scarce * out / tokens)."""
    g = gradients.astype(np.float64)
    o = g.T @ g
    o /= max(float(np.diagonal(o).mean()), 1e-300)
    return o + damping * (1 + scarce * g.shape[1] / len(g)) * np.eye(len(o))


def _column(row: np.ndarray) -> np.ndarray:
    """A row as the kernels take one, its own memory: they write into it."""
    return row[:, None].copy()


class _Rows:
    """A weight's codes, row by row."""

    def __init__(self, format: FormatName, weight: Floats, scale: np.float32, metric: Metric) -> None:
        self.weight, self.scale, self.metric = weight, scale, metric
        self.grid: Grid = grid(format, scale)
        self.values, self.codes = np.empty_like(weight), np.empty(weight.shape, np.uint8)
        self.blocks = np.zeros((len(weight), -(-weight.shape[1] // self.grid.block)), np.uint8)
        self.errors = np.zeros_like(weight)

    def start(self, encoded: Encoded, format: FormatName) -> None:
        self.values[:] = ARITHMETIC[format].decode(encoded, self.scale)
        self.codes[:] = e2m1.unpack(encoded.codes) if self.grid.four else encoded.codes
        if encoded.block_scales is not None:
            self.blocks[:] = encoded.block_scales
        self.errors[:] = self.weight - self.values

    def gptq(self, i: int, target: Floats) -> None:
        g, factor = self.grid, self.metric.factor
        parts = [_column(a[i]) for a in (self.values, self.codes, self.blocks, self.errors)]
        solve_panel(
            _column(target),
            _column(target),
            factor.lower,
            factor.pivots,
            four=g.four,
            block=g.block,
            scales=g.scales,
            global_scale=self.scale,
            values=parts[0],
            codes=parts[1],
            scale_codes=parts[2],
            errors=parts[3],
            objective=np.zeros(1),
        )
        self._keep(i, parts)

    def descend(self, i: int, error: Floats) -> None:
        """``error`` [in]: d above."""
        g, units = self.grid, self.metric.units
        parts = [_column(a) for a in (self.values[i], self.codes[i], self.blocks[i], error)]
        descend_panel(
            _column(self.weight[i] + error - self.errors[i]),
            _column(units @ error),
            units,
            np.array([np.sqrt(np.diagonal(units)) @ np.abs(error)], np.float32),
            four=g.four,
            block=g.block,
            scales=g.scales,
            first=g.first,
            last=g.last,
            reach=g.reach,
            values=parts[0],
            codes=parts[1],
            scale_codes=parts[2],
            errors=parts[3],
        )
        self._keep(i, parts)

    def _keep(self, i: int, parts: list[np.ndarray]) -> None:
        self.values[i], self.codes[i], self.blocks[i] = (part[:, 0] for part in parts[:3])
        self.errors[i] = self.weight[i] - self.values[i]

    @property
    def encoded(self) -> Encoded:
        codes = e2m1.pack(self.codes) if self.grid.four else self.codes
        return Encoded(codes, self.blocks if len(self.grid.scales) > 1 else None)


def solve_both(
    format: FormatName,
    weight: Floats,
    scale: np.float32,
    metric: Metric,
    outputs: Doubles,
    sweeps: int,
    factored: bool,
) -> Encoded:
    """Codes from gptq on the input side with its sweeps, or, ``factored``, on both sides; sweeps with O."""
    rows = _Rows(format, weight, scale, metric)
    if factored:
        o = torch.from_numpy(outputs)
        lower = triangular(o.float(), o, 1.0)[0].numpy()
        for i in range(len(weight)):
            rows.gptq(i, weight[i] + lower[i, :i] @ rows.errors[:i])
    else:
        rows.start(solve(format, weight, scale, metric, "gptq", sweeps).encoded, format)
    o32 = outputs.astype(np.float32)
    for _ in range(sweeps):
        for i in range(len(weight)):
            rows.descend(i, (o32[i] @ rows.errors) / o32[i, i])
    return rows.encoded

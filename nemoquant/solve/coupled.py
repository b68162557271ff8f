"""Coordinate descent in the metrics of a GEMM's inputs and of its outputs: rows are no longer independent.

    objective = tr(O E H E'),    E = W - Q [out, in],  H [in, in] of inputs,  O [out, out] of outputs

O is the second moment of the loss's gradients at the outputs, as in YAQA (Tseng et al., 2025, arXiv
2505.22988). With G = O E H, changing a row's block by x changes the objective by ``x (O_ii H x - 2 G_i)``.
So a row is descended as in ``descent.py`` with G_i / O_ii in the place of its gradient, and then the
gradients of the rows after it are brought up to date. Inputs go panel by panel, in each rows tile by tile:
what a tile changes in the gradients outside of it is a product of matrices.

The lanes of these kernels are the trials of a block's scale, because rows have to wait for each other.
"""

import numpy as np
import torch

from nemoquant.formats import FormatName, SolvedMethod, e2m1
from nemoquant.formats.arithmetic import Encoded
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.formats.rounding import Codes, Floats
from nemoquant.solve import descent
from nemoquant.solve.grids import Grid, grid
from nemoquant.solve.kernels import kernel
from nemoquant.solve.lanes import Steps, add_products, look_up, round_lanes
from nemoquant.solve.metric import Doubles, Metric
from nemoquant.solve.solver import Candidate, Solved, compared, encoded_plainly

TILE = 64  # rows
_PANEL = 128  # inputs
_LANES = 8  # float32 in a vector

_aims, _fall, _SLACK = descent._aims, descent._fall, descent.SLACK


@kernel
def _tried(own: np.uint8, first: int, last: int, reach: int, tried: Steps) -> None:
    """A block's own scale, then nearer ones before others; lanes beyond them have its own again."""
    for lane in range(tried.shape[0]):
        step = (lane + 1) // 2 if lane % 2 else -(lane // 2)
        if lane > 2 * reach:
            step = 0
        tried[lane] = min(max(np.int32(own) + np.int32(step), np.int32(first)), np.int32(last))


@kernel
def _add_row(total: Floats, factor: np.float32, row: Floats) -> None:
    for j in range(total.shape[0]):
        total[j] = np.float32(total[j] + factor * row[j])


@kernel
def descend_tile(
    weights: Floats,
    gradients: Floats,
    outputs: Floats,
    metric: Floats,
    sizes: Floats,
    four: bool,
    block: int,
    scales: Floats,
    first: int,
    last: int,
    reach: int,
    values: Floats,
    codes: Codes,
    scale_codes: Codes,
    errors: Floats,
    pushed: Floats,
) -> None:
    """One sweep over a tile.

    Args:
        weights: [rows, inputs].
        gradients: [rows, inputs], G_i / O_ii; overwritten.
        outputs: [rows, rows], the tile's own part of O, each row divided by O_ii.
        metric: [inputs, inputs], the panel's own part of H.
        sizes: [rows], sum_kj |O_ik / O_ii| |e_kj| sqrt(H_jj) over all of E: rounding of G is relative to it.
        four, block, scales, first, last, reach: of the format's grid.
        values, codes, errors: [rows, inputs], changed in place.
        scale_codes: [rows, inputs / block], changed in place; zeros where there is a single scale.
        pushed: [rows, inputs], result: (old - new values) H.
    """
    rows, width = weights.shape
    most = (2 * reach + 1 + _LANES - 1) // _LANES * _LANES
    now, targets, lanes = np.empty(most, np.float32), np.empty(most, np.float32), np.empty(most, np.float32)
    falls, moves = np.empty(most, np.float32), np.empty(most, np.float32)
    old, new = np.empty((block, most), np.float32), np.empty((block, most), np.float32)
    changes, new_codes = np.empty((block, most), np.float32), np.empty((block, most), np.uint8)
    tried = np.empty(most, np.int32)
    for row in range(rows):
        gradient, push = gradients[row], pushed[row]
        push[:] = np.float32(0)
        for k in range(row):
            _add_row(gradient, outputs[row, k], pushed[k])
        for start in range(0, width, block):
            end = min(start + block, width)
            _tried(scale_codes[row, start // block], first, last, reach, tried)
            look_up(scales, tried, lanes)
            falls[:] = np.float32(0)
            moves[:] = np.float32(0)
            for j in range(start, end):
                k = j - start
                now[:] = np.float32(gradient[j] + push[j])
                old[k] = values[row, j]
                add_products(now, metric[j, start:j], changes)
                diagonal = metric[j, j]
                root = np.float32(np.sqrt(diagonal))
                _aims(now, np.float32(np.float32(1) / diagonal), old[k], targets)
                round_lanes(targets, lanes, four, new_codes[k], new[k])
                _fall(now, diagonal, root, old[k], new[k], changes=changes[k], falls=falls, moves=moves)
            best, chosen = np.float32(0), -1
            for lane in range(most):
                fall = np.float32(falls[lane] - np.float32(_SLACK * np.float32(moves[lane] * sizes[row])))
                if fall > best:
                    best, chosen = fall, lane
            if chosen < 0:
                continue
            scale_codes[row, start // block] = np.uint8(tried[chosen])
            for j in range(start, end):
                k = j - start
                values[row, j], codes[row, j] = new[k, chosen], new_codes[k, chosen]
                errors[row, j] = np.float32(weights[row, j] - new[k, chosen])
                if changes[k, chosen] != np.float32(0):
                    _add_row(push, changes[k, chosen], metric[j])


class _Weight:
    """Codes of a weight while they are changed. All are [out, in], scale codes [out, blocks]."""

    def __init__(self, format: FormatName, weight: Floats, scale: np.float32, start: Encoded) -> None:
        self.grid: Grid = grid(format, scale)
        self.weights, blocks = weight, start.block_scales
        self.values = ARITHMETIC[format].decode(start, scale)
        self.codes = e2m1.unpack(start.codes) if self.grid.four else start.codes.copy()
        empty = np.zeros((len(weight), -(-weight.shape[1] // self.grid.block)), np.uint8)
        self.scale_codes = empty if blocks is None else blocks.copy()
        self.errors = weight - self.values

    @property
    def encoded(self) -> Encoded:
        codes = e2m1.pack(self.codes) if self.grid.four else self.codes
        return Encoded(codes, self.scale_codes if len(self.grid.scales) > 1 else None)

    def sweep(self, metric: Floats, outputs: Floats) -> None:
        """``outputs``: each row of O divided by its diagonal."""
        width = len(metric)
        roots = np.sqrt(np.diagonal(metric))
        sizes = np.abs(outputs) @ (np.abs(self.errors) @ roots)
        for start in range(0, width, _PANEL):
            panel = slice(start, min(start + _PANEL, width))
            through = torch.mm(torch.from_numpy(self.errors), torch.from_numpy(metric[:, panel]))
            gradients = torch.mm(torch.from_numpy(outputs), through)
            own = np.ascontiguousarray(metric[panel, panel])
            for top in range(0, len(outputs), TILE):
                rows = slice(top, min(top + TILE, len(outputs)))
                pushed = torch.from_numpy(
                    self._tile(rows, panel, gradients[rows].numpy(), outputs[rows, rows], own, sizes[rows])
                )
                gradients[rows.stop :].addmm_(torch.from_numpy(outputs[rows.stop :, rows]), pushed)

    def _tile(
        self,
        rows: slice,
        panel: slice,
        gradients: Floats,
        outputs: Floats,
        metric: Floats,
        sizes: Floats,
    ) -> Floats:
        """Returns what the tile's changes add to the gradients of others, before O."""
        g = self.grid
        blocks = slice(panel.start // g.block, -(-panel.stop // g.block))
        places = (rows, panel), (rows, panel), (rows, blocks), (rows, panel)
        arrays = self.values, self.codes, self.scale_codes, self.errors
        parts = [np.ascontiguousarray(a[at]) for a, at in zip(arrays, places, strict=True)]
        pushed: Floats = np.empty(gradients.shape, np.float32)
        descend_tile(
            np.ascontiguousarray(self.weights[rows, panel]),
            gradients,
            np.ascontiguousarray(outputs),
            metric,
            sizes,
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
            pushed=pushed,
        )
        for array, at, part in zip(arrays, places, parts, strict=True):
            array[at] = part
        return pushed


def solve_coupled(
    format: FormatName,
    weight: Floats,
    scale: np.float32,
    metric: Metric,
    outputs: Metric,
    start: Encoded,
    method: SolvedMethod,
    sweeps: int,
) -> Solved:
    """Codes of all rows together, with an objective that is never above that of the format's own method.

    Args:
        weight, scale, metric: as :func:`nemoquant.solve.solver.solve` takes them.
        outputs: of the GEMM's outputs, O. It counts relative to the mean of its diagonal.
        start: codes to begin with.
        method: what the codes are called where they are better than the format's own.
        sweeps: of coordinate descent.

    Everything runs on the calling thread but for torch's products of matrices. The same arguments give the
    same bytes with as many of torch's threads on the same kind of machine. Neither metric may be empty.

    Raises ValueError as :func:`nemoquant.solve.solver.solve`, and where O has another number of rows.
    """
    plain = encoded_plainly(format, weight, scale, metric, method, sweeps)
    if len(outputs.matrix) != len(weight) or outputs.empty or metric.empty:
        raise ValueError(
            f"outputs: got {outputs.matrix.shape}, expected {len(weight)} rows, none of both empty"
        )
    found = _Weight(format, weight, scale, start)
    relative: Floats = outputs.units / np.diagonal(outputs.units)[:, None]
    for _ in range(sweeps):
        found.sweep(metric.units, relative)
    before = weight - ARITHMETIC[format].decode(plain, scale)

    def exact(encoded: Encoded) -> float:
        return _exact(weight, ARITHMETIC[format].decode(encoded, scale), metric, outputs)

    return compared(
        format,
        Candidate(found.encoded, coupled_objective(found.errors, metric, outputs)),
        Candidate(plain, coupled_objective(before, metric, outputs)),
        method,
        exact,
    )


def coupled_objective(errors: Floats, metric: Metric, outputs: Metric) -> float:
    """``tr(O E H E')``, O with a mean diagonal of 1; errors [out, in]. See ``solver._objective``."""
    (lower, pivots), (upper, weights) = (
        (torch.from_numpy(m.factor.lower), m.factor.pivots) for m in (metric, outputs)
    )
    missed = torch.mm(upper, torch.mm(torch.from_numpy(errors), lower.T)).numpy()
    sums: Doubles = np.einsum("ij,ij,j->i", missed, missed, pivots, dtype=np.float64)
    return float(weights @ sums) / outputs.unit


def _exact(weight: Floats, values: Floats, metric: Metric, outputs: Metric) -> float:
    errors = torch.from_numpy(weight.astype(np.float64) - values)
    products = torch.mm(torch.mm(torch.from_numpy(outputs.matrix), errors), torch.from_numpy(metric.matrix))
    return float((products * errors).sum()) / outputs.unit

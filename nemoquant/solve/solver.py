"""The codes of one weight, solved for the inputs that its GEMM was seen to have."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from nemoquant.formats import FORMATS, FormatName, Method, SolvedMethod, e2m1
from nemoquant.formats.arithmetic import Encoded
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.formats.rounding import Codes, Floats, checked_scale
from nemoquant.solve.descent import descend_panel
from nemoquant.solve.gptq import solve_panel
from nemoquant.solve.grids import Grid, grid
from nemoquant.solve.hess import solve_blocks
from nemoquant.solve.lanes import PANEL, ROWS
from nemoquant.solve.metric import Doubles, Metric

_CLOSE = 1e-3
"""Objectives that differ by less are computed again in float64."""


class Solved(NamedTuple):
    """Codes of a weight.

    Attributes:
        method: what the codes are from: "gptq" or "hess"; the format's own method where that was better, or
        where
            nothing was observed.
        objective: ``(w - q)' H (w - q)``, summed over rows, in the damped metric; 0 where nothing was
        observed. plain: the same for the format's own method, mse for nvfp4, else max.
    """

    encoded: Encoded
    method: Method
    objective: float
    plain: float


class Candidate(NamedTuple):
    """Codes of a weight with their objective."""

    encoded: Encoded
    objective: float


class _State(NamedTuple):
    """Some rows of a weight while they are solved. All are [in, rows], scale codes [blocks, rows]."""

    weights: Floats
    values: Floats
    codes: Codes
    scale_codes: Codes
    errors: Floats


def solve(
    format: FormatName, weight: Floats, scale: np.float32, metric: Metric, method: SolvedMethod, descent: int
) -> Solved:
    """The codes of a weight, with an objective that is never above that of the format's own method.

    Args:
        weight: float32 [out, in], C-contiguous, finite.
        scale: of the whole tensor, as ``Arithmetic.decode_scale`` gives it (1.0 for mxfp8).
        metric: of the GEMM's inputs.
        method: "hess" is for nvfp4 only.
        descent: sweeps of coordinate descent afterwards.

    Everything runs on the calling thread but for torch's products of matrices. The same arguments give the
    same bytes with as many of torch's threads on the same kind of machine. Raises ValueError for a wrong
    dtype, layout or shape, a scale that is not positive, a negative number of sweeps, or hess with another
    format.
    """
    plain = encoded_plainly(format, weight, scale, metric, method, descent)
    if metric.empty:
        return nothing_observed(format, plain)

    chosen = grid(format, scale)
    solved = Encoded(
        np.empty_like(plain.codes), None if plain.block_scales is None else np.empty_like(plain.block_scales)
    )
    objective = plain_objective = 0.0
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        weights = _turned(weight[rows])
        plain_errors = _turned(weight[rows] - decoded(format, plain, scale, rows))
        plain_objective += _objective(metric, plain_errors)
        state = _State(
            weights,
            np.empty_like(weights),
            np.empty(weights.shape, np.uint8),
            _start_scales(plain, rows, weights.shape, chosen.block),
            np.empty_like(weights),
        )
        if method == "gptq":
            part = _gptq(state, metric, chosen, scale)
        else:
            _hess(state, metric, chosen)
            part = None
        for _ in range(descent):
            _sweep(state, metric, chosen)
        # Not gptq's less the falls, which float32 does not hold for very small or large weights.
        objective += part if part is not None and not descent else _objective(metric, state.errors)
        solved.codes[rows] = e2m1.pack(_turned(state.codes)) if chosen.four else state.codes.T
        if solved.block_scales is not None:
            solved.block_scales[rows] = state.scale_codes.T

    found = Candidate(solved, objective)
    return better(
        format, weight, scale, metric, found, plain=Candidate(plain, plain_objective), method=method
    )


def product_flop(method: SolvedMethod, descent: int) -> int:
    """Flop of products with H (2) or its factor (1), an input of each weight.

    One for the objective of the plain codes; one for gptq's feedback, or the objective of hess; two for each
    sweep, and one for the objective after gptq's.
    """
    return 2 + 2 * descent + (1 if method == "gptq" and descent else 0)


def encoded_plainly(
    format: FormatName, weight: Floats, scale: np.float32, metric: Metric, method: SolvedMethod, descent: int
) -> Encoded:
    """The codes of the format's own method. Refuses what :func:`solve` refuses."""
    known = FORMATS[format].solved
    if method not in known:
        raise ValueError(f"method: got {method!r} for {format}, expected {' or '.join(known)}")
    if descent < 0:
        raise ValueError(f"descent: got {descent} sweeps, expected zero or more")
    if weight.dtype != np.float32 or weight.ndim != 2 or weight.shape[1] != len(metric.matrix):
        raise ValueError(
            f"weight: got {weight.dtype} {weight.shape}, expected float32 [out, {len(metric.matrix)}]"
        )
    checked_scale(scale, "scale")
    return ARITHMETIC[format].encode(weight, scale, FORMATS[format].plain)


def nothing_observed(format: FormatName, plain: Encoded) -> Solved:
    """The plain codes, where the metric is empty."""
    return Solved(plain, FORMATS[format].plain, 0.0, 0.0)


def better(
    format: FormatName,
    weight: Floats,
    scale: np.float32,
    metric: Metric,
    solved: Candidate,
    plain: Candidate,
    method: SolvedMethod,
) -> Solved:
    """The solved codes where their objective is below the plain one, else the plain codes.

    Objectives that float32 can't tell apart are computed again in float64.
    """
    return compared(
        format,
        solved,
        plain,
        method,
        lambda encoded: _exact_objective(format, weight, encoded, scale, metric),
    )


def compared(
    format: FormatName,
    solved: Candidate,
    plain: Candidate,
    method: SolvedMethod,
    exact: Callable[[Encoded], float],
) -> Solved:
    """As :func:`better`, with ``exact`` to compute an objective in float64."""
    if abs(solved.objective - plain.objective) <= _CLOSE * plain.objective:
        solved, plain = (Candidate(found.encoded, exact(found.encoded)) for found in (solved, plain))
    if solved.objective < plain.objective:
        return Solved(solved.encoded, method, solved.objective, plain.objective)
    return Solved(plain.encoded, FORMATS[format].plain, plain.objective, plain.objective)


def _turned(rows: np.ndarray) -> np.ndarray:
    """[rows, in] as contiguous [in, rows], and back; its own memory, a single row or column of it too."""
    return np.array(rows.T, order="C")


def decoded(format: FormatName, encoded: Encoded, scale: np.float32, rows: slice) -> Floats:
    """What some rows of codes stand for, float32."""
    blocks = encoded.block_scales
    return ARITHMETIC[format].decode(
        Encoded(encoded.codes[rows], None if blocks is None else blocks[rows]), scale
    )


def _start_scales(plain: Encoded, rows: slice, shape: tuple[int, int], block: int) -> Codes:
    """The block scales of the format's own method, or zeros for the single scale of fp8."""
    if plain.block_scales is not None:
        return _turned(plain.block_scales[rows])
    return np.zeros((-(-shape[0] // block), shape[1]), np.uint8)


def _gptq(state: _State, metric: Metric, grid: Grid, scale: np.float32) -> float:
    """Fill the state; returns the objective."""
    inputs, rows = state.weights.shape
    lower, pivots = metric.factor.lower, metric.factor.pivots
    objective = np.zeros(rows)
    for start in range(0, inputs, PANEL):
        panel = slice(start, min(start + PANEL, inputs))
        targets = state.weights[panel].copy()
        if start:
            torch.from_numpy(targets).addmm_(
                torch.from_numpy(lower[panel, :start]), torch.from_numpy(state.errors[:start])
            )
        solve_panel(
            state.weights[panel],
            targets,
            np.ascontiguousarray(lower[panel, panel]),
            pivots[panel],
            four=grid.four,
            block=grid.block,
            scales=grid.scales,
            global_scale=scale,
            values=state.values[panel],
            codes=state.codes[panel],
            scale_codes=state.scale_codes[start // grid.block :],
            errors=state.errors[panel],
            objective=objective,
        )
    return float(objective.sum())


def _hess(state: _State, metric: Metric, grid: Grid) -> None:
    """Fill the state, whose block scales are those with the least squared error."""
    inputs = len(state.weights)
    blocks = metric.units.reshape(inputs // grid.block, grid.block, inputs // grid.block, grid.block)
    diagonal = np.einsum("aiaj->aij", blocks).copy()
    np.einsum("aii->ai", diagonal)[...] /= 2
    solve_blocks(
        state.weights,
        diagonal.reshape(inputs, grid.block),
        scales=grid.scales,
        first=grid.first,
        last=grid.last,
        values=state.values,
        codes=state.codes,
        scale_codes=state.scale_codes,
        errors=state.errors,
    )


def _sweep(state: _State, metric: Metric, grid: Grid) -> None:
    """One sweep of coordinate descent over all inputs."""
    inputs = len(state.weights)
    units = metric.units
    sizes = np.sqrt(np.diagonal(units)) @ np.abs(state.errors)
    for start in range(0, inputs, PANEL):
        panel = slice(start, min(start + PANEL, inputs))
        gradients = torch.mm(torch.from_numpy(units[panel]), torch.from_numpy(state.errors)).numpy()
        descend_panel(
            state.weights[panel],
            gradients,
            np.ascontiguousarray(units[panel, panel]),
            sizes,
            four=grid.four,
            block=grid.block,
            scales=grid.scales,
            first=grid.first,
            last=grid.last,
            reach=grid.reach,
            values=state.values[panel],
            codes=state.codes[panel],
            scale_codes=state.scale_codes[start // grid.block :],
            errors=state.errors[panel],
        )


def _objective(metric: Metric, errors: Floats) -> float:
    """``sum_j D_j (L e)_j^2`` of errors [in, rows]: products in float32, squares and their sum in float64.

    No terms cancel, so that it is about as exact as a float32 number.
    """
    lower, pivots = metric.factor.lower, metric.factor.pivots
    total = 0.0
    for start in range(0, len(errors), PANEL):
        end = min(start + PANEL, len(errors))
        missed = torch.mm(torch.from_numpy(lower[start:end, :end]), torch.from_numpy(errors[:end])).numpy()
        total += float(pivots[start:end] @ np.einsum("jl,jl->j", missed, missed, dtype=np.float64))
    return total


def _exact_objective(
    format: FormatName, weight: Floats, encoded: Encoded, scale: np.float32, metric: Metric
) -> float:
    matrix = torch.from_numpy(metric.matrix)
    total = 0.0
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        values = decoded(format, encoded, scale, rows).astype(np.float64)
        errors: Doubles = weight[rows].astype(np.float64) - values
        total += float(np.einsum("rj,rj->", torch.mm(torch.from_numpy(errors), matrix).numpy(), errors))
    return total

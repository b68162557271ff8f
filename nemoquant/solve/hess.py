"""A scale for each block of nvfp4 by the block's own part of H: the candidate with the least error in it.

Codes are the nearest ones. Candidates are the scale with the least squared error and its eight neighbours on
each side; ties go to the nearer, then to the larger one.
"""

import numpy as np

from nemoquant.formats.nvfp4_blocks import BLOCK
from nemoquant.formats.rounding import Codes, Floats
from nemoquant.solve.kernels import contracted_kernel, kernel
from nemoquant.solve.lanes import Steps, add_products, look_up, nearest_lanes, neighbours, round_lanes

REACH = 8
"""Candidates on each side."""

_LANES = 128  # rows at a time at most: all that a trial touches stays in the first-level cache


@kernel
def _differences(weights: Floats, values: Floats, errors: Floats) -> None:
    for lane in range(values.shape[0]):
        errors[lane] = np.float32(weights[lane] - values[lane])


@contracted_kernel
def _add_error(errors: Floats, halves: Floats, total: Floats) -> None:
    """Add ``e_j (H_jj e_j + 2 sum_{k<j} H_jk e_k)``, where ``halves`` is half of what is in brackets."""
    for lane in range(total.shape[0]):
        total[lane] = np.float32(total[lane] + np.float32(errors[lane] * halves[lane]))


@kernel
def _keep(total: Floats, least: Floats, tried: Steps, chosen: Steps) -> None:
    for lane in range(total.shape[0]):
        better = total[lane] < least[lane]
        least[lane] = total[lane] if better else least[lane]
        chosen[lane] = tried[lane] if better else chosen[lane]


@kernel
def solve_blocks(
    weights: Floats,
    metric: Floats,
    scales: Floats,
    first: int,
    last: int,
    values: Floats,
    codes: Codes,
    scale_codes: Codes,
    errors: Floats,
) -> None:
    """The codes of all blocks.

    Args:
        weights: [in, rows].
        metric: [in, 16], the rows of H's blocks on the diagonal, their diagonals halved.
        scales, first, last: of nvfp4's grid.
        values, codes, errors: [in, rows], results: decoded values, codes, weights - values.
        scale_codes: [in / 16, rows], on entry those with the least squared error; changed in place.
    """
    inputs, rows = weights.shape
    most = min(_LANES, rows)
    new, new_errors = np.empty((BLOCK, most), np.float32), np.empty((BLOCK, most), np.float32)
    weight, new_codes = np.zeros((BLOCK, most), np.float32), np.empty(most, np.uint8)
    lanes, total, least = (
        np.empty(most, np.float32),
        np.empty(most, np.float32),
        np.empty(most, np.float32),
    )
    halves = np.empty(most, np.float32)
    tried, chosen, own = np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most, np.int32)
    own[:] = np.int32(first)

    for start in range(0, inputs, BLOCK):
        for left in range(0, rows, most):
            count = min(most, rows - left)
            for k in range(BLOCK):
                weight[k, :count] = weights[start + k, left : left + count]
            own[:count] = scale_codes[start // BLOCK, left : left + count]
            chosen[:] = own
            least[:] = np.float32(np.inf)
            for turn in range(2 * REACH + 1):
                step = (turn + 1) // 2 if turn % 2 else -(turn // 2)
                neighbours(own, step, first, last, tried)
                look_up(scales, tried, lanes)
                total[:] = np.float32(0)
                for k in range(BLOCK):
                    nearest_lanes(weight[k], lanes, True, new[k])
                    _differences(weight[k], new[k], new_errors[k])
                    halves[:] = np.float32(0)
                    add_products(halves, metric[start + k, : k + 1], new_errors)
                    _add_error(new_errors[k], halves, total)
                _keep(total, least, tried, chosen)
            look_up(scales, chosen, lanes)
            for k in range(BLOCK):
                round_lanes(weight[k], lanes, True, new_codes, new[k])
                for lane in range(count):
                    value = new[k, lane]
                    values[start + k, left + lane] = value
                    codes[start + k, left + lane] = new_codes[lane]
                    errors[start + k, left + lane] = np.float32(weights[start + k, left + lane] - value)
            for lane in range(count):
                scale_codes[start // BLOCK, left + lane] = np.uint8(chosen[lane])

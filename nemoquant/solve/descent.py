"""Coordinate descent: codes one after the other to where the objective is least, all others held.

With G = H (w - q), changing q_k by x changes the objective by ``x (x H_kk - 2 G_k)``, least at ``x = G_k /
H_kk``. So a code becomes ``round(q_k + G_k / H_kk)``. A block is tried so with its own scale and with
neighbouring ones, and the trial with the largest fall is kept, if the objective falls by more than G's
rounding could feign.
"""

import numpy as np

from nemoquant.formats.rounding import Codes, Floats
from nemoquant.solve.kernels import contracted_kernel, kernel
from nemoquant.solve.lanes import (
    Steps,
    add_products,
    copy_lanes,
    look_up,
    nearest_lanes,
    neighbours,
    round_lanes,
)

_LANES = 128  # rows at a time at most: all that a trial touches stays in the first-level cache
# A fall below this part of sum |x_k| sqrt(H_kk) times sum |e_j| sqrt(H_jj), which bounds |x' H e|, may be
# rounding: 32 units of float32 in the last place.
SLACK = np.float32(2.0**-19)


@contracted_kernel
def _fall(
    gradient: Floats,
    diagonal: np.float32,
    root: np.float32,
    old: Floats,
    new: Floats,
    changes: Floats,
    falls: Floats,
    moves: Floats,
) -> None:
    """Add one code's part to the fall of the objective, and to the length of the move.

    ``changes`` = old - new, so that adding products with H brings G up to date.
    """
    for lane in range(old.shape[0]):
        change = np.float32(new[lane] - old[lane])
        changes[lane] = -change
        falls[lane] += np.float32(change * np.float32(np.float32(2) * gradient[lane] - change * diagonal))
        moves[lane] += np.float32(abs(change) * root)


@contracted_kernel
def _aims(gradient: Floats, inverse: np.float32, old: Floats, targets: Floats) -> None:
    for lane in range(old.shape[0]):
        targets[lane] = np.float32(old[lane] + gradient[lane] * inverse)


@kernel
def _keep(falls: Floats, moves: Floats, sizes: Floats, best: Floats, tried: Steps, chosen: Steps) -> None:
    """Note this trial for the rows where it is the best one so far."""
    for lane in range(falls.shape[0]):
        fall = np.float32(falls[lane] - np.float32(SLACK * np.float32(moves[lane] * sizes[lane])))
        better = fall > best[lane]
        best[lane] = fall if better else best[lane]
        chosen[lane] = tried[lane] if better else chosen[lane]


@kernel
def descend_panel(
    weights: Floats,
    gradients: Floats,
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
) -> None:
    """One sweep over a panel of inputs.

    Args:
        weights: [panel, rows].
        gradients: [panel, rows], the panel's rows of H (w - q); overwritten.
        metric: [panel, panel], the panel's own part of H.
        sizes: [rows], sum |e_j| sqrt(H_jj) over all inputs.
        four, block, scales, first, last, reach: of the format's grid.
        values, codes, errors: [panel, rows], changed in place.
        scale_codes: [panel / block, rows], changed in place; zeros where there is a single scale.
    """
    width, rows = weights.shape
    most = min(_LANES, rows)
    gradient, now = np.empty((block, most), np.float32), np.empty(most, np.float32)
    old, new = np.empty((block, most), np.float32), np.empty((block, most), np.float32)
    changes, new_codes = np.empty((block, most), np.float32), np.empty((block, most), np.uint8)
    lanes, falls, moves = (
        np.empty(most, np.float32),
        np.empty(most, np.float32),
        np.empty(most, np.float32),
    )
    best, targets = np.empty(most, np.float32), np.empty(most, np.float32)
    tried, chosen, own = np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most, np.int32)
    size = np.zeros(most, np.float32)
    moved = np.zeros((width, rows), np.float32)  # old - new values

    for start in range(0, width, block):
        end = min(start + block, width)
        for j in range(start, end):
            add_products(gradients[j], metric[j, :start], moved)
        for left in range(0, rows, most):
            count = min(most, rows - left)
            # The last lanes may be of no row: whatever they hold is not copied back.
            for j in range(start, end):
                gradient[j - start] = np.float32(0)
                old[j - start] = np.float32(0)
                gradient[j - start, :count] = gradients[j, left : left + count]
                old[j - start, :count] = values[j, left : left + count]
            own[:] = np.int32(first)
            own[:count] = scale_codes[start // block, left : left + count]
            size[:count] = sizes[left : left + count]
            best[:] = np.float32(0)
            chosen[:] = own
            # Codes are made of the best trial alone, which the last turn repeats.
            turns = 2 * reach + 1
            for turn in range(turns + 1):
                step = (turn + 1) // 2 if turn % 2 else -(turn // 2)
                again = turn == turns
                if again:
                    tried[:] = chosen
                else:
                    neighbours(own, step, first, last, tried)
                look_up(scales, tried, lanes)
                falls[:] = np.float32(0)
                moves[:] = np.float32(0)
                for j in range(start, end):
                    k = j - start
                    copy_lanes(gradient[k], now)
                    add_products(now, metric[j, start:j], changes)
                    diagonal = metric[j, j]
                    root = np.float32(np.sqrt(diagonal))
                    _aims(now, np.float32(np.float32(1) / diagonal), old[k], targets)
                    if again:
                        round_lanes(targets, lanes, four, new_codes[k], new[k])
                    else:
                        nearest_lanes(targets, lanes, four, new[k])
                    _fall(now, diagonal, root, old[k], new[k], changes=changes[k], falls=falls, moves=moves)
                if not again:
                    _keep(falls, moves, size, best, tried=tried, chosen=chosen)
            for lane in range(count):
                if best[lane] > np.float32(0):
                    scale_codes[start // block, left + lane] = np.uint8(chosen[lane])
            for j in range(start, end):
                k = j - start
                for lane in range(count):
                    if best[lane] > np.float32(0):
                        value = new[k, lane]
                        moved[j, left + lane] = changes[k, lane]
                        values[j, left + lane] = value
                        codes[j, left + lane] = new_codes[k, lane]
                        errors[j, left + lane] = np.float32(weights[j, left + lane] - value)

"""GPTQ: codes one after the other, each making up for the errors before it (see ``metric.py``).

A block gets its scale just before its first code, from weights that already make up for the blocks before:
for nvfp4 the scale with the least squared error of all 126, for mxfp8 the format's own rule. fp8 keeps its
one scale, and what exceeds it saturates.
"""

import numpy as np

from nemoquant.formats import e4m3, e8m0, nvfp4_blocks, nvfp4_search
from nemoquant.formats.rounding import Codes, Floats, bits_of
from nemoquant.solve.kernels import kernel
from nemoquant.solve.lanes import add_products, look_up, round_lanes
from nemoquant.solve.metric import Doubles

_choose_least_error = nvfp4_search.choose_least_error
_scale_codes = nvfp4_blocks.scale_codes
_ceil_code = e8m0.ceil_code
_ONE = e4m3.ONE
_SMALLEST = e4m3.SMALLEST


@kernel
def _largest(targets: Floats, largest: Floats) -> None:
    """Each row's largest magnitude in a block."""
    largest[:] = np.float32(0)
    for target in targets:
        for lane in range(largest.shape[0]):
            magnitude = np.float32(abs(target[lane]))
            largest[lane] = magnitude if magnitude > largest[lane] else largest[lane]


@kernel
def _choose_scales(targets: Floats, four: bool, global_scale: np.float32, scale_codes: Codes) -> None:
    """Each row's scale of a block by the format's rule: nvfp4's method mse, mxfp8's only one."""
    width, rows = targets.shape
    largest = np.empty(rows, np.float32)
    _largest(targets, largest)
    if not four:
        for lane in range(rows):
            scale_codes[lane] = _ceil_code(bits_of(np.float32(largest[lane] / np.float32(448))))
        return
    bits = np.empty((rows, width), np.float32)
    for lane in range(rows):
        for j in range(width):
            bits[lane, j] = targets[j, lane]
    none = np.uint32(0)
    patterns, magnitudes = bits.view(np.uint32), largest.view(np.uint32)
    _scale_codes(
        magnitudes,
        none,
        np.float32(1),
        onto=np.float32(np.float32(6) * global_scale),
        least=np.float32(_SMALLEST),
        zeros=np.uint8(_ONE),
        codes=scale_codes,
    )
    _choose_least_error(patterns, none, magnitudes, global_scale, scale_codes)


@kernel
def _updated(weights: Floats, targets: Floats, lower: Floats, updated: Floats, errors: Floats) -> None:
    """The weights of a block [block, rows] that make up for all errors before it; its scale is for them.

    A target counts on the errors of the block's earlier codes too, which are not known yet. They are taken to
    be such that every code meets its target. ``lower`` [block, block]; ``errors`` [block, rows] is scratch.
    """
    for k in range(weights.shape[0]):
        weight, value, error = weights[k], updated[k], errors[k]
        value[:] = targets[k]
        add_products(value, lower[k, :k], errors)
        for lane in range(value.shape[0]):
            error[lane] = np.float32(weight[lane] - value[lane])


@kernel
def solve_panel(
    weights: Floats,
    targets: Floats,
    lower: Floats,
    pivots: Doubles,
    four: bool,
    block: int,
    scales: Floats,
    global_scale: np.float32,
    values: Floats,
    codes: Codes,
    scale_codes: Codes,
    errors: Floats,
    objective: Doubles,
) -> None:
    """The codes of a panel of inputs.

    Args:
        weights: [panel, rows].
        targets: the same with the feedback of all inputs before the panel; overwritten.
        lower, pivots: the panel's own part of L [panel, panel], and of D [panel].
        four, block, scales: of the format's grid.
        global_scale: nvfp4's scale of the whole tensor.
        values, codes, errors: [panel, rows], results: decoded values, codes, weights - values.
        scale_codes: [panel / block, rows], results; left alone where there is a single scale.
        objective: [rows], to which the panel's part is added.
    """
    width, rows = weights.shape
    lanes = np.empty(rows, np.float32)
    lanes[:] = scales[0]
    updated, assumed = np.empty((block, rows), np.float32), np.empty((block, rows), np.float32)
    for start in range(0, width, block):
        end = min(start + block, width)
        for j in range(start, end):
            add_products(targets[j], lower[j, :start], errors)
        if scales.shape[0] > 1:
            chosen = scale_codes[start // block]
            within = lower[start:end, start:end]
            _updated(weights[start:end], targets[start:end], within, updated, errors=assumed)
            _choose_scales(updated, four, global_scale, chosen)
            look_up(scales, chosen, lanes)
        for j in range(start, end):
            target, weight, value, error = targets[j], weights[j], values[j], errors[j]
            add_products(target, lower[j, start:j], errors[start:end])
            round_lanes(target, lanes, four, codes[j], value)
            pivot = pivots[j]
            for lane in range(rows):
                error[lane] = np.float32(weight[lane] - value[lane])
                missed = np.float64(np.float32(target[lane] - value[lane]))
                objective[lane] += pivot * missed * missed

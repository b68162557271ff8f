"""This machine's speed in solving: kernels by weight, and large products in both precisions."""

import numpy as np
import torch

from nemoquant.formats.registry import ARITHMETIC
from nemoquant.machine import torch_threads
from nemoquant.planning.plan import Plan
from nemoquant.run.timing import seconds
from nemoquant.solve.metric import gram, prepare
from nemoquant.solve.solver import solve

WIDTH = 128  # one panel: products take next to nothing
ROWS = 512
SIDE = 768


def solve_speeds(plan: Plan, threads: int) -> tuple[float, float, float]:
    """``solve``, ``single`` and ``double`` of :class:`nemoquant.run.speeds.Speeds`."""
    row = max((row for row in plan.quantized if row.solved), key=lambda row: row.elements)
    assert row.format != "source"
    random = np.random.default_rng(0)
    weight = random.standard_normal((ROWS, WIDTH), np.float32)
    metric = prepare(gram([random.standard_normal((WIDTH, WIDTH), np.float32)], WIDTH), WIDTH, 0.5)
    scale = ARITHMETIC[row.format].decode_scale(np.abs(weight).max()).value
    method, descent = row.solved_method, plan.recipe.solve.descent

    def once() -> object:
        return solve(row.format, weight, scale, metric, method, descent)  # type: ignore[arg-type]

    with torch_threads(threads):
        once()  # compiles or loads the kernels
        kernel = seconds(once) / weight.size
        rates = []
        for dtype in (torch.float32, torch.float64):
            x = torch.ones(SIDE, SIDE, dtype=dtype)
            x @ x
            rates.append(2 * SIDE**3 / seconds(lambda x=x: x @ x))  # type: ignore[misc]
    return kernel, rates[0], rates[1]

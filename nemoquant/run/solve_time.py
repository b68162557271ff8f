"""Seconds of folds and solving: amounts by the plan, over measured rates.

On a GPU weights are solved there, and the rest is done by the host as without one. No GPU has been measured:
its rates are assumed, those of an H100.
"""

import math
from typing import TYPE_CHECKING

from nemoquant.calibrate.batch import Batch
from nemoquant.formats import Device
from nemoquant.planning.plan import Plan
from nemoquant.planning.row import Row
from nemoquant.run.speeds import Speeds

if TYPE_CHECKING:
    from nemoquant.run.solve_speeds import SolveSpeeds

GPU_FLOPS = 30e12  # flop/s of float32 products, assumed: a little less than half of the peak
GPU_FACTOR = 1e12  # flop/s of the factor of one H, assumed
GPU_BYTES = 2e12  # bytes/s of its memory in elementwise operations, assumed
GPU_BUS = 6e9  # bytes/s of PCIe from memory that is not pinned, assumed
GPU_LAUNCH = 5e-6  # seconds an operation of torch, assumed

COUPLED = 1.5  # time of the kernel of sweeps in both metrics, over that of all without, measured

# Operations of torch for one input of the weights that are solved at once, and bytes that they read and write
# for a weight; a test counts both. `search` is that of block scales among all of them.
LAUNCHES = {"gptq": 10.4, "hess": 1.7}
SWEEP_LAUNCHES = 11.4
BYTES, SEARCH_BYTES = {"gptq": 270, "hess": 1430}, {"gptq": 1850, "hess": 0}
SWEEP_BYTES, TRIAL_BYTES = 85, 155
BUS_BYTES = 11  # of a weight: itself, plain values, scales and codes, both ways


def solve_seconds(plan: Plan, batch: Batch, speeds: Speeds, threads: int, device: Device = "cpu") -> float:
    """Seconds of all that is done beside the pass of calibration itself.

    Args:
        batch: all rows of the calibration.
        speeds: measured, of this machine's CPU.
        device: where weights are solved.
    """
    if speeds.solve is None:
        return 0.0
    layers: dict[int | None, list[Row]] = {}
    for row in plan.quantized:
        layers.setdefault(row.layer, []).append(row)
    host = _Host(plan, batch, speeds.solve, threads, device)
    total = sum(host.layer(rows) for rows in layers.values())
    total += sum(row.bytes_out for row in plan.quantized if row.solved) / speeds.sync
    return total + (_gpu_seconds(plan, threads) if device == "cuda" else 0.0)


class _Host:
    """Seconds of this machine's CPU by layer. What experts need is done by all threads side by side."""

    def __init__(self, plan: Plan, batch: Batch, speeds: "SolveSpeeds", threads: int, device: Device) -> None:
        self.plan, self.batch, self.speeds, self.threads = plan, batch, speeds, threads
        self.device = device

    def layer(self, rows: list[Row]) -> float:
        from nemoquant.solve.layer import units
        from nemoquant.solve.taps import input_of

        solved = [row for row in rows if row.solved]
        folds = self.plan.recipe.folds if rows[0].layer is not None else ()
        kept = {input_of(row): self._values(row) for row in (rows if folds else solved)}
        seconds = sum(kept.values()) * (self.speeds.keep + (self.speeds.value if folds else 0.0))
        seconds += self._latent([row for row in rows if self._has_matrix(row)])
        return seconds + sum(self._unit(part) for part in units(solved))

    def _values(self, row: Row) -> float:
        """Values of an expert's input, or of any other."""
        return self._tokens(row) * row.shape[1]

    def _tokens(self, row: Row) -> float:
        if row.expert is None or row.layer is None:
            return float(self.batch.tokens)
        return self.batch.tokens * self.plan.config.of_layer(row.layer).routed_share

    def _has_matrix(self, row: Row) -> bool:
        from nemoquant.solve.folds.chosen import has_matrix

        return "latent" in self.plan.recipe.folds and has_matrix(self.plan.config, row)

    def _latent(self, rows: list[Row]) -> float:
        """Choosing the matrix and finding folded maxima; inputs and weights are folded again to be solved."""
        from nemoquant.solve.metric import gram_products

        s, seconds = self.speeds, 0.0
        for row in rows:
            width, values = row.shape[1], self._values(row)
            seconds += values * s.value
            seconds += 2 * row.elements * width / s.single / self.threads
            doubles = 2 * self._tokens(row) * gram_products(width) + 2 * values * width
            seconds += doubles / s.double / self.threads
        return seconds

    def _unit(self, part: list[Row]) -> float:
        s, experts = self.speeds, part[0].expert is not None
        together, inputs = (self.threads, part) if experts else (1, part[:1])
        # One thread hashes the inputs before: it reads them about as fast as they were written.
        seconds = sum(self._values(row) for row in inputs) * (s.keep + s.value / together)
        seconds += sum(self._moments(row, together) for row in inputs)
        if self.plan.propagates:
            seconds += sum(self._target(row, together) for row in inputs)
            seconds += sum(2 * r.elements * r.shape[1] for r in part) / s.double / self.threads
        return seconds + sum(self._weight(row) for row in part)

    def _moments(self, row: Row, together: int) -> float:
        from nemoquant.solve.metric import gram_products

        s, width = self.speeds, row.shape[1]
        doubles = 2 * self._tokens(row) * gram_products(width)
        if self._has_matrix(row):
            doubles += 2 * self._values(row) * width
        factor = 0.0 if self.device == "cuda" else width**3 / 3 / s.factor
        # Of a dense weight torch's products have all threads.
        return (doubles / s.double + factor) / self.threads + width**2 * s.moment / together

    def _target(self, row: Row, together: int) -> float:
        """On the quantized stream: its inputs, kept and hashed; sums of products of both; a factor."""
        from nemoquant.solve.order import WRITERS

        s, (out, width) = self.speeds, row.shape
        other = out if row.role in WRITERS else width
        values = self._values(row) + self._tokens(row) * other
        seconds = values * (2 * s.keep + 2 * s.value / together)
        doubles = 2 * self._tokens(row) * width * other + width**3 / 3
        doubles += 0 if row.role in WRITERS else 2 * width**3
        return seconds + doubles / s.double / self.threads

    def _weight(self, row: Row) -> float:
        from nemoquant.solve.memory import SLICE_ELEMENTS
        from nemoquant.solve.solver import product_flop

        s, width = self.speeds, row.shape[1]
        flop = product_flop(row.solved_method, self.plan.recipe.solve.descent)
        products = flop * row.elements * width
        seconds = row.elements * s.weight
        seconds += 0.0 if self.device == "cuda" else row.elements * s.kernel + products / s.single
        slices = math.ceil(row.shape[0] / max(1, SLICE_ELEMENTS // width))
        seconds /= self.threads if row.expert is not None else min(self.threads, slices)
        if self._has_matrix(row):
            seconds += 2 * row.elements * width / s.double / self.threads
        if self.plan.weighs_outputs and row.weighed:
            seconds += self._coupled(row)
        return seconds

    def _coupled(self, row: Row) -> float:
        """With errors of outputs weighed: their gradients, kept and hashed; their metric; sweeps in both."""
        from nemoquant.solve.memory import coupled_rows
        from nemoquant.solve.metric import gram_products

        s, (out, width), descent = self.speeds, row.shape, self.plan.recipe.solve.descent
        tokens, together = self._tokens(row), coupled_rows(out)
        parts = -(-out // together)
        seconds = parts * (2 * tokens * gram_products(together) / s.double + together**3 / 3 / s.factor)
        seconds += tokens * out * s.value * parts + parts * together**2 * s.moment
        # H's and O's products with all errors, half of O's again within a sweep; two objectives.
        flop = descent * (2 * width + 3 * together) + 2 * (width + together)
        seconds += row.elements * (COUPLED * s.kernel + flop / s.single)
        seconds /= self.threads if row.expert is not None else min(self.threads, parts)
        return seconds + 2 * tokens * out * s.keep


def _gpu_seconds(plan: Plan, threads: int) -> float:
    """What an H100 is assumed to need; launches and the memory's traffic overlap, nothing else does."""
    import numpy as np

    from nemoquant.solve.grids import grid
    from nemoquant.solve.on_device import ELEMENTS

    descent, seconds = plan.recipe.solve.descent, 0.0
    for row in plan.quantized:
        if not row.solved:
            continue
        assert row.format != "source"
        numbers, width, method = grid(row.format, np.float32(1)), row.shape[1], row.solved_method
        trials = 2 * numbers.reach + 1
        launches = width * (LAUNCHES[method] + SWEEP_LAUNCHES * descent)
        # As many experts at once as there are threads; a large weight in parts.
        at_once = threads if row.expert is not None else 1 / math.ceil(row.elements / ELEMENTS)
        moved = BYTES[method] + numbers.four * SEARCH_BYTES[method]
        moved += descent * (SWEEP_BYTES + TRIAL_BYTES * trials)
        seconds += max(launches * GPU_LAUNCH / at_once, moved * row.elements / GPU_BYTES)
        seconds += (3 + 2 * descent) * row.elements * width / GPU_FLOPS
        seconds += BUS_BYTES * row.elements / GPU_BUS
        seconds += width**3 / 3 / GPU_FACTOR + 8 * width**2 / GPU_BUS
    return seconds

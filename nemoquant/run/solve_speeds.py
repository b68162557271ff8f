"""This machine's speed in solving: the steps of it on small samples, with all threads at work as in a run."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from nemoquant.calibrate.inputs import InputFile
from nemoquant.formats import FormatName
from nemoquant.formats.amax import amax
from nemoquant.formats.arithmetic import round_trip
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.machine import torch_threads
from nemoquant.planning.plan import Plan
from nemoquant.planning.row import Row
from nemoquant.run.timing import seconds
from nemoquant.solve.folds.layer import NO_FOLDS, input_transform
from nemoquant.solve.lanes import PANEL, ROWS
from nemoquant.solve.metric import Doubles, gram, gram_products, prepare
from nemoquant.solve.solver import encoded_plainly, product_flop, solve
from nemoquant.solve.source import floats, squares

ROUNDS = 3  # the shortest counts
TOKENS = 256
MANY = 16  # copies of the solved sample: sums of fewer values would be the cost of calls
WIDEST = 1024  # of a sample: second moments of a wider input take as long an element


@dataclass(frozen=True)
class SolveSpeeds:
    """Measured speeds of the CPU in solving: of one thread while all are at work.

    Attributes:
        weight: seconds a weight to read it, for its plain codes, and for what its codes missed.
        kernel: seconds a weight for solved codes and scales, products aside.
        keep: seconds an input's value when it is kept.
        value: seconds an input's value each time that it is looked at: read, folded, rounded, in float64.
        moment: seconds an element of H, from sums to the metric, products and factor aside.
        single: flop/s of the products of a panel.
        double: flop/s of second moments, and of products with a fold's matrix.
        factor: flop/s of the factor of H.
    """

    weight: float
    kernel: float
    keep: float
    value: float
    moment: float
    single: float
    double: float
    factor: float


def solve_speeds(plan: Plan, threads: int, *, busy: bool = False) -> SolveSpeeds:
    """Measure the steps for the plan's solved weights; of folds alone, for its quantized ones.

    ``busy``: other programs have a part of the machine now, not later: what counts is processor time.
    """
    rows = [row for row in plan.quantized if row.solved] or list(plan.quantized)
    row = max(rows, key=lambda row: row.elements)
    width = min(WIDEST, _usual_width(rows))
    random = np.random.default_rng(0)
    x = random.standard_normal((TOKENS, width), np.float32)
    moments = gram([x], width)
    with torch_threads(threads), ThreadPoolExecutor(threads, "measure", torch.set_num_threads, (1,)) as pool:

        def took(work: Callable[[], object]) -> float:
            def all_at_once() -> None:
                list(pool.map(lambda _: work(), range(threads)))

            all_at_once()  # compiles or loads the kernels
            if busy:
                return min(_processor_seconds(all_at_once) for _ in range(ROUNDS)) / threads
            return min(seconds(all_at_once) for _ in range(ROUNDS))

        rest, into = torch.zeros(PANEL, width), torch.zeros(width, ROWS)
        single = 2 * PANEL * width * ROWS / took(lambda: torch.mm(rest, into))
        sums = torch.zeros(width, width, dtype=torch.float64)
        doubles = torch.from_numpy(x.astype(np.float64))
        double = 2 * TOKENS * gram_products(width) / took(lambda: torch.addmm(sums, doubles.T, doubles))
        factor = _factor_rate(moments, took)
        keep, value = _value(row, x, took)
        weight, kernel = _weight(plan, row, single, took)
        return SolveSpeeds(
            weight=weight,
            kernel=kernel,
            keep=keep,
            value=value,
            moment=took(lambda: _metric(width)) / width**2,
            single=single,
            double=double,
            factor=factor,
        )


def _processor_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return max(time.process_time() - began, 1e-7)


Took = Callable[[Callable[[], object]], float]


def _usual_width(rows: list[Row]) -> int:
    """The width whose second moments are most of all, a weight counted each time."""
    total: dict[int, int] = {}
    for row in rows:
        total[row.shape[1]] = total.get(row.shape[1], 0) + row.shape[1] ** 2
    return max(total, key=lambda width: total[width])


def _factor_rate(moments: Doubles, took: Took) -> float:
    units = torch.from_numpy(prepare(moments, TOKENS, 0.5).units)
    return len(moments) ** 3 / 3 / took(lambda: torch.linalg.cholesky_ex(units, upper=True))


def _metric(width: int) -> object:
    """What is made of sums, but for the factor's own arithmetic: an inverse diagonal is factored at once."""
    total = gram([], width)
    total[np.diag_indices(width)] = 1
    xxhash.xxh3_128_hexdigest(total.data)
    metric = prepare(total, 1, 0.5)
    turned = torch.from_numpy(metric.units).flip(0, 1).clone().flip(0, 1)
    return turned.div_(turned.diagonal().clone()[:, None]).contiguous()


def _value(row: Row, x: np.ndarray, took: Took) -> tuple[float, float]:
    """Seconds to keep a value of an input, and to look at it once."""
    change = input_transform(NO_FOLDS, row.module)
    file = InputFile(None, ["x"])
    try:
        tensor = torch.from_numpy(x).to(torch.bfloat16)
        keep = took(lambda: file.append(tensor))
        file.keep([("x", file.append(tensor))])

        def look() -> None:
            for piece in file.pieces("x"):
                changed = change(piece)
                if row.activation_format is not None:
                    round_trip(ARITHMETIC[row.activation_format], changed, np.float32(1), changed)
                changed.astype(np.float64)

        return keep / x.size, took(look) / x.size
    finally:
        file.close()


def _weight(plan: Plan, row: Row, single: float, took: Took) -> tuple[float, float]:
    """Seconds a weight around solving, and in it.

    What is solved is one panel wide, so that its products are few, and they are taken off.
    """
    if row.format == "source" or not row.solved:
        return 0.0, 0.0
    format: FormatName = row.format
    random = np.random.default_rng(0)
    bits = (random.standard_normal((ROWS, PANEL), np.float32).view(np.uint32) >> 16).astype(np.uint16)
    metric = prepare(gram([random.standard_normal((PANEL, PANEL), np.float32)], PANEL), PANEL, 0.5)
    metric.factor  # noqa: B018  made once for all rows of a weight
    scale = ARITHMETIC[format].decode_scale(amax(bits)).value
    method, descent = row.solved_method, plan.recipe.solve.descent

    weight = floats(bits)

    def solved() -> None:
        solve(format, weight, scale, metric, method, descent)

    def plain() -> None:
        encoded_plainly(format, weight, scale, metric, method, descent)

    many = np.tile(bits, (MANY, 1))
    whole = floats(many)
    codes = encoded_plainly(format, whole, scale, metric, method, descent)

    def around() -> None:
        xxhash.xxh3_128_digest(many.data)
        amax(floats(many))
        squares(format, whole, codes, scale)

    products = product_flop(method, descent) * bits.size * PANEL / single
    by_plain = took(plain)
    read = took(around) / many.size
    return read + by_plain / bits.size, max(took(solved) - by_plain - products, 0.0) / bits.size

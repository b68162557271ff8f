"""Speed of solved weights: million weights a second for the experts of Super, each with its own metric.

    python -m bench.solve [--json FILE] [--rounds N]

A weight's time begins with a ready Gram matrix and ends with codes: damping, the factor, both objectives, and
everything between. Every figure is the best of several rounds. One thread is measured by its CPU time, two by
wall time: each solves a weight of its own, with one thread of torch. The parts are of one weight on one
thread, in seconds of CPU time: `prepare` and `factor` make the metric, `products` are torch's, `kernels`
choose scales and codes, `rest` is mostly the plain codes and their objective.
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measure import machine, rounds
from nemoquant.formats import FormatName
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.solve import solver
from nemoquant.solve.metric import Doubles, gram, prepare
from nemoquant.solve.solver import solve

SHAPES = ((2688, 1024), (1024, 2688))  # an expert's up and down projection
FORMATS: tuple[FormatName, ...] = ("nvfp4", "fp8")
TOKENS, DAMPING = 2048, 0.01


def inputs(width: int) -> Doubles:
    """The Gram matrix of inputs that correlate."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((width, width), np.float32) * rng.random(width, np.float32) ** 3
    return gram([rng.standard_normal((TOKENS, width), np.float32) @ mixed], width)


def best(function: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    """Shortest time in seconds; a first call, which may compile, does not count."""
    function()
    times = []
    for _ in range(count):
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


def parts(
    weight: np.ndarray, total: Doubles, format: FormatName, scale: np.float32, descent: int
) -> dict[str, float]:
    """Seconds of each part, from functions that are replaced by ones that note their time."""
    spent = dict.fromkeys(("prepare", "factor", "products", "kernels"), 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: object, **named: object) -> Any:
            start = time.thread_time()
            result = function(*arguments, **named)
            spent[part] += time.thread_time() - start
            return result

        return call

    begun = time.thread_time()
    metric = timed("prepare", prepare)(total, TOKENS, DAMPING)
    timed("factor", lambda: metric.factor)()
    names = {"solve_panel": "kernels", "descend_panel": "kernels"}
    kept = {name: getattr(solver, name) for name in names}
    mm, addmm = torch.mm, torch.Tensor.addmm_
    try:
        for name, part in names.items():
            setattr(solver, name, timed(part, kept[name]))
        torch.mm = timed("products", mm)
        torch.Tensor.addmm_ = timed("products", addmm)
        solve(format, weight, scale, metric, "gptq", descent)
    finally:
        torch.mm, torch.Tensor.addmm_ = mm, addmm
        for name, function in kept.items():
            setattr(solver, name, function)
    return {**spent, "rest": time.thread_time() - begun - sum(spent.values())}


def measure(count: int) -> dict[str, Any]:
    speeds, costs = {}, {}
    for (rows, width), format in product(SHAPES, FORMATS):
        weight = np.random.default_rng(1).standard_normal((rows, width), np.float32) * np.float32(0.02)
        total = inputs(width)
        scale = ARITHMETIC[format].decode_scale(float(np.abs(weight).max())).value
        for descent in (0, 1, 2):

            def one(_: int = 0, descent: int = descent) -> None:
                solve(format, weight, scale, prepare(total, TOKENS, DAMPING), "gptq", descent)  # noqa: B023

            name = f"{format} {rows}x{width}, descent {descent}"
            speeds[f"{name}, 1 thread"] = weight.size / best(one, count, time.thread_time) / 1e6
            with ThreadPoolExecutor(2) as pool:
                both = best(lambda: list(pool.map(one, range(2))), count, time.perf_counter)
            speeds[f"{name}, 2 threads"] = 2 * weight.size / both / 1e6
            costs[name] = parts(weight, total, format, scale, descent)
    return {"million weights/s": speeds, "parts, s": costs}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=rounds, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {"machine": machine(), **measure(arguments.rounds)}
    print(results["machine"])
    for name, speed in results["million weights/s"].items():
        print(f"{name:40} {speed:6.1f} million weights/s")
    for name, cost in results["parts, s"].items():
        print(f"{name:30} " + ", ".join(f"{part} {seconds:.2f}" for part, seconds in cost.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Coordinate descent in two metrics, against the objective itself in float64."""

import numpy as np
import pytest

from nemoquant.formats import e2m1
from nemoquant.formats.arithmetic import Encoded
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.solve import coupled
from nemoquant.solve.coupled import solve_coupled
from nemoquant.solve.grids import grid
from nemoquant.solve.metric import Metric, gram, prepare
from nemoquant.solve.solver import Solved, solve

FORMATS = ["nvfp4", "fp8", "mxfp8"]


def metric_of(width: int, seed: int, damping: float = 0.1) -> Metric:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((width, width)) * rng.random(width) ** 3
    x = (rng.standard_normal((2 * width, width)) @ mixed).astype(np.float32)
    return prepare(gram([x], width), len(x), damping)


def case(format: str, out: int, width: int, seed: int = 0):
    weight = (np.random.default_rng(seed).standard_normal((out, width)) * 0.02).astype(np.float32)
    scale = ARITHMETIC[format].decode_scale(float(np.abs(weight).max())).value
    return weight, scale, metric_of(width, seed + 1), metric_of(out, seed + 2)


def objective(weight, values, metric: Metric, outputs: Metric) -> float:
    errors = weight.astype(np.float64) - values
    return float(np.sum((outputs.matrix @ errors @ metric.matrix) * errors) / outputs.unit)


def run(format: str, case, sweeps: int) -> tuple[Solved, Solved]:
    """From gptq with as many sweeps."""
    weight, scale, metric, outputs = case
    start = solve(format, weight, scale, metric, "gptq", sweeps)
    return start, solve_coupled(format, weight, scale, metric, outputs, start.encoded, "gptq", sweeps)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 32), (70, 160), (150, 96)])
def test_the_objective_falls(format, shape):
    """Shapes of one row, of more than one panel, and of more than one tile."""
    weight, scale, metric, outputs = made = case(format, *shape)
    start, found = run(format, made, 2)
    decode = ARITHMETIC[format].decode
    before, after = (objective(weight, decode(s.encoded, scale), metric, outputs) for s in (start, found))
    plain = decode(ARITHMETIC[format].encode(weight, scale, {"nvfp4": "mse"}.get(format, "max")), scale)
    assert after < before * (1.0001 if shape[0] == 1 else 0.98)
    assert found.objective == pytest.approx(after, rel=1e-4)
    assert found.plain == pytest.approx(objective(weight, plain, metric, outputs), rel=1e-4)
    assert found.method == "gptq"
    if found.encoded.block_scales is not None:
        assert ARITHMETIC[format].bad_scales(found.encoded.block_scales) == 0


@pytest.mark.parametrize("format", FORMATS)
def test_where_it_ends_no_trial_of_a_block_is_better(format, monkeypatch):
    """All trials of all blocks with the whole objective, in float64: rounding can feign no more than that."""
    monkeypatch.setattr(coupled, "TILE", 8)
    weight, scale, metric, outputs = made = case(format, 20, 64)
    found = run(format, made, 16)[1].encoded
    decode, numbers = ARITHMETIC[format].decode, grid(format, scale)
    least = objective(weight, decode(found, scale), metric, outputs)
    values = decode(found, scale).astype(np.float64)
    for row in range(20):
        for start in range(0, 64, numbers.block):
            own = 0 if found.block_scales is None else int(found.block_scales[row, start // numbers.block])
            for step in range(-numbers.reach, numbers.reach + 1):
                code = min(max(own + step, numbers.first), numbers.last)
                trial = values.copy()
                for j in range(start, start + numbers.block):
                    gradient = outputs.matrix[row] @ (weight - trial) @ metric.matrix[:, j]
                    aim = trial[row, j] + gradient / (outputs.matrix[row, row] * metric.matrix[j, j])
                    trial[row, j] = rounded(format, aim, numbers.scales[code])
                assert objective(weight, trial, metric, outputs) > least * (1 - 1e-5)


def rounded(format: str, aim: float, scale: np.float32) -> float:
    from nemoquant.formats import e4m3

    numbers = e2m1 if format == "nvfp4" else e4m3
    return float(numbers.VALUES[numbers.encode(np.float32([aim / scale]))][0] * scale)


def test_the_result_does_not_depend_on_tiles_but_for_rounding(monkeypatch):
    """A tile is brought up to date by products of matrices, in it rows are one by one."""
    made = case("nvfp4", 40, 96)
    whole = run("nvfp4", made, 1)[1]
    monkeypatch.setattr(coupled, "TILE", 4)
    split = run("nvfp4", made, 1)[1]
    assert (whole.encoded.codes == split.encoded.codes).mean() > 0.97
    assert split.objective == pytest.approx(whole.objective, rel=2e-3)


def test_outputs_that_count_alike_change_nothing():
    """With O = I the start is where descent ended already."""
    weight, scale, metric, _ = case("nvfp4", 30, 64)
    start = solve("nvfp4", weight, scale, metric, "gptq", 16)
    same = prepare(np.eye(30), 1, 0.1)
    found = solve_coupled("nvfp4", weight, scale, metric, same, start.encoded, "gptq", 1)
    assert np.array_equal(found.encoded.codes, start.encoded.codes)
    assert found.objective == pytest.approx(start.objective, rel=1e-5)


def test_plain_codes_stay_where_they_are_better():
    weight, scale, metric, outputs = case("nvfp4", 16, 32)
    plain = ARITHMETIC["nvfp4"].encode(weight, scale, "mse")
    found = solve_coupled("nvfp4", weight, scale, metric, outputs, plain, "gptq", 0)
    assert found.method == "mse" and found.objective == found.plain
    zeros = Encoded(np.zeros_like(plain.codes), plain.block_scales)
    found = solve_coupled("nvfp4", weight, scale, metric, outputs, zeros, "gptq", 0)
    assert found.method == "mse" and np.array_equal(found.encoded.codes, plain.codes)


def test_it_refuses_metrics_that_do_not_fit():
    weight, scale, metric, _ = case("nvfp4", 16, 32)
    plain = ARITHMETIC["nvfp4"].encode(weight, scale, "mse")
    empty = prepare(np.zeros((16, 16)), 1, 0.1)
    for wrong in (metric, empty):
        with pytest.raises(ValueError, match="expected 16 rows"):
            solve_coupled("nvfp4", weight, scale, metric, wrong, plain, "gptq", 1)

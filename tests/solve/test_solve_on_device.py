"""Weights solved in torch's operators, here on the CPU, against the CPU's own kernels."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from nemoquant.api import RunOptions, quantize, verify
from nemoquant.formats import FORMATS, e2m1, e4m3, gpu
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.solve import layer, on_device
from nemoquant.solve.metric import Metric, gram, prepare
from nemoquant.solve.on_device import Task, solve_all_on, solve_on
from nemoquant.solve.solver import Solved, solve

CPU = torch.device("cpu")
CASES = [("nvfp4", "gptq"), ("nvfp4", "hess"), ("fp8", "gptq"), ("mxfp8", "gptq")]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of small operators: where processors are busy, each would wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weight_of(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, width)) * 0.02).astype(np.float32)


def inputs(tokens: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed + 1000)
    mixed = rng.standard_normal((width, width)) * rng.random(width) ** 3
    return (rng.standard_normal((tokens, width)) @ mixed).astype(np.float32)


def metric_of(x: np.ndarray, damping: float = 0.01) -> Metric:
    return prepare(gram([x], x.shape[1]), len(x), damping)


def scale_of(format: str, weight: np.ndarray) -> np.float32:
    return ARITHMETIC[format].decode_scale(float(np.abs(weight).max())).value


def objective(weight: np.ndarray, values: np.ndarray, metric: Metric) -> float:
    errors = weight.astype(np.float64) - values.astype(np.float64)
    return float(np.sum((errors @ metric.matrix) * errors))


def holds(format: str, weight: np.ndarray, scale: np.float32, metric: Metric, solved: Solved) -> None:
    """What every result promises."""
    arithmetic, plain_method = ARITHMETIC[format], FORMATS[format].plain
    plain = arithmetic.encode(weight, scale, plain_method)
    assert solved.encoded.codes.shape == plain.codes.shape
    if solved.encoded.block_scales is not None:
        assert arithmetic.bad_scales(solved.encoded.block_scales) == 0
    values = arithmetic.decode(solved.encoded, scale)
    assert np.isfinite(values).all()
    reached = objective(weight, values, metric)
    before = objective(weight, arithmetic.decode(plain, scale), metric)
    assert reached <= before
    # Products are in float32, and with few tokens large terms cancel in them, as in the CPU's kernels.
    assert solved.objective == pytest.approx(reached, rel=1e-4)
    assert solved.plain == pytest.approx(before, rel=1e-4)


def both(format: str, method: str, weight: np.ndarray, metric: Metric, descent: int) -> tuple[Solved, Solved]:
    scale = scale_of(format, weight)
    found = solve_on(CPU, format, weight, scale, metric, method, descent)
    holds(format, weight, scale, metric, found)
    return found, solve(format, weight, scale, metric, method, descent)


@pytest.mark.parametrize("descent", [0, 1])
@pytest.mark.parametrize(("format", "method"), CASES)
def test_as_good_as_the_kernels(format, method, descent):
    """A code at an edge falls to the other side: many rows, so that this evens out."""
    weight, x = weight_of(192, 288), inputs(600, 288)
    found, expected = both(format, method, weight, metric_of(x), descent)
    assert found.method == expected.method == method
    assert found.objective == pytest.approx(expected.objective, rel=1e-3)
    assert found.plain == pytest.approx(expected.plain, rel=1e-5)


@pytest.mark.parametrize(("format", "method"), CASES)
def test_dead_inputs_and_few_tokens(format, method):
    weight, x = weight_of(192, 160), inputs(12, 160)
    x[:, 30:70] = 0
    weight[:, 48:64] = 0
    for descent in (0, 1):
        found, expected = both(format, method, weight, metric_of(x), descent)
        assert found.method == expected.method == method
        assert found.objective == pytest.approx(expected.objective, rel=1e-3)


def test_a_matrix_that_float32_cannot_factor():
    """With next to no damping a float32 factor of a single token's matrix fails, a float64 one does not."""
    weight, metric = weight_of(64, 64), metric_of(inputs(1, 64), 1e-9)
    _, failed = torch.linalg.cholesky_ex(torch.from_numpy(metric.units))
    assert failed
    found, _ = both("fp8", "gptq", weight, metric, 0)
    assert found.method == "gptq"
    with pytest.raises(ValueError, match="gram: got a matrix that is not positive semidefinite"):
        solve_on(
            CPU,
            "fp8",
            weight,
            np.float32(1),
            prepare(-np.eye(64) + 2 * np.diag(np.arange(64.0)), 1, 0.01),
            "gptq",
            0,
        )


@pytest.mark.parametrize(("format", "method"), CASES)
def test_never_above_plain(format, method):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        width = int(rng.choice([32, 64, 96]))
        weight = weight_of(2, width, seed) * np.float32(10.0 ** rng.integers(-12, 12))
        weight[:, rng.random(width) < 0.2] = 0
        weight[:, :16] = 0
        x = rng.standard_normal((int(rng.choice([1, 10, 100])), width)).astype(np.float32)
        x[:, rng.random(width) < 0.3] = 0
        x[:, 1] *= 300
        both(format, method, weight, metric_of(x, float(rng.choice([0.01, 4]))), seed % 3)


@pytest.mark.parametrize(("format", "method"), CASES)
def test_zeros_and_nothing_observed(format, method):
    weight = weight_of(3, 64)
    scale, plain_method = scale_of(format, weight), FORMATS[format].plain
    empty = solve_on(CPU, format, weight, scale, prepare(np.zeros((64, 64)), 0, 0.01), method, 1)
    plain = ARITHMETIC[format].encode(weight, scale, plain_method)
    assert (empty.method, empty.objective, empty.plain) == (plain_method, 0, 0)
    assert np.array_equal(empty.encoded.codes, plain.codes)
    weight[:, 32:] = 0
    uncorrelated = prepare(np.eye(64), 1, 0.01)
    half = solve_on(CPU, format, weight, scale, uncorrelated, method, 1)
    assert not ARITHMETIC[format].decode(half.encoded, scale)[:, 32:].any()
    nothing = solve_on(CPU, format, np.zeros((2, 64), np.float32), np.float32(1), uncorrelated, method, 1)
    assert (nothing.method, nothing.objective) == (plain_method, 0)
    assert not nothing.encoded.codes.any()


def test_fp8_needs_no_multiple_of_a_block():
    for width in (1, 7, 130):
        both("fp8", "gptq", weight_of(5, width), metric_of(inputs(50, width)), 1)


@pytest.mark.parametrize(("format", "method"), CASES)
def test_several_weights_and_few_rows_at_once_change_nothing(format, method, monkeypatch):
    """Each has its own metric and scale; one of them has seen nothing."""
    weights = [weight_of(40, 160, seed) * np.float32(1 + seed) for seed in range(3)]
    metrics = [metric_of(inputs(300, 160, seed)) for seed in range(3)]
    metrics[1] = prepare(np.zeros((160, 160)), 0, 0.01)
    tasks = [Task(w, scale_of(format, w), m) for w, m in zip(weights, metrics, strict=True)]
    alone = [solve_on(CPU, format, *task, method, 1) for task in tasks]
    monkeypatch.setattr(on_device, "ELEMENTS", 2 * 160 * 16)
    for task, one, found in zip(tasks, alone, solve_all_on(CPU, format, tasks, method, 1), strict=True):
        assert found.method == one.method
        assert found.objective == pytest.approx(one.objective, rel=1e-3)
        holds(format, *task, found)


def test_the_window_of_block_scales_has_the_best_of_all():
    """Against all 126 in float64: blocks of every spread, and with one large value among small ones."""
    rng = np.random.default_rng(0)
    blocks = np.concatenate(
        [
            rng.standard_normal((400, 16)) ** power * 10.0 ** rng.uniform(-3, 0, (400, 1))
            for power in (1, 3, 7)
        ]
    ).astype(np.float32)
    blocks[:100, 1:] *= rng.uniform(0, 0.05, (100, 15)).astype(np.float32)
    blocks[-1] = 0
    for scale in np.float32([1e-4, 3e-3, 0.2]):
        numbers = on_device._numbers(CPU, "nvfp4", [Task(blocks, scale, metric_of(inputs(3, 16)))])
        targets = on_device._turned([blocks], CPU)
        found = on_device._chosen_scales(targets, numbers)[0].numpy()
        scales = e4m3.VALUES[1:127] * scale
        quotients = np.abs(blocks[:, None]) / scales[:, None]
        errors = (
            np.abs(blocks[:, None]) - e2m1.VALUES[e2m1.encode(quotients)].astype(np.float64) * scales[:, None]
        ) ** 2
        errors = errors.sum(2)
        reached = np.take_along_axis(errors, found[:, None].astype(int) - 1, 1)[:, 0]
        # float32 cannot tell nearer ones apart.
        assert (reached <= errors.min(1) * (1 + 1e-5) + 1e-12 * scale**2).all()
        assert found[-1] == e4m3.ONE


def test_codes_of_every_value_and_edge():
    """Ties, what is beside them, and both zeros round as the formats do."""
    for format, numbers, values in (("nvfp4", e2m1, e2m1.VALUES), ("fp8", e4m3, e4m3.VALUES[:127])):
        ascending = np.unique(np.concatenate([values, -values]))
        middles = (ascending[1:] + ascending[:-1]) / 2
        tried = np.concatenate([ascending, middles, [1e9, -1e9, -1e-40, -0.0]]).astype(np.float32)
        tried = np.concatenate([tried, *(np.nextafter(tried, np.float32(to)) for to in (-np.inf, np.inf))])
        on = on_device._numbers(CPU, format, [Task(tried, np.float32(1), metric_of(inputs(3, 16)))])
        codes, found = on.rounded(torch.from_numpy(tried))
        assert np.array_equal(codes.numpy(), numbers.encode(tried))
        assert np.array_equal(found.numpy(), numbers.VALUES[codes.numpy()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp8", weight_of(2, 32), np.float32(1), "hess", 0), "method: got 'hess' for fp8, expected gptq"),
        (("fp8", weight_of(2, 32), np.float32(1), "gptq", -1), "descent: got -1 sweeps"),
        (("fp8", weight_of(2, 48), np.float32(1), "gptq", 0), r"weight: got float32 \(2, 48\), expected"),
        (("fp8", weight_of(32, 2).T, np.float32(1), "gptq", 0), "weight: got a strided array"),
        (("fp8", weight_of(2, 32), np.float32(0), "gptq", 0), "scale: got 0.0, expected a positive"),
    ],
)
def test_refused(arguments, message):
    format, weight, scale, method, descent = arguments
    metric = prepare(np.eye(32), 1, 0.01)
    with pytest.raises(ValueError, match=message):
        solve_on(CPU, format, weight, scale, metric, method, descent)
    with pytest.raises(ValueError, match=r"tasks: got weights \[\(2, 32\), \(4, 32\)\], expected a single"):
        tasks = [Task(weight_of(rows, 32), np.float32(1), metric) for rows in (4, 2)]
        solve_all_on(CPU, "fp8", tasks, "gptq", 0)


@pytest.mark.parametrize("outputs", ["equal", "loss"])
def test_a_run_on_a_gpu_solves_there(outputs, fitting, token_rows, tmp_path, monkeypatch):
    """The device's name goes from the options to the solver; all computes on the CPU. Experts are solved
    several at once, other weights alone. Errors of outputs are weighed afterwards, on the host."""
    source, counts = fitting("nvfp4-full"), []

    def counted(device, format, tasks, *rest):
        assert device == CPU
        counts.append(len(tasks))
        return solve_all_on(device, format, tasks, *rest)

    def run(device):
        options = RunOptions(data=token_rows, dtype="float32", threads=3, device=device, outputs=outputs)
        quantize(source, tmp_path / device, "nvfp4-full", options)
        assert verify(tmp_path / device, source)["ok"]
        return json.loads((tmp_path / device / "nemoquant_solved.json").read_text())["units"]

    monkeypatch.setattr(layer, "solve_all_on", counted)
    expected = run("cpu")
    assert not counts
    monkeypatch.setattr(gpu, "check", lambda device: None)
    monkeypatch.setattr(gpu, "chosen", lambda device: False)
    monkeypatch.setattr("nemoquant.run.job.torch_device", lambda device: CPU)
    monkeypatch.setattr(layer, "torch_device", lambda device: {"cuda": CPU}[device])
    monkeypatch.setattr("nemoquant.solve.collector.torch_device", lambda device: CPU)
    found = run("cuda")
    assert max(counts) == 3
    assert sum(counts) == sum(len(unit["method"]) for unit in expected.values())
    for name, unit in expected.items():
        assert found[name]["method"] == unit["method"]
        assert found[name]["gram"] == unit["gram"]
        assert found[name]["objective"] == pytest.approx(unit["objective"], rel=0.02)

"""Solved weights against plain float64 loops: GPTQ from the textbook, every candidate of hess, the objective
itself."""

import threading

import numpy as np
import pytest

from nemoquant.formats import FORMATS, e2m1, e4m3
from nemoquant.formats.arithmetic import Encoded
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.solve import gptq
from nemoquant.solve.metric import Metric, gram, prepare
from nemoquant.solve.solver import Solved, solve

CASES = [("nvfp4", "gptq"), ("nvfp4", "hess"), ("fp8", "gptq"), ("mxfp8", "gptq")]
PLAIN = {"nvfp4": "mse", "fp8": "max", "mxfp8": "max"}


def weight_of(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, width)) * 0.02).astype(np.float32)


def metric_of(tokens: int, width: int, seed: int = 0, damping: float = 0.01) -> Metric:
    rng = np.random.default_rng(seed + 1000)
    mixed = rng.standard_normal((width, width)) * rng.random(width) ** 3
    x = (rng.standard_normal((tokens, width)) @ mixed).astype(np.float32)
    return prepare(gram([x], width), tokens, damping)


def scale_of(format: str, weight: np.ndarray) -> np.float32:
    return ARITHMETIC[format].decode_scale(float(np.abs(weight).max())).value


def objective(weight: np.ndarray, values: np.ndarray, metric: Metric) -> float:
    errors = weight.astype(np.float64) - values.astype(np.float64)
    return float(np.sum((errors @ metric.matrix) * errors))


def decoded(format: str, encoded: Encoded, scale: np.float32) -> np.ndarray:
    return ARITHMETIC[format].decode(encoded, scale)


def checked(
    format: str,
    weight: np.ndarray,
    metric: Metric,
    method: str,
    descent: int,
    scale: np.float32 | None = None,
) -> Solved:
    """Solve, and hold what every result promises."""
    scale = scale_of(format, weight) if scale is None else scale
    solved = solve(format, weight, scale, metric, method, descent)
    arithmetic = ARITHMETIC[format]
    if solved.encoded.block_scales is not None:
        assert arithmetic.bad_scales(solved.encoded.block_scales) == 0
    values = decoded(format, solved.encoded, scale)
    assert np.isfinite(values).all()
    plain = decoded(format, arithmetic.encode(weight, scale, PLAIN[format]), scale)
    reached, before = objective(weight, values, metric), objective(weight, plain, metric)
    assert reached <= before
    # Products are in float32, and with few tokens large terms cancel in them: 1.4e-5 was the most.
    assert solved.objective == pytest.approx(reached, rel=1e-4)
    assert solved.plain == pytest.approx(before, rel=1e-4)
    assert solved.method in (method, PLAIN[format])
    return solved


def textbook(weight: np.ndarray, metric: Metric, rounded, start_block=lambda j, rest: None) -> np.ndarray:
    """GPTQ as its paper has it: the upper factor of H's inverse, and errors spread over later weights."""
    upper = np.linalg.cholesky(np.linalg.inv(metric.matrix)).T
    rest, values = weight.astype(np.float64).copy(), np.empty(weight.shape)
    for j in range(weight.shape[1]):
        start_block(j, rest)
        values[:, j] = rounded(j, rest[:, j])
        error = (rest[:, j] - values[:, j]) / upper[j, j]
        rest[:, j:] -= np.outer(error, upper[j, j:])
    return values


@pytest.mark.parametrize("seed", range(3))
def test_fp8_is_gptq_of_the_textbook(seed):
    weight, metric = weight_of(20, 300, seed), metric_of(600, 300, seed)
    scale = scale_of("fp8", weight)
    expected = textbook(
        weight,
        metric,
        lambda j, column: e4m3.VALUES[e4m3.encode(column.astype(np.float32) / scale)] * scale,
    )
    solved = checked("fp8", weight, metric, "gptq", 0)
    assert solved.method == "gptq"
    found = decoded("fp8", solved.encoded, scale)
    same = (found == expected.astype(np.float32)).all(axis=1)
    assert same.mean() >= 0.7  # one quotient near a midpoint, and the rest of its row differs
    assert solved.objective == pytest.approx(objective(weight, expected, metric), rel=2e-3)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("seed", range(3))
def test_formats_with_blocks_are_gptq_of_the_textbook(format, seed):
    weight, metric = weight_of(12, 160, seed), metric_of(400, 160, seed)
    scale = scale_of(format, weight)
    block, arithmetic = FORMATS[format].block, ARITHMETIC[format]
    lanes = np.empty(len(weight), np.float32)

    def start_block(j: int, rest: np.ndarray) -> None:
        """Scales of the weights as they are now, by the format's own encoder."""
        if j % block == 0:
            now = np.ascontiguousarray(rest[:, j : j + block], np.float32)
            scales = arithmetic.encode(now, scale, PLAIN[format]).block_scales[:, 0]
            lanes[:] = e4m3.VALUES[scales] * scale if format == "nvfp4" else 2.0 ** (scales - 127.0)

    def rounded(_: int, column: np.ndarray) -> np.ndarray:
        numbers = e2m1 if format == "nvfp4" else e4m3
        return numbers.VALUES[numbers.encode(column.astype(np.float32) / lanes)] * lanes

    expected = textbook(weight, metric, rounded, start_block)
    solved = checked(format, weight, metric, "gptq", 0)
    assert solved.method == "gptq"
    found = decoded(format, solved.encoded, scale)
    same = (found == expected.astype(np.float32)).all(axis=1)
    assert same.mean() >= 0.7
    assert solved.objective == pytest.approx(objective(weight, expected, metric), rel=5e-3)


def test_hess_has_the_best_of_its_candidates():
    weight, metric = weight_of(6, 64), metric_of(200, 64)
    scale = scale_of("nvfp4", weight)
    start = ARITHMETIC["nvfp4"].encode(weight, scale, "mse").block_scales
    solved = checked("nvfp4", weight, metric, "hess", 0)
    found = solved.encoded.block_scales
    for row in range(6):
        for b in range(4):
            columns = slice(16 * b, 16 * b + 16)
            part, values = metric.matrix[columns, columns], weight[row, columns]
            errors = {}
            for code in range(max(int(start[row, b]) - 8, 1), min(int(start[row, b]) + 8, 126) + 1):
                d = e4m3.VALUES[code] * scale
                error = values.astype(np.float64) - e2m1.VALUES[e2m1.encode(values / d)] * d
                errors[code] = error @ part @ error
            assert errors[int(found[row, b])] <= min(errors.values()) * (1 + 1e-5)


@pytest.mark.parametrize(("format", "method"), CASES)
def test_descent_never_raises_the_objective(format, method):
    for seed in range(15):
        rng = np.random.default_rng(seed)
        width = int(rng.choice([32, 64, 160]))
        weight = weight_of(int(rng.integers(1, 5)), width, seed)
        metric = metric_of(int(rng.choice([1, 10, 300])), width, seed, float(rng.choice([0.01, 0.1, 4])))
        before = checked(format, weight, metric, method, 0)
        scale = scale_of(format, weight)
        reached = [objective(weight, decoded(format, before.encoded, scale), metric)]
        for sweeps in (1, 3):
            after = checked(format, weight, metric, method, sweeps)
            reached.append(objective(weight, decoded(format, after.encoded, scale), metric))
        assert reached == sorted(reached, reverse=True), f"seed {seed}"


def test_descent_gains():
    weight, metric = weight_of(64, 256), metric_of(1000, 256)
    for format, method in CASES:
        none, two = (checked(format, weight, metric, method, sweeps).objective for sweeps in (0, 2))
        assert two < 0.9 * none, (format, method)


@pytest.mark.parametrize(("format", "method"), CASES)
def test_the_objective_is_never_above_plain(format, method):
    """With few tokens and any damping, dead inputs, dead blocks, and weights of all sizes."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        width = int(rng.choice([32, 64, 96]))
        weight = weight_of(2, width, seed) * np.float32(10.0 ** rng.integers(-24, 24))
        weight[:, rng.random(width) < 0.2] = 0
        weight[:, :16] = 0
        x = rng.standard_normal((int(rng.choice([1, 10, 100])), width)).astype(np.float32)
        x[:, rng.random(width) < 0.3] = 0
        x[:, 1] *= 300
        metric = prepare(gram([x], width), len(x), float(rng.choice([0.01, 4])))
        checked(format, weight, metric, method, seed % 3)


@pytest.mark.parametrize(("format", "method"), CASES)
@pytest.mark.parametrize("size", [1e-21, 1e21])
def test_the_objective_is_right_where_squares_leave_float32(format, method, size):
    for seed in range(40):
        weight = weight_of(1, 32, seed) * np.float32(size)
        checked(format, weight, metric_of(1, 32, seed, damping=0.5), method, 1)


@pytest.mark.parametrize(("format", "method"), CASES)
@pytest.mark.parametrize("rows", [1, 513])
@pytest.mark.parametrize("blocks", [1, 3])
def test_plain_codes_stay_where_solved_ones_lose(format, method, rows, blocks):
    """A single row or block can't be turned into a copy by its strides; block scales are solved in place."""
    width = blocks * (FORMATS[format].block or 16)
    weight, metric = weight_of(rows, width), metric_of(40, width, damping=4)
    scale = scale_of(format, weight)
    encoded = ARITHMETIC[format].encode(weight, scale, PLAIN[format])
    weight = np.ascontiguousarray(decoded(format, encoded, scale), np.float32)  # nothing is better than these
    weight[-1] *= np.float32(1.01)
    for seed in range(8):
        checked(format, weight, metric, method, seed % 3, scale)
        weight[-1] = weight_of(1, width, seed)


@pytest.mark.parametrize(("format", "method"), CASES)
def test_where_nothing_was_observed_the_plain_codes(format, method):
    weight, scale = weight_of(5, 64), scale_of(format, weight_of(5, 64))
    for tokens in (0, 10):
        solved = solve(format, weight, scale, prepare(np.zeros((64, 64)), tokens, 0.01), method, 1)
        plain = ARITHMETIC[format].encode(weight, scale, PLAIN[format])
        assert solved.method == PLAIN[format]
        assert (solved.objective, solved.plain) == (0, 0)
        assert np.array_equal(solved.encoded.codes, plain.codes)


@pytest.mark.parametrize(("format", "method"), CASES)
def test_zeros_stay_zeros(format, method):
    weight = weight_of(3, 64)
    scale = scale_of(format, weight)
    weight[:, 32:] = 0
    solved = checked(format, weight, prepare(np.eye(64), 1, 0.01), method, 1, scale)
    assert not decoded(format, solved.encoded, scale)[:, 32:].any()
    nothing = checked(format, np.zeros((2, 64), np.float32), metric_of(9, 64), method, 1, np.float32(1))
    assert nothing.method == PLAIN[format]
    assert nothing.objective == 0


@pytest.mark.parametrize(("format", "method"), CASES)
def test_inputs_that_do_not_correlate_have_the_plain_objective(format, method):
    """With H = I each code is best where it is nearest."""
    weight = weight_of(8, 64)
    solved = checked(format, weight, prepare(np.eye(64), 1, 0.01), method, 2)
    assert solved.objective == pytest.approx(solved.plain, rel=0.02)


def test_fp8_needs_no_multiple_of_a_block():
    for width in (1, 7, 130):
        for sweeps in (0, 2):
            checked("fp8", weight_of(5, width), metric_of(50, width), "gptq", sweeps)


def test_rows_do_not_depend_on_each_other():
    """Rows are solved 512 at a time."""
    weight, metric = weight_of(520, 32), metric_of(100, 32)
    scale = scale_of("nvfp4", weight)
    whole = solve("nvfp4", weight, scale, metric, "gptq", 1).encoded
    part = solve("nvfp4", np.ascontiguousarray(weight[500:]), scale, metric, "gptq", 1).encoded
    assert np.array_equal(whole.codes[500:], part.codes)
    assert np.array_equal(whole.block_scales[500:], part.block_scales)


def test_the_same_bytes_on_several_threads_at_once():
    weight, metric = weight_of(64, 256), metric_of(500, 256)
    scale = scale_of("nvfp4", weight)
    found: list[bytes] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(
                solve("nvfp4", weight, scale, metric, "gptq", 1).encoded.codes.tobytes()
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp8", weight_of(2, 32), np.float32(1), "hess", 0), "method: got 'hess' for fp8, expected gptq"),
        (("fp8", weight_of(2, 32), np.float32(1), "gptq", -1), "descent: got -1 sweeps"),
        (("fp8", weight_of(2, 48), np.float32(1), "gptq", 0), r"weight: got float32 \(2, 48\), expected"),
        (("fp8", weight_of(2, 32).astype(np.float64), np.float32(1), "gptq", 0), "weight: got float64"),
        (("fp8", weight_of(32, 2).T, np.float32(1), "gptq", 0), "weight: got a strided array"),
        (("fp8", weight_of(2, 32), np.float32(0), "gptq", 0), "scale: got 0.0, expected a positive"),
    ],
)
def test_refused(arguments, message):
    format, weight, scale, method, descent = arguments
    with pytest.raises(ValueError, match=message):
        solve(format, weight, scale, prepare(np.eye(32), 1, 0.01), method, descent)


def test_kernels_are_named_by_the_sources_of_this_room():
    """Or an edit would leave old machine code in use: the cache knows the formats' sources alone."""
    name = gptq.solve_panel.py_func.__qualname__
    assert name.startswith("solve_panel_")
    assert len(name) == len("solve_panel_") + 16

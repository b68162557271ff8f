"""Noise of a tensor: sums against numpy in float64, counts with values made by hand."""

import math

import numpy as np
import pytest

from nemoquant.formats import fp8, noise, nvfp4
from nemoquant.formats.noise import Noise

SHAPES = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 1000), (7, 33), (24, 160), (0, 16)]


def plain(values: np.ndarray, decoded: np.ndarray, limit: np.float32) -> Noise:
    """By the definition; sums are exact (fsum of float64 squares), except that each square is rounded."""
    wide, other = values.astype(np.float64).ravel(), decoded.astype(np.float64).ravel()
    return Noise(
        signal=math.fsum(wide * wide),
        error=math.fsum((wide - other) ** 2),
        saturated=int((np.abs(values) > limit).sum()),
        flushed=int(((values != 0) & (decoded == 0)).sum()),
        count=values.size,
    )


def assert_same(found: Noise, expected: Noise) -> None:
    """Counts are equal; sums differ at most by rounding.

    A float64 sum of n positive terms, each within 2^-53, is within n 2^-53 in any order.
    """
    bound = max(1, expected.count) * 2.0**-53
    assert (found.saturated, found.flushed, found.count) == (
        expected.saturated,
        expected.flushed,
        expected.count,
    )
    assert found.signal == pytest.approx(expected.signal, rel=bound, abs=0)
    assert found.error == pytest.approx(expected.error, rel=bound, abs=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_and_counts_are_numpys(shape: tuple[int, int], to_bf16, to_float) -> None:
    """With values of many magnitudes, a third flushed and a few above the limit."""
    rng = np.random.default_rng(shape[0] * 1000 + shape[1])
    bits = to_bf16(rng.standard_normal(shape) * 2.0 ** rng.integers(-30, 10, shape))
    values = to_float(bits)
    decoded = np.where(rng.random(shape) < 0.3, 0, values * np.float32(1.01)).astype(np.float32)
    expected = plain(values, decoded, np.float32(100))
    assert_same(noise.measure(bits, decoded, 100.0), expected)
    assert_same(noise.measure(values, decoded, 100.0), expected)
    if values.size >= 1000:
        assert 0 < expected.saturated < values.size
        assert 0 < expected.flushed < values.size


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 1000])
def test_zeros_of_either_sign_are_counted(dtype: type[np.unsignedinteger], size: int) -> None:
    sign = np.iinfo(dtype).max // 2 + 1
    bits = np.random.default_rng(size).choice(np.array([0, 1, sign - 1, sign, sign + 1], dtype), size)
    assert noise.zeros(bits) == int(((bits == 0) | (bits == sign)).sum())
    assert noise.zeros(np.full((2, size), sign, dtype)) == 2 * size


@pytest.mark.parametrize("position", range(33))
def test_every_element_counts_once(position: int) -> None:
    """33 = two whole vectors of 16 and one more."""
    values, decoded = np.zeros((1, 33), np.float32), np.zeros((1, 33), np.float32)
    values[0, position] = 3.0
    assert noise.measure(values, decoded, 2.0) == Noise(
        signal=9.0, error=9.0, saturated=1, flushed=1, count=33
    )


def test_a_tensor_through_a_format(bf16_weight, to_float) -> None:
    values = to_float(bf16_weight)
    scale = fp8.decode_scale(np.abs(values).max())
    decoded = fp8.decode(fp8.encode(bf16_weight, scale), scale)
    limit = np.float32(fp8.Fp8().limit(scale))
    assert_same(noise.measure(bf16_weight, decoded, limit), plain(values, decoded, limit))


def test_hand_made_counts() -> None:
    values = np.array([[448, -448, 896, -449, 1e-4, -1e-4, 0, -0.0, 1, 2]], np.float32)
    decoded = np.array([[448, -448, 448, -448, 0, -0.0, 0, 0, 1, 2]], np.float32)
    found = noise.measure(values, decoded, fp8.Fp8().limit(1.0))
    assert (found.saturated, found.flushed, found.count) == (2, 2, 10)
    assert found.error == 448.0**2 + 1.0 + 2 * np.float64(np.float32(1e-4)) ** 2


def test_what_lands_on_the_limit_is_not_saturated() -> None:
    assert (
        noise.measure(np.array([[5.0, -5.0]], np.float32), np.zeros((1, 2), np.float32), 5.0).saturated == 0
    )


LIMITS = [
    pytest.param(fp8.decode_scale, fp8.Fp8().limit, 448, id="fp8"),
    pytest.param(nvfp4.global_decode_scale, nvfp4.Nvfp4().limit, 2688, id="nvfp4"),
]


@pytest.mark.parametrize(("scale_of", "limit_of", "largest"), LIMITS)
def test_amax_itself_is_not_saturated_and_a_little_more_is(scale_of, limit_of, largest: int) -> None:
    """A scale is amax / largest in fp32.

    Therefore largest * scale, in fp32 too, is less than amax for 6 to 9% of all amax.
    """
    amax = np.random.default_rng(0).uniform(1, 2, 1000).astype(np.float32)
    scales = [scale_of(a) for a in amax]
    below = sum(np.float32(largest) * s < a for a, s in zip(amax, scales, strict=True))
    assert below > 50, "the sample has few such scales, so that it tests little"
    for a, scale in zip(amax, scales, strict=True):
        values = np.array([[a, -a, a * np.float32(1 + 2.0**-18), 2 * limit_of(scale)]], np.float32)
        assert noise.measure(values, values, limit_of(scale)).saturated == 2, a


def test_the_limits_are_the_largest_decoded_values() -> None:
    """448 scales, and 6 x 448; the slack is less than any step of the formats."""
    assert 448 * 0.5 <= fp8.Fp8().limit(0.5) < 448 * 0.5 * 1.00001
    assert 6 * 448 * 0.5 <= nvfp4.Nvfp4().limit(0.5) < 6 * 448 * 0.5 * 1.00001


def test_a_clipped_block_is_no_saturation() -> None:
    """A block amax of 6 x 1.0625 gets the block scale 1.0 (a tie), and its largest value becomes 6.

    That is rounding, not saturation.
    """
    values = np.full((1, 16), 6.375, np.float32)
    decoded = nvfp4.decode(*nvfp4.encode(values, 1.0), 1.0)
    assert decoded.max() == 6.0
    assert noise.measure(values, decoded, nvfp4.Nvfp4().limit(1.0)).saturated == 0


@pytest.mark.parametrize(
    ("values", "decoded"),
    [
        pytest.param([0.0, -0.0, 0.0], [0.0, 0.0, 0.0], id="zero tensor: no signal, no error"),
        pytest.param([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], id="no error"),
        pytest.param([0.0, 0.0, 0.0], [0.0, 1.0, 0.0], id="no signal"),
        pytest.param([1.0, np.nan, 3.0], [1.0, 2.0, 3.0], id="NaN in the values"),
        pytest.param([1.0, 2.0, 3.0], [1.0, np.nan, 3.0], id="NaN in the decoded"),
        pytest.param([1.0, np.inf, 3.0], [1.0, 448.0, 3.0], id="Inf in the values"),
    ],
)
def test_no_sqnr_where_it_is_no_finite_number(values: list[float], decoded: list[float]) -> None:
    found = noise.measure(np.array([values], np.float32), np.array([decoded], np.float32), np.inf)
    assert found.sqnr_db is None
    assert (found.count, found.flushed) == (3, 0)


def test_nan_and_inf_are_counted_alone() -> None:
    """NaN is neither above a limit nor flushed; Inf is above any finite one."""
    found = noise.measure(
        np.array([[np.nan, np.inf, 1.0]], np.float32), np.array([[0.0, 448.0, 0.0]], np.float32), 448.0
    )
    assert (found.saturated, found.flushed) == (1, 1)


@pytest.mark.parametrize(
    ("signal", "error", "expected"),
    [
        (100.0, 1.0, 20.0),
        (1.0, 100.0, -20.0),
        (1.0, 1.0, 0.0),
        (1e300, 1e-300, 6000.0),  # whose quotient is no float64
        (0.0, 1.0, None),
        (1.0, 0.0, None),
        (0.0, 0.0, None),
        (math.inf, 1.0, None),
        (1.0, math.inf, None),
        (math.nan, 1.0, None),
        (1.0, math.nan, None),
    ],
)
def test_decibels(signal: float, error: float, expected: float | None) -> None:
    found = noise.decibels(signal, error)
    assert found == (
        None if expected is None else pytest.approx(expected, abs=1e-9)
    )  # two logarithms within 2^-52 of 3000
    assert Noise(signal, error).sqnr_db == found


def test_sums_of_parts_are_those_of_the_whole() -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal((9, 50)).astype(np.float32)
    decoded = np.round(values).astype(np.float32)
    total = first = Noise()
    for part in (slice(0, 1), slice(1, 6), slice(6, 9)):
        total += noise.measure(values[part], decoded[part], 1.5)
    assert total is first
    assert_same(total, plain(values, decoded, np.float32(1.5)))
    total += Noise(count=3)
    assert total.count == values.size + 3


def test_read_only_arrays_will_do() -> None:
    """Weights are mapped files, so their arrays are read-only."""
    values, decoded = np.ones((2, 8), np.float32), np.zeros((2, 8), np.float32)
    values.flags.writeable = decoded.flags.writeable = False
    assert noise.measure(values, decoded, 2.0).flushed == 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: noise.measure(w.astype(np.float64), w, 1.0), "weight: got dtype float64, expected uint16"),
        (lambda w: noise.measure(w.astype(np.float16), w, 1.0), "weight: got dtype float16, expected uint16"),
        (lambda w: noise.measure(w.T, w.T, 1.0), "weight: got a strided array of shape"),
        (lambda w: noise.measure(w[0], w[0], 1.0), "expected a C-contiguous"),
        (lambda w: noise.measure(w, w.T, 1.0), r"decoded: got shape \(3, 2\), expected \(2, 3\)"),
        (lambda w: noise.measure(w, w[:1], 1.0), r"decoded: got shape \(1, 3\), expected \(2, 3\)"),
        (
            lambda w: noise.measure(w, w.astype(np.float64), 1.0),
            "decoded: got dtype float64, expected float32",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(np.ones((2, 3), np.float32))

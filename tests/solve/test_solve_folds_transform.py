"""What a transform does to one tensor: exact powers of two, matrices rounded once, parts, composition."""

import numpy as np
import pytest
import torch

from nemoquant.solve.folds.transform import BLOCK_ROWS, Transform, bf16_of, widen

RNG = np.random.default_rng(5)
ROWS, COLUMNS = 2 * BLOCK_ROWS + 40, 48


def bf16(values):
    return torch.from_numpy(np.asarray(values, np.float32)).bfloat16().view(torch.uint16).numpy()


def exponents(n, seed=0):
    return np.random.default_rng(seed).integers(-5, 6, n).astype(np.int8)


def matrix(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, n)).astype(np.float32)


WEIGHT = RNG.standard_normal((ROWS, COLUMNS)).astype(np.float32)
WEIGHT[np.abs(WEIGHT) < 0.07] = 0.5  # so that 2^-10 leaves even float16 its bits
SOURCES = {"bf16": bf16(WEIGHT), "float16": WEIGHT.astype(np.float16), "float32": WEIGHT}


@pytest.mark.parametrize("source", SOURCES)
def test_the_sign_of_exponents(source):
    """W' = 2^rows * W * 2^columns: both are added."""
    weight = SOURCES[source]
    rows, columns = exponents(ROWS), exponents(COLUMNS, 1)
    result = Transform(rows, columns).apply(weight)
    assert result.dtype == weight.dtype
    expected = widen(weight) * 2.0 ** rows[:, None].astype(float) * 2.0 ** columns.astype(float)
    np.testing.assert_array_equal(widen(result), expected)


def test_a_vector_has_rows():
    result = Transform(rows=np.array([1, -2, 0], np.int8)).apply(bf16([3.0, 3.0, -0.5]))
    np.testing.assert_array_equal(widen(result), [6.0, 0.75, -0.5])


def test_zeros_and_what_is_not_finite_stay():
    weight = np.array([[0.0, -0.0, np.inf, np.nan]], np.float32)
    for array in (weight, bf16(weight), weight.astype(np.float16)):
        result = Transform(columns=np.array([9, 9, -9, 9], np.int8)).apply(array)
        np.testing.assert_array_equal(result, array)
        assert np.signbit(widen(result))[0, 1]


LIMITS = {  # largest finite value, smallest one
    "bf16": (bf16([[3.3895314e38, 1.0]]), bf16([[9.2e-41, 1.0]])),
    "float16": (np.array([[65504, 1]], np.float16), np.array([[5.9605e-08, 1]], np.float16)),
    "float32": (np.array([[3.4028235e38, 1]], np.float32), np.array([[1.4e-45, 1]], np.float32)),
}


@pytest.mark.parametrize("source", LIMITS)
def test_what_leaves_the_range_is_refused(source):
    name = {"bf16": "bfloat16"}.get(source, source)
    for weight, by in zip(LIMITS[source], (1, -1), strict=True):
        fold = Transform(columns=np.array([by, 0], np.int8))
        assert not fold.exact(weight)
        with pytest.raises(ValueError, match=f"1 of 2 folded values leave the range of {name}, the first is"):
            fold.apply(weight)
        back = Transform(columns=np.array([-by, 0], np.int8))
        assert back.exact(weight)
        assert widen(back.apply(weight))[0, 0] == widen(weight)[0, 0] * 2.0**-by


def test_a_subnormal_that_would_lose_bits_is_refused():
    weight = np.array([[3 * 2.0**-24]], np.float16)  # two bits: halved they would need 2^-25
    assert not Transform(rows=np.array([-1], np.int8)).exact(weight)
    assert Transform(rows=np.array([1], np.int8)).exact(weight)


def test_a_matrix_that_overflows_is_refused():
    weight = np.full((2, 2), 3e38, np.float32)
    with pytest.raises(ValueError, match="leave the range of float32"):
        Transform(left=np.ones((2, 2), np.float32)).apply(weight)


def test_float64_to_bf16_is_rounded_once():
    """Values next to each midpoint of bf16, nearer than float32 can tell: torch would round them twice."""
    low = np.arange(0x0000, 0x7F7F, 7, dtype=np.uint16)
    value, following = widen(low), widen(low + np.uint16(1))
    middle = (value + following) / 2
    even = np.where(low % 2 == 0, low, low + 1)
    np.testing.assert_array_equal(bf16_of(middle), even)
    np.testing.assert_array_equal(bf16_of(np.nextafter(middle, 0)), low)
    np.testing.assert_array_equal(bf16_of(np.nextafter(middle, np.inf)), low + 1)
    np.testing.assert_array_equal(bf16_of(-np.nextafter(middle, np.inf)), (low + 1) | 0x8000)
    assert bf16_of(np.array([3.4e38, np.inf, -np.inf])).tolist() == [0x7F80, 0x7F80, 0xFF80]
    assert np.isnan(widen(bf16_of(np.array([np.nan, -np.nan])))).all()


@pytest.mark.parametrize("source", SOURCES)
def test_left_is_rounded_once_to_the_source_dtype(source):
    weight, left = SOURCES[source], matrix(ROWS)
    result = Transform(left=left).apply(weight)
    assert result.dtype == weight.dtype
    exact = left.astype(float) @ widen(weight)
    half_a_step = {"bf16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}[source]
    tiny = 2.0**-25  # half of the smallest float16
    # 1.001: sums of the reference are of another order
    assert (np.abs(widen(result) - exact) <= 1.001 * half_a_step * np.abs(exact) + tiny).all()


@pytest.mark.parametrize("source", SOURCES)
def test_right_is_float32(source):
    weight, right = SOURCES[source], matrix(COLUMNS)
    result = Transform(right=right).apply(weight)
    assert result.dtype == np.float32
    exact = widen(weight) @ right.astype(float)
    assert (np.abs(result - exact) <= 1.001 * 2.0**-24 * np.abs(exact) + 1e-14).all()


FOLDS = {
    "powers": Transform(exponents(ROWS), exponents(COLUMNS)),
    "left": Transform(columns=exponents(COLUMNS), left=matrix(ROWS)),
    "right": Transform(rows=exponents(ROWS), right=matrix(COLUMNS)),
}


@pytest.mark.parametrize("fold", FOLDS)
def test_parts_are_the_whole_in_parts(fold):
    whole = FOLDS[fold].apply(SOURCES["bf16"])
    for part in (slice(None), slice(0, 3), slice(250, 530), slice(BLOCK_ROWS, None), slice(-7, None)):
        np.testing.assert_array_equal(FOLDS[fold].apply(SOURCES["bf16"], part), whole[part])
    assert FOLDS[fold].apply(SOURCES["bf16"], slice(9, 9)).shape == (0, COLUMNS)


def test_the_weight_is_not_changed():
    before = SOURCES["bf16"].copy()
    for fold in FOLDS.values():
        fold.apply(SOURCES["bf16"])
    np.testing.assert_array_equal(SOURCES["bf16"], before)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Transform(columns=exponents(COLUMNS)), Transform(left=matrix(ROWS))),  # norm, latent: fc1
        (Transform(columns=exponents(COLUMNS)), Transform(rows=exponents(ROWS))),  # norm, expert: up
        (Transform(right=matrix(COLUMNS)), Transform(rows=exponents(ROWS))),  # latent, expert: up
        (Transform(rows=exponents(ROWS)), Transform(left=matrix(ROWS))),
        (Transform(columns=exponents(COLUMNS)), Transform(right=matrix(COLUMNS))),
        (Transform(rows=exponents(ROWS)), Transform(rows=exponents(ROWS, 3))),
        (Transform(), Transform(left=matrix(ROWS))),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_then_is_one_after_the_other(first, second, swapped):
    if swapped:
        first, second = second, first
    one = first.then(second).apply(WEIGHT).astype(float)
    two = second.apply(first.apply(WEIGHT)).astype(float)
    # sums of up to ROWS products, each rounded to float32 once more in two steps
    bound = 2.0**-20 * np.abs(two).max()
    assert np.abs(one - two).max() <= bound


def test_what_then_refuses():
    for side, n in (("left", ROWS), ("right", COLUMNS)):
        fold = Transform(**{side: matrix(n)})
        with pytest.raises(ValueError, match="two folds have a matrix on one side of a weight; expected one"):
            fold.then(fold)
    much = Transform(rows=np.full(4, 100, np.int8))
    with pytest.raises(ValueError, match="exponents: got 200 to 200, expected -128 to 127"):
        much.then(much)


def test_identity():
    assert Transform().is_identity
    assert Transform(np.zeros(3, np.int8), np.zeros(2, np.int8)).is_identity
    assert not any(fold.is_identity for fold in FOLDS.values())


@pytest.mark.parametrize(
    ("weight", "part", "message"),
    [
        (WEIGHT.astype(float), slice(None), "weight: got dtype float64, expected uint16"),
        (WEIGHT[:5], slice(None), r"which the fold's rows of shape \(552,\) does not fit"),
        (WEIGHT[:, :5].copy(), slice(None), r"which the fold's columns of shape \(48,\) does not fit"),
        (WEIGHT[:, 0].copy(), slice(None), "the fold's columns"),
        (WEIGHT[None], slice(None), r"expected \[out, in\] or \[out\]"),
        (WEIGHT, slice(0, 9, 2), "expected consecutive rows"),
    ],
)
def test_arrays_that_do_not_fit(weight, part, message):
    with pytest.raises(ValueError, match=message):
        FOLDS["powers"].apply(weight, part)

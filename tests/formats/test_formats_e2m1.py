"""E2M1 and its packing, against values and bytes written by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nemoquant.formats import e2m1

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
MIDPOINTS = [
    (0.25, 0, 1, 0),
    (0.75, 1, 2, 2),
    (1.25, 2, 3, 2),
    (1.75, 3, 4, 4),
    (2.5, 4, 5, 4),
    (3.5, 5, 6, 6),
    (5.0, 6, 7, 6),
]


def encode(*values: float) -> list[int]:
    return e2m1.encode(np.array(values, np.float32)).tolist()


def plain_code(value: float) -> int:
    """The nearest of the eight magnitudes in float64; of two equally near ones, the even code."""
    distances = [abs(abs(value) - v) for v in VALUES[:8]]
    nearest = [code for code, distance in enumerate(distances) if distance == min(distances)]
    code = nearest[0] if len(nearest) == 1 else next(c for c in nearest if c % 2 == 0)
    return code | (8 if value < 0 else 0)


def test_all_16_codes_decode() -> None:
    decoded = e2m1.decode(np.arange(16, dtype=np.uint8))
    assert decoded.tolist() == VALUES
    assert np.signbit(decoded).tolist() == [False] * 8 + [True] * 8


def test_all_codes_but_negative_zero_survive_a_round_trip() -> None:
    assert encode(*VALUES) == [0, 1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize(("middle", "below", "above", "tie"), MIDPOINTS)
def test_midpoints_go_to_the_even_code(middle: float, below: int, above: int, tie: int) -> None:
    point = np.float32(middle)
    around = [np.nextafter(point, np.float32(0)), point, np.nextafter(point, np.float32(9))]
    assert encode(*around) == [below, tie, above]
    assert encode(*(-v for v in around)) == [8 | below, 8 | tie, 8 | above]


def test_the_sign_bit_is_that_of_a_number_below_zero() -> None:
    assert encode(-0.0, 0.0, -1e-45, 1e-45, -0.25) == [0x0, 0x0, 0x8, 0x0, 0x8]


def test_beyond_6_is_6() -> None:
    assert encode(6.0, 6.5, 7.0, 1e9, np.inf, -7.0, -np.inf) == [7, 7, 7, 7, 7, 15, 15]


def test_every_bf16_value_goes_to_the_nearest() -> None:
    values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    values = values[np.abs(values) <= 8]
    assert e2m1.encode(values).tolist() == [plain_code(float(v)) for v in values]


@settings(deadline=None)  # the first example may wait for the compiler
@given(st.floats(min_value=-8, max_value=8, width=32))
def test_any_float32_goes_to_the_nearest(value: float) -> None:
    assert encode(value) == [plain_code(value)]


def test_the_even_index_is_the_low_nibble() -> None:
    codes = np.array([[0x1, 0x2, 0xF, 0x0], [0x8, 0x7, 0x3, 0xC]], np.uint8)
    assert e2m1.pack(codes).tolist() == [[0x21, 0x0F], [0x78, 0xC3]]
    assert e2m1.unpack(np.array([[0x21, 0x0F], [0x78, 0xC3]], np.uint8)).tolist() == codes.tolist()


@settings(deadline=None)  # the first example may wait for the compiler
@given(arrays(np.uint8, st.tuples(st.integers(0, 5), st.integers(0, 9))))
def test_unpack_then_pack_gives_the_bytes_back(packed: np.ndarray) -> None:
    codes = e2m1.unpack(packed)
    assert codes.shape == (packed.shape[0], 2 * packed.shape[1])
    np.testing.assert_array_equal(e2m1.pack(codes), packed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: e2m1.encode(np.zeros(2)), r"values: got dtype float64, expected float32"),
        (lambda: e2m1.decode(np.zeros(2, np.int64)), r"codes: got dtype int64, expected uint8"),
        (lambda: e2m1.decode(np.array([3, 16], np.uint8)), r"codes: got 16, expected 0 to 15"),
        (lambda: e2m1.pack(np.array([3, 16], np.uint8)), r"codes: got 16, expected 0 to 15"),
        (
            lambda: e2m1.pack(np.zeros((2, 3), np.uint8)),
            r"got shape \(2, 3\), expected an even last dimension",
        ),
        (lambda: e2m1.unpack(np.zeros(2, np.int8)), r"packed: got dtype int8, expected uint8"),
    ],
)
def test_bad_arguments_are_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]  # a lambda

"""E4M3 against torch's own cast, and against bytes written by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemoquant.formats import e4m3


def torch_codes(values: np.ndarray) -> np.ndarray:
    """torch's cast does not saturate, so the input is clamped first (NaN stays NaN)."""
    return torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.0, 0x00),
        (-0.0, 0x80),
        (1.0, 0x38),
        (-1.0, 0xB8),
        (1.125, 0x39),
        (1.0625, 0x38),  # midway between 1 and 1.125: to the even code
        (1.1875, 0x3A),
        (448.0, 0x7E),
        (449.0, 0x7E),
        (464.0, 0x7E),  # a format with more exponents would round up here
        (1e30, 0x7E),
        (-1e30, 0xFE),
        (np.inf, 0x7E),
        (-np.inf, 0xFE),
        (2.0**-6, 0x08),  # smallest normal
        (2.0**-6 * (1 - 2.0**-4), 0x08),  # midway to the largest subnormal, 7 x 2^-9, whose code is odd
        (2.0**-9, 0x01),
        (2.0**-10, 0x00),  # half of the smallest: to even, which is zero
        (-(2.0**-10), 0x80),  # the sign is kept
        (1.5 * 2.0**-9, 0x02),
        (1e-45, 0x00),
    ],
)
def test_hand_written_codes(value: float, code: int) -> None:
    assert e4m3.encode(np.array([value], np.float32)).tolist() == [code]


def test_nan_keeps_its_sign() -> None:
    values = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert e4m3.encode(values).tolist() == [0x7F, 0xFF, 0x7F, 0xFF]


def test_all_256_codes_decode_as_torch_has_them() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).float().numpy()
    decoded = e4m3.decode(codes)
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(expected))
    assert decoded.max(initial=0, where=~np.isnan(decoded)) == e4m3.MAX


def test_all_finite_codes_survive_a_round_trip() -> None:
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    assert e4m3.encode(e4m3.decode(codes)).tolist() == codes.tolist()


def test_every_midpoint_goes_to_the_even_code_and_its_neighbours_to_the_nearer() -> None:
    lower = np.arange(0x7E, dtype=np.uint8)
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    middle = (values[:-1] + values[1:]) / np.float32(2)  # exact
    for sign, bit in ((np.float32(1), 0), (np.float32(-1), 0x80)):
        even = lower + (lower & 1)
        assert e4m3.encode(sign * middle).tolist() == (even | bit).tolist()
        assert e4m3.encode(sign * np.nextafter(middle, np.float32(0))).tolist() == (lower | bit).tolist()
        assert (
            e4m3.encode(sign * np.nextafter(middle, np.float32(np.inf))).tolist()
            == ((lower + 1) | bit).tolist()
        )


def test_every_bf16_value_encodes_as_torch_casts_it() -> None:
    values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    values = values[~np.isnan(values)]
    np.testing.assert_array_equal(e4m3.encode(values), torch_codes(values))


@settings(deadline=None)  # the first example may wait for the compiler
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=64))
def test_any_float32_encodes_as_torch_casts_it(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    np.testing.assert_array_equal(e4m3.encode(values), torch_codes(values))


def test_shape_is_kept_and_the_input_is_not_changed() -> None:
    values = np.linspace(-500, 500, 24, dtype=np.float32).reshape(2, 3, 4)
    before = values.copy()
    codes = e4m3.encode(values.transpose(2, 0, 1))
    assert codes.shape == (4, 2, 3)
    np.testing.assert_array_equal(codes, e4m3.encode(before).transpose(2, 0, 1))
    np.testing.assert_array_equal(values, before)


def test_wrong_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"values: got dtype float64, expected float32"):
        e4m3.encode(np.zeros(3))
    with pytest.raises(ValueError, match=r"codes: got dtype int8, expected uint8"):
        e4m3.decode(np.zeros(3, np.int8))

"""FP8 per tensor against torch's division and cast, and against bytes written by hand."""

import numpy as np
import pytest
import torch

from nemoquant.formats import e4m3, fp8
from nemoquant.formats.amax import amax

SMALLEST_USABLE = 448 * 2.0**-126  # the amax whose scale is the smallest normal fp32


def test_codes_are_torchs(bf16_weight, to_float) -> None:
    values = to_float(bf16_weight)
    scale = fp8.decode_scale(amax(bf16_weight))
    assert scale == np.abs(values).max() / np.float32(448)
    expected = (torch.from_numpy(values) / torch.tensor(scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    for weight in (bf16_weight, values):
        np.testing.assert_array_equal(fp8.encode(weight, scale), expected.view(torch.uint8).numpy())
    decoded = fp8.decode(expected.view(torch.uint8).numpy(), scale)
    np.testing.assert_array_equal(decoded, (expected.float() * torch.tensor(scale)).numpy())


def test_hand_written_codes() -> None:
    weight = np.array([[448, -448, 1, -1, 0, -0.0, 900, 2**-10]], np.float32)
    assert fp8.encode(weight, 1.0).tolist() == [[0x7E, 0xFE, 0x38, 0xB8, 0x00, 0x80, 0x7E, 0x00]]
    assert fp8.encode(weight, 2.0).tolist() == [[0x76, 0xF6, 0x30, 0xB0, 0x00, 0x80, 0x7E, 0x00]]


def test_the_quotient_is_rounded_once() -> None:
    """The quotient must not be rounded to bf16 first.

    1.0629 lies above 1.0625, midway between codes 0x38 and 0x39. Rounded to bf16 first it would be 1.0625,
    and so 0x38.
    """
    assert fp8.encode(np.array([[1.0629]], np.float32), 1.0).tolist() == [[0x39]]
    scale = np.float32(1.0) / np.float32(1.0629)
    assert fp8.encode(np.array([[0x3F80]], np.uint16), scale).tolist() == [[0x39]]


@pytest.mark.parametrize(
    ("amax_value", "scale", "degenerate"),
    [
        (448.0, 1.0, False),
        (1.0, float(np.float32(1) / np.float32(448)), False),
        (0.0, 1.0, True),
        (1e-45, 1.0, True),
        (SMALLEST_USABLE, 2.0**-126, False),
        (float(np.nextafter(np.float32(SMALLEST_USABLE), np.float32(0))), 1.0, True),
        (float(np.finfo(np.float32).max), float(np.finfo(np.float32).max / np.float32(448)), False),
    ],
)
def test_scales(amax_value: float, scale: float, degenerate: bool) -> None:
    found = fp8.decode_scale(amax_value)
    assert isinstance(found, np.float32)
    assert (float(found), fp8.is_degenerate(amax_value)) == (scale, degenerate)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_an_amax_that_is_no_magnitude_is_refused(value: float) -> None:
    for function in (fp8.decode_scale, fp8.is_degenerate):
        with pytest.raises(ValueError, match=r"amax: got .*, expected a finite number that is not negative"):
            function(value)


def test_a_degenerate_weight_is_all_zero_codes() -> None:
    weight = np.full(
        (2, 3), 0x8001, np.uint16
    )  # the smallest negative bf16: divided by 1.0 it would keep its sign
    assert fp8.is_degenerate(amax(weight))
    assert fp8.encode(weight, fp8.decode_scale(amax(weight))).tolist() == [[0x80] * 3] * 2
    assert fp8.zeros(weight.shape).tolist() == [[0] * 3] * 2
    buffer = np.full((2, 3), 9, np.uint8)
    assert fp8.zeros((2, 3), out=buffer) is buffer
    assert not buffer.any()


def test_out_is_filled_and_the_input_is_not_changed(bf16_weight) -> None:
    weight = bf16_weight.copy()
    weight.flags.writeable = False
    buffer = np.full(weight.shape, 0x55, np.uint8)
    assert fp8.encode(weight, 0.01, out=buffer) is buffer
    np.testing.assert_array_equal(buffer, fp8.encode(bf16_weight, 0.01))
    np.testing.assert_array_equal(weight, bf16_weight)
    assert bf16_weight.flags.writeable


def test_decode_of_all_codes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(fp8.decode(codes, 0.3), e4m3.decode(codes) * np.float32(0.3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: fp8.encode(w.astype(np.float64), 1.0), "weight: got dtype float64, expected uint16"),
        (lambda w: fp8.encode(w.T, 1.0), "weight: got a strided array of shape"),
        (lambda w: fp8.encode(w, 0.0), "decode_scale: got 0.0, expected a positive finite number"),
        (lambda w: fp8.encode(w, np.nan), "decode_scale: got nan"),
        (lambda w: fp8.encode(w, 1.0, out=np.empty((2, 3), np.int8)), "out: got int8 of shape"),
        (lambda w: fp8.encode(w, 1.0, out=np.empty((3, 2), np.uint8)), r"out: got uint8 of shape \(3, 2\)"),
        (lambda w: fp8.decode(w, 1.0), "codes: got dtype float32, expected uint8"),
        (lambda w: fp8.decode(w.astype(np.uint8), -1.0), "decode_scale: got -1.0"),
    ],
)
def test_bad_arguments_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(np.ones((2, 3), np.float32))

"""NVFP4: bytes written by hand, and every byte against the plain definition in ``nvfp4_plain``."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.nvfp4_plain import METHODS, assert_same, plain_encode

from nemoquant.formats import nvfp4
from nemoquant.formats.amax import amax

# Against the oracle.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "group", [1.0, 37.0, 1e-3], ids=["own scale", "scale of a larger group", "scale far too small"]
)
def test_bytes_are_those_of_the_plain_definition(bf16_weight, to_float, method, group: float) -> None:
    """A scale that is too small saturates block scales at 448 and codes at 6.

    A scale from a group pushes block scales towards 2^-9.
    """
    values = to_float(bf16_weight)
    scale = nvfp4.global_decode_scale(amax(bf16_weight) * np.float32(group), method)
    expected = plain_encode(values, scale, method)
    for weight in (bf16_weight, values):
        assert_same(nvfp4.encode(weight, scale, method), expected)


@settings(max_examples=150, deadline=None)  # the first example may wait for the compiler
@given(
    numbers=st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=32, max_size=32),
    exponent=st.integers(-24, 12),
    method=st.sampled_from(METHODS),
)
def test_any_float32_block_is_that_of_the_plain_definition(
    numbers: list[float], exponent: int, method
) -> None:
    values = np.array(numbers, np.float32).reshape(1, 32)
    scale = np.float32(2.0**exponent * 1.1)
    assert_same(nvfp4.encode(values, scale, method), plain_encode(values, scale, method))


@settings(max_examples=150, deadline=None)  # the first example may wait for the compiler
@given(
    steps=st.lists(st.integers(-48, 48), min_size=16, max_size=16),
    exponent=st.integers(-12, 6),
    method=st.sampled_from(METHODS),
)
def test_equal_errors_are_decided_as_in_the_plain_definition(steps: list[int], exponent: int, method) -> None:
    """Small multiples of a power of two: many scales have exactly equal errors."""
    values = np.array([steps], np.float32) * np.float32(2.0**exponent)
    assert_same(nvfp4.encode(values, 0.25, method), plain_encode(values, np.float32(0.25), method))


def test_codes_do_not_depend_on_block_length_of_a_row_or_on_threads(to_bf16) -> None:
    weight = to_bf16(np.random.default_rng(7).standard_normal((64, 512)) * 0.02)
    for method in METHODS:
        scale = nvfp4.global_decode_scale(amax(weight), method)
        packed, scales = nvfp4.encode(weight, scale, method)
        halves = [np.ascontiguousarray(weight[:, part]) for part in (slice(0, 128), slice(128, None))]
        with ThreadPoolExecutor(2) as pool:
            parts = list(pool.map(lambda half, s=scale, m=method: nvfp4.encode(half, s, m), halves))
        np.testing.assert_array_equal(np.hstack([p for p, _ in parts]), packed)
        np.testing.assert_array_equal(np.hstack([s for _, s in parts]), scales)


# Bytes written by hand. With global scale 1 a block whose amax is 6 has block scale 1.0 = 0x38.


def encode_block(values: list[float], method="max", global_scale: float = 1.0) -> tuple[list[int], int]:
    packed, scales = nvfp4.encode(np.array([values], np.float32), global_scale, method)
    return packed[0].tolist(), int(scales[0, 0])


ALL_CODES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def test_every_code_in_its_nibble() -> None:
    assert encode_block(ALL_CODES) == ([0x10, 0x32, 0x54, 0x76, 0x90, 0xBA, 0xDC, 0xFE], 0x38)


@pytest.mark.parametrize(
    ("block", "method", "packed", "scale"),
    [
        pytest.param([6.0] + [4.5] * 15, "max", [0x67, *[0x66] * 7], 0x38, id="max: 4.5 becomes 4"),
        pytest.param(
            [6.0] + [4.5] * 15, "four_over_six", [0x56, *[0x55] * 7], 0x3C, id="scale 1.5: 4 and 3, no error"
        ),
        pytest.param([6.0] + [4.5] * 15, "mse", [0x56, *[0x55] * 7], 0x3C, id="mse finds the same"),
        pytest.param([6.0] * 16, "four_over_six", [0x77] * 8, 0x38, id="both without error: M = 6"),
        pytest.param([1.0] * 16, "mse", [0x66] * 8, 0x28, id="no error at 0.25, 0.5, 1 and 2: the smallest"),
        pytest.param([0.0] * 16, "max", [0] * 8, 0x38, id="zeros"),
        pytest.param([-0.0] * 16, "mse", [0] * 8, 0x38, id="negative zeros, mse"),
        pytest.param([0.0] * 16, "four_over_six", [0] * 8, 0x38, id="zeros, four over six"),
        pytest.param(
            [6 * 2.0**-9] + [0.0] * 15, "max", [0x07, *[0] * 7], 0x01, id="the smallest subnormal block scale"
        ),
        pytest.param(
            [6 * 3 * 2.0**-9] + [0.0] * 15, "max", [0x07, *[0] * 7], 0x03, id="a subnormal block scale"
        ),
        pytest.param(
            [6 * 2.0**-11] + [-1e-30] * 15,
            "max",
            [0x83, *[0x88] * 7],
            0x01,
            id="below it: clamped; signs stay",
        ),
        pytest.param([1e-30] * 16, "mse", [0] * 8, 0x01, id="all scales give zeros: the smallest"),
        pytest.param([6 * 448.0, -1e9] + [0.0] * 14, "max", [0xF7, *[0] * 7], 0x7E, id="saturated"),
        pytest.param([6 * 448.0, -1e9] + [0.0] * 14, "mse", [0xF7, *[0] * 7], 0x7E, id="saturated, mse"),
    ],
)
def test_hand_written_blocks(block: list[float], method, packed: list[int], scale: int) -> None:
    assert encode_block(block, method) == (packed, scale)


def test_a_quotient_that_underflows_loses_its_sign() -> None:
    """The sign bit is that of the quotient, as in Model Optimizer: -2^-149 / 2 is -0.0 in fp32."""
    assert encode_block([12.0, -(2.0**-149)] + [0.0] * 14) == ([0x07, *[0] * 7], 0x40)


def test_decode_by_hand() -> None:
    packed = np.array([[0x10, 0x32, 0x54, 0x76, 0x90, 0xBA, 0xDC, 0xFE] * 2], np.uint8)
    values = nvfp4.decode(packed, np.array([[0x38, 0x01]], np.uint8), 0.5)
    np.testing.assert_array_equal(values[0, :16], np.array(ALL_CODES, np.float32) / 2)
    np.testing.assert_array_equal(values[0, 16:], np.array(ALL_CODES, np.float32) * np.float32(2.0**-10))


def test_signal_to_noise_of_normal_weights(to_bf16, to_float) -> None:
    """Floors in dB, about half a dB below the measured values.

    The search includes the choice of max, so that it cannot be worse.
    """
    weight = to_bf16(np.random.default_rng(3).standard_normal((64, 256)) * 0.02)
    values = to_float(weight).astype(np.float64)
    sqnr = {}
    for method in METHODS:
        scale = nvfp4.global_decode_scale(amax(weight), method)
        error = nvfp4.decode(*nvfp4.encode(weight, scale, method), scale) - values
        sqnr[method] = 10 * np.log10((values**2).sum() / (error**2).sum())
    assert sqnr["max"] > 20
    assert sqnr["four_over_six"] > 20.5
    assert sqnr["mse"] > 21
    assert sqnr["mse"] >= sqnr["max"]


def test_a_weight_mapped_at_an_odd_address(bf16_weight) -> None:
    """A safetensors header may have any length, so a mapped tensor may not be aligned."""
    padded = np.frombuffer(b"\0" + bf16_weight.tobytes(), np.uint8)
    weight = padded[1:].view(np.uint16).reshape(bf16_weight.shape)
    assert not weight.flags.aligned
    assert amax(weight) == amax(bf16_weight)
    scale = nvfp4.global_decode_scale(amax(weight))
    for method in METHODS:
        assert_same(nvfp4.encode(weight, scale, method), nvfp4.encode(bf16_weight, scale, method))


# Scales per tensor, degenerate weights.


@pytest.mark.parametrize(
    ("amax_value", "method", "scale", "degenerate"),
    [
        (2688.0, "max", 1.0, False),
        (2688.0, "mse", 1.0, False),
        (1536.0, "four_over_six", 1.0, False),
        (1.0, "max", float(np.float32(1) / np.float32(2688)), False),
        (0.0, "max", 1.0, True),
        (2688 * 2.0**-126, "max", 2.0**-126, False),
        (2000 * 2.0**-126, "max", 1.0, True),
        (2000 * 2.0**-126, "four_over_six", float(np.float32(2000 * 2.0**-126) / np.float32(1536)), False),
        (1500 * 2.0**-126, "four_over_six", 1.0, True),
    ],
)
def test_scales(amax_value: float, method, scale: float, degenerate: bool) -> None:
    found = nvfp4.global_decode_scale(amax_value, method)
    assert isinstance(found, np.float32)
    assert (float(found), nvfp4.is_degenerate(amax_value, method)) == (scale, degenerate)


@pytest.mark.parametrize("method", METHODS)
def test_the_smallest_scale_that_is_not_degenerate_still_encodes(method) -> None:
    """d is subnormal then, and must not be flushed to zero."""
    scale = np.float32(2.0**-126)
    values = np.array([[6 * 448 * 2.0**-126] * 16 + [6 * 2.0**-135] + [0.0] * 15], np.float32)
    assert_same(nvfp4.encode(values, scale, method), plain_encode(values, scale, method))
    np.testing.assert_array_equal(nvfp4.decode(*nvfp4.encode(values, scale, method), scale), values)


def test_a_degenerate_weight_is_zero_codes_and_scales_of_one() -> None:
    packed, scales = nvfp4.zeros((2, 32))
    assert packed.tolist() == [[0] * 16] * 2
    assert scales.tolist() == [[0x38] * 2] * 2
    buffers = np.full((2, 16), 9, np.uint8), np.full((2, 2), 9, np.uint8)
    found = nvfp4.zeros((2, 32), out=buffers)
    assert found[0] is buffers[0] and found[1] is buffers[1]
    assert_same(buffers, (packed, scales))


@pytest.mark.parametrize("method", METHODS)
def test_out_is_filled_and_the_input_is_not_changed(method, to_bf16) -> None:
    weight = to_bf16(np.random.default_rng(5).standard_normal((3, 48)))
    before = weight.copy()
    weight.flags.writeable = False
    buffers = np.full((3, 24), 0x55, np.uint8), np.full((3, 3), 0x55, np.uint8)
    found = nvfp4.encode(weight, 0.001, method, out=buffers)
    assert found[0] is buffers[0] and found[1] is buffers[1]
    assert_same(buffers, nvfp4.encode(before, 0.001, method))
    np.testing.assert_array_equal(weight, before)
    assert before.flags.writeable


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda w: nvfp4.encode(w[:, :24].copy(), 1.0),
            r"got shape \(2, 24\), expected an input dimension .* that 16 divides",
        ),
        (lambda _: nvfp4.zeros((2, 24)), "that 16 divides"),
        (lambda w: nvfp4.encode(w.astype(np.float16), 1.0), "weight: got dtype float16"),
        (lambda w: nvfp4.encode(w[:, ::2], 1.0), "weight: got a strided array"),
        (lambda w: nvfp4.encode(w, 0.0), "global_decode_scale: got 0.0, expected a positive finite number"),
        (
            lambda w: nvfp4.encode(w, 1.0, "best"),
            "method: got 'best', expected one of max, mse, four_over_six",
        ),
        (lambda _: nvfp4.global_decode_scale(1.0, "best"), "method: got 'best'"),
        (lambda _: nvfp4.global_decode_scale(np.inf), "amax: got inf, expected a finite number"),
        (lambda _: nvfp4.is_degenerate(np.nan), "amax: got nan"),
        (
            lambda w: nvfp4.encode(w, 1.0, out=(np.empty((2, 16), np.uint8), np.empty((2, 3), np.uint8))),
            r"out\[1\]",
        ),
        (
            lambda w: nvfp4.encode(w, 1.0, out=(np.empty((2, 32), np.uint8), np.empty((2, 2), np.uint8))),
            r"out\[0\]",
        ),
        (
            lambda _: nvfp4.decode(np.zeros((2, 9), np.uint8), np.zeros((2, 1), np.uint8), 1.0),
            r"packed: got shape \(2, 9\)",
        ),
        (
            lambda _: nvfp4.decode(np.zeros((2, 8), np.uint8), np.zeros((2, 1), np.int8), 1.0),
            "block_scales: got dtype int8",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(np.ones((2, 32), np.float32))

"""NVFP4 inputs, encoded at run time: bytes by hand, and a second implementation in numpy, all in float32.

The weights' method ``max`` and this encoding differ only in the smallest block scales. They give the same
bytes for a block exactly where fp32(amax / (6 * scale)) > 2^-10, the midpoint below the smallest E4M3 value
2^-9. At or below it, the weights' scale is 2^-9 (1.0 for a block of zeros). Here the scale is zero, and so is
the whole block.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemoquant.formats import nvfp4

Encoded = tuple[np.ndarray, np.ndarray]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
E4M3 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().numpy()
ALL_CODES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


# The definition: scales rounded by torch's cast, codes by the distance to each of the eight values.


def plain_e2m1(quotients: np.ndarray) -> np.ndarray:
    """Codes of magnitudes [n]: the nearest value, in a tie the even code; distances are exact in float64."""
    distances = np.abs(quotients.astype(np.float64)[:, None] - E2M1)
    nearest = distances.argmin(1)  # the first of two that are equally near
    tied = (distances == distances.min(1, keepdims=True)).sum(1) == 2
    return np.where(tied & (nearest % 2 == 1), nearest + 1, nearest)


def scale_quotients(values: np.ndarray, scale: np.float32) -> np.ndarray:
    return np.abs(values.reshape(-1, 16)).max(1) / (np.float32(6) * scale)


def plain_encode(values: np.ndarray, scale: np.float32) -> Encoded:
    quotients = np.minimum(scale_quotients(values, scale), np.float32(448))
    block_scales = torch.from_numpy(quotients).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    steps = (E4M3[block_scales] * scale)[:, None]
    blocks = values.reshape(-1, 16)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(steps == 0, np.float32(0), blocks / steps)
    codes = plain_e2m1(np.minimum(np.abs(scaled), np.float32(6)).ravel()) | np.where(scaled.ravel() < 0, 8, 0)
    packed = codes[0::2] | codes[1::2] << 4
    rows = values.shape[0]
    return packed.reshape(rows, -1).astype(np.uint8), block_scales.reshape(rows, -1)


def assert_same(found: Encoded, expected: Encoded) -> None:
    np.testing.assert_array_equal(found[1], expected[1], err_msg="block scales")
    np.testing.assert_array_equal(found[0], expected[0], err_msg="packed codes")


def spreads() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal, shape = rng.standard_normal((24, 160)), (24, 160)
    block_sizes = 2.0 ** rng.integers(-24, 8, (24, 10, 1))
    values = {
        "normal": normal,
        "outliers": normal * np.where(rng.random(shape) < 0.01, 1000, 1),
        "all magnitudes": np.sign(normal) * 2.0 ** rng.uniform(-40, 10, shape),
        "blocks of many magnitudes": (normal.reshape(24, 10, 16) * block_sizes).reshape(shape),
        "squared relu, half of it zero": np.maximum(normal, 0) ** 2,
        "blocks of zeros, both signs": np.where(
            rng.random((24, 10, 1)) < 0.5, -0.0, normal.reshape(24, 10, 16)
        ).reshape(shape),
        "a lattice, rich in ties": rng.integers(-24, 25, shape) * 0.25,
        "midpoints of scales": np.repeat(
            rng.integers(17, 32, (24, 10)) * 6 / 16 * 2.0 ** rng.integers(-12, 8, (24, 10)), 16, 1
        ),
    }
    return {name: v.astype(np.float32) for name, v in values.items()}


SPREADS = spreads()


@pytest.mark.parametrize("values", SPREADS.values(), ids=SPREADS.keys())
@pytest.mark.parametrize(
    "scale",
    [1 / 2688, 0.0123, 1.0, 1e-6, 40.0],
    ids=[
        "amax 1",
        "a scale that fits",
        "power of two",
        "far too small: all saturates",
        "far too large: blocks vanish",
    ],
)
def test_bytes_are_those_of_the_plain_definition(values: np.ndarray, scale: float) -> None:
    expected = plain_encode(values, np.float32(scale))
    found = nvfp4.encode_activations(values, scale)
    assert_same(found, expected)
    assert found[0].dtype == found[1].dtype == np.uint8
    assert found[0].shape == (24, 80)
    assert found[1].shape == (24, 10)


def test_scales_and_values_that_are_subnormal_float32() -> None:
    """Nothing is flushed: 2^-128 is below the smallest normal float32, 2^-126."""
    values = SPREADS["normal"] * np.float32(2.0**-128)
    scale = np.float32(0.0123 * 2.0**-128)
    assert 0 < scale < np.finfo(np.float32).smallest_normal
    found = nvfp4.encode_activations(values, scale)
    assert_same(found, plain_encode(values, scale))
    assert found[0].any()


def test_block_scales_next_to_a_midpoint() -> None:
    """These scales show the order of divisions: fp32(amax / fp32(6 scale)), not fp32(amax / 6) / scale."""
    midpoints = (E4M3[1:126] + E4M3[2:127]) / 2
    other_order = 0
    for scale in np.random.default_rng(0).uniform(0.001, 0.1, 50).astype(np.float32):
        amax = midpoints * (np.float32(6) * scale)
        amax = np.concatenate(
            [np.nextafter(amax, np.float32(0)), amax, np.nextafter(amax, np.float32(np.inf))]
        )
        values = np.repeat(amax, 16)[None]
        found = nvfp4.encode_activations(values, scale)
        assert_same(found, plain_encode(values, scale))
        codes = (
            torch.from_numpy(amax / np.float32(6) / scale).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        )
        other_order += (codes != found[1][0]).sum()
    assert other_order > 100  # of 18750


def test_the_spreads_take_every_path() -> None:
    """Block scales: zero, subnormal, normal, saturated; codes: all 16."""
    scales = {
        scale: [nvfp4.encode_activations(v, scale) for v in SPREADS.values()]
        for scale in (0.0123, 1e-6, 40.0)
    }
    found = np.concatenate([s.ravel() for pairs in scales.values() for _, s in pairs])
    assert {0, 1, 7, 8, 0x38, 0x7D, 0x7E} <= set(found.tolist())
    packed = np.concatenate([p.ravel() for pairs in scales.values() for p, _ in pairs])
    assert set((packed & 15).tolist()) | set((packed >> 4).tolist()) == set(range(16))


@settings(max_examples=200, deadline=None)  # the first example may wait for the compiler
@given(
    numbers=st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=32, max_size=32),
    exponent=st.integers(-24, 24),
)
def test_any_float32_block(numbers: list[float], exponent: int) -> None:
    values = np.array(numbers, np.float32).reshape(2, 16)
    scale = np.float32(2.0**exponent * 1.1)
    assert_same(nvfp4.encode_activations(values, scale), plain_encode(values, scale))


@settings(max_examples=200, deadline=None)  # the first example may wait for the compiler
@given(steps=st.lists(st.integers(-48, 48), min_size=16, max_size=16), exponent=st.integers(-14, 6))
def test_ties(steps: list[int], exponent: int) -> None:
    """Small multiples of a power of two land on midpoints of codes and scales, and on that of 0 and 2^-9."""
    values = np.array([steps], np.float32) * np.float32(2.0**exponent)
    assert_same(nvfp4.encode_activations(values, 0.25), plain_encode(values, np.float32(0.25)))


@pytest.mark.parametrize("values", SPREADS.values(), ids=SPREADS.keys())
@pytest.mark.parametrize("scale", [1 / 2688, 0.0123, 1.0, 40.0])
def test_the_weights_method_max_agrees_exactly_where_no_scale_underflows(
    values: np.ndarray, scale: float
) -> None:
    survives = scale_quotients(values, np.float32(scale)) > np.float32(2.0**-10)
    packed, block_scales = (a.reshape(len(survives), -1) for a in nvfp4.encode_activations(values, scale))
    weights, weight_scales = (a.reshape(len(survives), -1) for a in nvfp4.encode(values, scale, "max"))
    np.testing.assert_array_equal(packed[survives], weights[survives])
    np.testing.assert_array_equal(block_scales[survives], weight_scales[survives])
    assert not packed[~survives].any()
    assert not block_scales[~survives].any()
    assert weight_scales.all()  # the weights' method never gives a block the scale zero


# Bytes written by hand. With global scale 1 a block whose amax is 6 has block scale 1.0 = 0x38.


def encode_block(values: list[float], scale: float = 1.0) -> tuple[list[int], int]:
    packed, scales = nvfp4.encode_activations(np.array([values], np.float32), scale)
    return packed[0].tolist(), int(scales[0, 0])


@pytest.mark.parametrize(
    ("block", "packed", "scale"),
    [
        pytest.param(ALL_CODES, [0x10, 0x32, 0x54, 0x76, 0x90, 0xBA, 0xDC, 0xFE], 0x38, id="every code"),
        pytest.param(
            [v * 256 for v in ALL_CODES],
            [0x10, 0x32, 0x54, 0x76, 0x90, 0xBA, 0xDC, 0xFE],
            0x78,
            id="block scale 256",
        ),
        pytest.param(
            [2688.0] + [448.0] * 15, [0x27, *[0x22] * 7], 0x7E, id="the largest that is not clipped"
        ),
        pytest.param(
            [2 * 2688.0] + [-9e9] + [448.0] * 14,
            [0xF7, *[0x22] * 7],
            0x7E,
            id="beyond it: clipped, scale 448",
        ),
        pytest.param([np.inf] + [448.0] * 15, [0x27, *[0x22] * 7], 0x7E, id="Inf is clipped too"),
        pytest.param(
            [6.0, 5.0, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25] * 2,
            [0x67, 0x46, 0x24, 0x02] * 2,
            0x38,
            id="ties to even",
        ),
        pytest.param(
            [6.375] * 16, [0x77] * 8, 0x38, id="amax over a block's range: scale 1.0 (a tie), clipped to 6"
        ),
        pytest.param([6.375001] * 16, [0x77] * 8, 0x39, id="a little more: scale 1.125"),
        pytest.param([6 * 2.0**-9] + [0.0] * 15, [0x07, *[0] * 7], 0x01, id="the smallest scale, subnormal"),
        pytest.param([6 * 7 * 2.0**-9] * 16, [0x77] * 8, 0x07, id="the largest subnormal scale"),
        pytest.param(
            [6 * 2.0**-10] * 16, [0] * 8, 0x00, id="midway to it: the tie goes to zero, and the block with it"
        ),
        pytest.param([-6 * 2.0**-10] * 16, [0] * 8, 0x00, id="negative values too are code 0, not 8"),
        pytest.param(
            [float(np.nextafter(np.float32(6 * 2.0**-10), np.float32(1)))] * 16,
            [0x55] * 8,
            0x01,
            id="past it: 3 x 2^-9",
        ),
        pytest.param([0.0] * 16, [0] * 8, 0x00, id="zeros"),
        pytest.param([-0.0] * 16, [0] * 8, 0x00, id="negative zeros"),
        pytest.param(
            [6.0, -0.0, -0.1, 0.1] * 4,
            [0x07, 0x08] * 4,
            0x38,
            id="-0.0 is code 0, a negative that rounds to zero code 8",
        ),
    ],
)
def test_hand_written_blocks(block: list[float], packed: list[int], scale: int) -> None:
    assert encode_block(block) == (packed, scale)


def test_two_blocks_of_two_rows_keep_apart() -> None:
    """Each block has its own scale, and a scale that becomes zero does not affect the neighbours."""
    rows = [[6.0] * 16 + [1e-9] * 16, [0.0] * 16 + [-12.0] * 16]
    packed, scales = nvfp4.encode_activations(np.array(rows, np.float32), 1.0)
    assert scales.tolist() == [[0x38, 0x00], [0x00, 0x40]]
    assert packed.tolist() == [[0x77] * 8 + [0] * 8, [0] * 8 + [0xFF] * 8]


def test_what_a_block_that_underflows_is_decoded_to() -> None:
    """Zeros here. A weight's block keeps 2^-9, and is decoded to 3/2 of the original."""
    values = np.full((1, 16), -4 * 2.0**-10, np.float32)
    assert nvfp4.decode(*nvfp4.encode_activations(values, 1.0), 1.0).tolist() == [[0.0] * 16]
    assert not np.signbit(nvfp4.decode(*nvfp4.encode_activations(values, 1.0), 1.0)).any()
    assert nvfp4.decode(*nvfp4.encode(values, 1.0), 1.0).tolist() == [[-4 * 2.0**-10] * 16]


def test_nan_takes_its_block_and_no_other() -> None:
    values = np.ones((1, 48), np.float32)
    values[0, 20] = np.nan
    decoded = nvfp4.decode(*nvfp4.encode_activations(values, 0.01), 0.01)
    assert np.isnan(decoded).reshape(3, 16).sum(1).tolist() == [0, 16, 0]


def test_the_input_is_not_changed() -> None:
    values = SPREADS["normal"].copy()
    values.flags.writeable = False
    nvfp4.encode_activations(values, 0.01)
    np.testing.assert_array_equal(values, SPREADS["normal"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: nvfp4.encode_activations(x[:, :24].copy(), 1.0),
            r"got shape \(2, 24\), expected an input dimension .* 16",
        ),
        (lambda x: nvfp4.encode_activations(x.astype(np.float64), 1.0), "got dtype float64, expected uint16"),
        (lambda x: nvfp4.encode_activations(x[:, :16], 1.0), "got a strided array of shape"),
        (lambda x: nvfp4.encode_activations(x[0], 1.0), "expected a C-contiguous"),
        (
            lambda x: nvfp4.encode_activations(x, 0.0),
            "global_decode_scale: got 0.0, expected a positive finite number",
        ),
        (lambda x: nvfp4.encode_activations(x, -1.0), "global_decode_scale: got -1.0"),
        (lambda x: nvfp4.encode_activations(x, np.nan), "global_decode_scale: got nan"),
        (lambda x: nvfp4.encode_activations(x, np.inf), "global_decode_scale: got inf"),
    ],
)
def test_bad_arguments_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(np.ones((2, 32), np.float32))

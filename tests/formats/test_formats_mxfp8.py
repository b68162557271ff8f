"""MXFP8 against bytes written by hand, and against torch's cast and its types."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nemoquant.formats import e4m3, mxfp8
from nemoquant.formats.arithmetic import Encoded
from nemoquant.formats.registry import ARITHMETIC

FLOAT_MAX = float(np.finfo(np.float32).max)
OBJECT = ARITHMETIC["mxfp8"]


def block(*values: float) -> NDArray[np.float32]:
    """One block [1, 32] that starts with these values; the rest is 0."""
    row = np.zeros((1, 32), np.float32)
    row[0, : len(values)] = values
    return row


def first(weight: NDArray[np.float32] | NDArray[np.uint16]) -> tuple[int, int]:
    """The scale of the only block, and its first code."""
    codes, scales = mxfp8.encode(weight)
    assert codes.shape == (1, 32)
    assert scales.shape == (1, 1)
    return int(scales[0, 0]), int(codes[0, 0])


@pytest.mark.parametrize(("power", "scale"), [(0, 127), (-120, 7), (-127, 0), (119, 246)])
def test_hand_written_codes(power: int, scale: int) -> None:
    """Ties go to the even code: 17 lies between 16 (0x58) and 18 (0x59), 19 between 18 and 20 (0x5A)."""
    values = [448, -448, 1, -1, 0, -0.0, 17, 19, 2**-9, 2**-10, 1.5 * 2**-9, -(2**-20), 240, 288]
    codes, scales = mxfp8.encode((block(*values).astype(np.float64) * 2.0**power).astype(np.float32))
    assert scales.tolist() == [[scale]]
    expected = [0x7E, 0xFE, 0x38, 0xB8, 0x00, 0x80, 0x58, 0x5A, 0x01, 0x00, 0x02, 0x80, 0x77, 0x79]
    assert codes[0].tolist() == expected + [0] * 18


@pytest.mark.parametrize("power", [-127, -126, -116, -1, 0, 7, 119])
def test_every_code_and_every_midpoint(power: int) -> None:
    """Every value comes back exactly; midpoints go to the even code, their neighbours to the nearer one."""
    magnitudes = e4m3.VALUES[:0x7F].astype(np.float64)
    middles = ((magnitudes[:-1] + magnitudes[1:]) / 2).astype(np.float32)
    lower = np.arange(0x7E)
    wanted = [
        (e4m3.VALUES[:0x7F], np.arange(0x7F)),
        (middles, lower + lower % 2),
        (np.nextafter(middles, np.float32(0)), lower),
        (np.nextafter(middles, np.float32(512)), lower + 1),
    ]
    if power < -116:  # neighbours of the smallest midpoint, 2^-10, are no float32 numbers there
        wanted = wanted[:2]
    values = np.concatenate([v for v, _ in wanted])
    codes = np.concatenate([c for _, c in wanted])
    values, codes = np.concatenate([values, -values]), np.concatenate([codes, codes + 0x80])
    weight = np.full((-(-len(values) // 31), 32), 448, np.float64)
    for row in range(len(weight)):
        part = values[31 * row : 31 * row + 31]
        weight[row, 1 : 1 + len(part)] = part
    found, scales = mxfp8.encode(np.ldexp(weight, power).astype(np.float32))
    assert set(scales.reshape(-1).tolist()) == {127 + power}
    np.testing.assert_array_equal(found[:, 1:].reshape(-1)[: len(codes)], codes)
    decoded = mxfp8.decode(found, scales)[:, 1:].reshape(-1)[: len(codes)]
    np.testing.assert_array_equal(decoded, np.ldexp(e4m3.VALUES[codes].astype(np.float64), power))


def test_the_scale_doubles_just_above_448() -> None:
    """448 * 2^k fills the range; its neighbour above would saturate, so its block gets twice the scale."""
    for power in range(-126, 120):
        edge = np.float32(448 * 2.0**power)
        below, above = np.nextafter(edge, np.float32(0)), np.nextafter(edge, np.float32(np.inf))
        assert first(block(below)) == (127 + power, 0x7E)
        assert first(block(edge)) == (127 + power, 0x7E)
        assert first(block(above)) == (128 + power, 0x76)
        pattern = int(edge.view(np.uint32) >> 16)
        bf16 = np.zeros((1, 32), np.uint16)
        for step, expected in ((-1, (127 + power, 0x7E)), (0, (127 + power, 0x7E)), (1, (128 + power, 0x76))):
            bf16[0, 0] = pattern + step
            assert first(bf16) == expected


def test_the_smallest_scale() -> None:
    """2^-127 for all that is small.

    fp32(amax / 448) is subnormal there, and is rounded down one ulp above 448 * 2^-127.
    """
    edge = np.float32(448 * 2.0**-127)
    one = np.nextafter(edge, np.float32(1))
    assert first(block(edge)) == (0, 0x7E)
    assert first(block(one)) == (0, 0x7E)
    assert first(block(np.nextafter(one, np.float32(1)))) == (1, 0x76)
    assert first(block(2.0**-136)) == (0, 0x01), "the smallest value that is not lost"
    assert first(block(2.0**-137)) == (0, 0x00)
    assert first(block(2.0**-149)) == (0, 0x00)
    assert first(block(-(2.0**-149))) == (0, 0x80)
    smallest = np.zeros((1, 32), np.uint16)
    smallest[0, 0] = 1  # bf16, 2^-133
    assert first(smallest) == (0, 0x08)


def test_the_largest_number() -> None:
    assert first(block(FLOAT_MAX)) == (247, 0x78)
    bf16 = np.zeros((1, 32), np.uint16)
    bf16[0, 0] = 0xFF7F
    assert first(bf16) == (247, 0xF8)
    assert mxfp8.decode(*mxfp8.encode(bf16))[0, 0] == -np.inf, "rounded up to 2^128"
    bf16[0, 0] = 0xFF77  # 247 * 2^120
    assert mxfp8.decode(*mxfp8.encode(bf16))[0, 0] == -240 * 2.0**120
    bf16[0, 0] = 0xFF78  # 248 * 2^120, a tie
    assert mxfp8.decode(*mxfp8.encode(bf16))[0, 0] == -np.inf


def test_blocks_of_zeros() -> None:
    codes, scales = mxfp8.encode(np.array([[0.0] * 32 + [-0.0] * 32 + [1.0] + [0.0] * 31], np.float32))
    assert scales.tolist() == [[0, 0, 119]]
    assert codes.tolist() == [[0x00] * 32 + [0x80] * 32 + [0x78] + [0x00] * 31]
    assert not mxfp8.decode(codes, scales)[0, :64].any()


def test_each_block_has_its_own_scale() -> None:
    """Also the neighbours of large blocks, in every place of a block."""
    weight = np.full((32, 96), 2.0**-20, np.float32)
    weight[np.arange(32), 32 + np.arange(32)] = -448
    codes, scales = mxfp8.encode(weight)
    assert scales.tolist() == [[99, 127, 99]] * 32
    assert (codes[:, :32] == 0x78).all()
    assert (codes[:, 64:] == 0x78).all()
    np.testing.assert_array_equal(codes[:, 32:64], np.where(np.eye(32), 0xFE, 0x00))


def test_codes_are_torchs(bf16_weight, to_float) -> None:
    """torch casts what was multiplied by an exact power of two; that comes from frexp in float64."""
    values = to_float(bf16_weight)
    blocks = values.reshape(24, 5, 32).astype(np.float64)
    mantissa, exponent = np.frexp(np.abs(blocks).max(2))  # amax = mantissa * 2^exponent, in [0.5, 1)
    exponent = np.where(mantissa > 0.875, exponent, exponent - 1) - 8  # 448 is 0.875 * 2^9
    exponent = np.where(mantissa == 0, -127, np.clip(exponent, -127, 127))
    scaled = torch.from_numpy(np.ldexp(blocks, -exponent[:, :, None]).astype(np.float32))
    expected = scaled.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(24, 160)
    for weight in (bf16_weight, values):
        codes, scales = mxfp8.encode(weight)
        np.testing.assert_array_equal(scales, exponent + 127)
        np.testing.assert_array_equal(codes, expected)


def test_decode_of_every_code_under_every_scale() -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 8))
    by_torch = torch.from_numpy(scales).view(torch.float8_e8m0fnu).float().repeat_interleave(32, 1)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float() * by_torch
    values = mxfp8.decode(codes, scales)
    np.testing.assert_array_equal(values, expected.numpy())
    assert np.isnan(values[255]).all()
    assert values[0, 1] == 2.0**-136, "subnormal, and exact"
    buffer = np.empty((256, 256), np.float32)
    assert mxfp8.decode(codes, scales, out=buffer) is buffer
    np.testing.assert_array_equal(buffer, values)


def test_inputs_are_encoded_as_weights_are(bf16_weight, to_float) -> None:
    values = to_float(bf16_weight)
    for ours, theirs in zip(mxfp8.encode_activations(values), mxfp8.encode(bf16_weight), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF])
def test_nan_takes_its_block_along(bits: int) -> None:
    """Whatever else is in the block: Inf, large values. Its neighbours stay."""
    values = np.ones((1, 96), np.float32)
    values[0, 40:44] = np.inf, -1e30, -300, 500
    values.view(np.uint32)[0, 50] = bits
    codes, scales = mxfp8.encode_activations(values)
    assert scales.tolist() == [[119, 0xFF, 119]]
    assert codes[0, [40, 41, 42, 43, 45]].tolist() == [0x7E, 0xFE, 0xF9, 0x7E, 0x38], "the values as they are"
    assert int(codes[0, 50]) == (0xFF if bits >> 31 else 0x7F)
    decoded = mxfp8.decode(codes, scales)
    assert np.isnan(decoded[0, 32:64]).all()
    assert (decoded[0, :32] == 1).all()
    assert (decoded[0, 64:] == 1).all()
    assert OBJECT.bad_scales(scales) == 1


def test_inf_stays_inf() -> None:
    values = block(np.inf, -np.inf, 2.0**127, -(2.0**120), 1)
    codes, scales = mxfp8.encode_activations(values)
    assert scales.tolist() == [[0xFE]]
    assert codes[0, :5].tolist() == [0x7E, 0xFE, 0x38, 0x84, 0x00]
    assert mxfp8.decode(codes, scales)[0, :5].tolist() == [np.inf, -np.inf, 2.0**127, -(2.0**120), 0]


def test_rows_and_threads_change_nothing() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((67, 224)) * 10.0 ** rng.integers(-6, 6, (67, 1))).astype(np.float32)
    codes, scales = mxfp8.encode(weight)
    for start, end in ((0, 1), (3, 12), (60, 67), (5, 5)):
        some = mxfp8.encode(weight[start:end])
        np.testing.assert_array_equal(some[0], codes[start:end])
        np.testing.assert_array_equal(some[1], scales[start:end])
        np.testing.assert_array_equal(mxfp8.decode(*some), mxfp8.decode(codes, scales)[start:end])
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: mxfp8.encode(weight), range(16)):
            np.testing.assert_array_equal(found[0], codes)
            np.testing.assert_array_equal(found[1], scales)


def test_out_is_filled_and_the_input_is_not_changed(bf16_weight) -> None:
    weight = bf16_weight.copy()
    weight.flags.writeable = False
    buffers = np.full((24, 160), 0x55, np.uint8), np.full((24, 5), 0x55, np.uint8)
    found = mxfp8.encode(weight, out=buffers)
    assert found[0] is buffers[0]
    assert found[1] is buffers[1]
    for ours, theirs in zip(buffers, mxfp8.encode(bf16_weight), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert mxfp8.zeros((24, 160), out=buffers)[1] is buffers[1]
    assert not buffers[0].any()
    assert not buffers[1].any()


@pytest.mark.parametrize(
    ("amax", "degenerate"), [(0.0, True), (-0.0, True), (2.0**-149, False), (1.0, False), (FLOAT_MAX, False)]
)
def test_there_is_no_scale_of_the_tensor(amax: float, degenerate: bool) -> None:
    scale = OBJECT.decode_scale(amax)
    assert isinstance(scale.value, np.float32)
    assert scale == (1.0, degenerate)


def test_the_limit_is_the_last_number_that_is_not_decoded_to_inf() -> None:
    limit = np.float32(OBJECT.limit(np.float32(1)))
    beyond = np.nextafter(limit, np.float32(np.inf))
    assert mxfp8.decode(*mxfp8.encode(block(limit)))[0, 0] == 240 * 2.0**120
    assert mxfp8.decode(*mxfp8.encode(block(beyond)))[0, 0] == np.inf


@pytest.mark.parametrize("amax", [np.nan, np.inf, -1.0])
def test_an_amax_that_is_no_magnitude_is_refused(amax: float) -> None:
    with pytest.raises(ValueError, match=r"amax: got .*, expected a finite number that is not negative"):
        OBJECT.decode_scale(amax)


def test_only_nan_is_a_bad_scale() -> None:
    assert OBJECT.bad_scales(np.array([[0, 1, 127, 254]], np.uint8)) == 0
    assert OBJECT.bad_scales(np.array([[0, 255], [255, 3]], np.uint8)) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda scale: OBJECT.encode(np.ones((1, 32), np.float32), scale),
        lambda scale: OBJECT.encode_inputs(np.ones((1, 32), np.float32), scale),
        lambda scale: OBJECT.decode(Encoded(*mxfp8.zeros((1, 32))), scale),
        lambda scale: OBJECT.decoded_on_gpu(Encoded(*mxfp8.zeros((1, 32))), scale),
        lambda scale: OBJECT.round_trip_on_gpu(torch.ones(1, 32), scale),
        lambda scale: OBJECT.limit(scale),
    ],
)
def test_another_scale_of_the_tensor_is_refused(call) -> None:
    with pytest.raises(
        ValueError, match=r"scale: got 0.5, expected 1.0: mxfp8 has no scale of the whole tensor"
    ):
        call(np.float32(0.5))


BYTES = np.zeros((2, 64), np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: mxfp8.encode(w.astype(np.float64)), "weight: got dtype float64, expected uint16"),
        (lambda w: mxfp8.encode(w.T), "weight: got a strided array of shape"),
        (lambda w: mxfp8.encode(w[0]), r"weight: got a C-contiguous array of shape \(64,\)"),
        (
            lambda w: mxfp8.encode(np.ones((2, 48), np.float32)),
            r"weight: got shape \(2, 48\), expected an input dimension \(the last\) that 32 divides",
        ),
        (
            lambda w: mxfp8.zeros((2, 16)),
            r"weight: got shape \(2, 16\), expected an input dimension \(the last\) that 32 divides",
        ),
        (
            lambda w: mxfp8.encode(w, out=(np.empty((2, 64), np.int8), np.empty((2, 2), np.uint8))),
            r"out\[0\] \(codes\): got int8 of shape \(2, 64\), expected a writable C-contiguous uint8",
        ),
        (
            lambda w: mxfp8.encode(w, out=(np.empty((2, 64), np.uint8), np.empty((2, 4), np.uint8))),
            r"out\[1\] \(block scales\): got uint8 of shape \(2, 4\)",
        ),
        (
            lambda w: mxfp8.encode_activations(np.ones((2, 64), np.uint16)),
            "values: got dtype uint16, expected float32",
        ),
        (lambda w: mxfp8.decode(w, BYTES[:, :2]), "codes: got dtype float32, expected uint8"),
        (
            lambda w: mxfp8.decode(BYTES, BYTES[:, :4]),
            r"codes: got shape \(2, 64\), expected \(2, 128\) for scales \(2, 4\)",
        ),
        (
            lambda w: mxfp8.decode(BYTES, BYTES[:, :2].astype(np.int8)),
            "block_scales: got dtype int8, expected uint8",
        ),
        (lambda w: mxfp8.decode(BYTES, BYTES[:, :2], out=w[:, :32]), "out: got float32 of shape"),
    ],
)
def test_bad_arguments_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(np.ones((2, 64), np.float32))

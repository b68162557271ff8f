import numpy as np
import pytest

from nemoquant.formats.amax import amax


def test_amax_is_numpys(bf16_weight, to_float) -> None:
    values = to_float(bf16_weight)
    expected = np.abs(values).max()
    for weight in (bf16_weight, values):
        found = amax(weight)
        assert isinstance(found, np.float32)
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([-3.0, 2.0], 3.0),
        ([-1.0, -2.0], 2.0),
        ([-0.0, -0.0], 0.0),
        ([1.0, -np.inf], np.inf),
        ([np.inf, 1.0], np.inf),
        ([1e-40, -(2.0**-133)], 1e-40),
    ],
)
def test_hand_written(values: list[float], expected: float, to_bf16, to_float) -> None:
    weight = np.array([values], np.float32)
    assert amax(weight) == np.float32(expected)
    assert amax(to_bf16(weight)) == amax(to_float(to_bf16(weight)))
    assert not np.signbit(amax(weight))


@pytest.mark.parametrize("bits", [0x7FC0, 0xFFC0, 0x7F81, 0xFF81])
def test_nan_beats_inf_and_every_number_whatever_its_sign(bits: int) -> None:
    weight = np.full((3, 16), 0x7F80, np.uint16)
    weight[1, 5] = bits
    assert np.isnan(amax(weight))
    assert np.isnan(amax((weight.astype(np.uint32) << 16).view(np.float32)))


@pytest.mark.parametrize("place", [0, 131071, 131072, 399999])
def test_no_element_is_missed_where_chunks_meet(place: int) -> None:
    weight = np.zeros((4, 100000), np.uint16)
    weight.reshape(-1)[place] = 0xC040  # -3
    assert amax(weight) == 3


def test_an_empty_weight_has_amax_0() -> None:
    assert amax(np.zeros((0, 16), np.uint16)) == 0


def test_wrong_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="got dtype float64, expected uint16"):
        amax(np.zeros((2, 2)))  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ValueError, match=r"got a strided array of shape \(4, 2\)"):
        amax(np.zeros((4, 4), np.float32)[:, ::2])
    with pytest.raises(ValueError, match=r"array of shape \(4,\), expected a C-contiguous \[out, in\]"):
        amax(np.zeros(4, np.float32))

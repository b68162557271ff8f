"""NVFP4's shortcuts against the full computation.

Thresholds replace quotients, bounds replace errors, and windows replace all scales.
"""

import numpy as np
import pytest
from support.nvfp4_plain import E2M1, E4M3, METHODS, assert_same, plain_e2m1, plain_encode, plain_error

from nemoquant.formats import nvfp4, nvfp4_blocks, nvfp4_search

SCALES = [1.0, 3e-5, 0.0123, 448.0, 2.0**-117, 2.0**-126, 2.0**-149, 1e37, 5e37]
IDS = [f"{scale:.3g}" for scale in SCALES]


def bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


# Thresholds.


@pytest.mark.parametrize("scale", SCALES, ids=IDS)
@pytest.mark.parametrize(("dtype", "shift"), [(np.uint16, 16), (np.uint32, 0)], ids=["bf16", "float32"])
@pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning"
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_a_threshold_reaches_its_code_and_the_pattern_below_does_not(scale: float, dtype, shift: int) -> None:
    reached = np.zeros((128, 8), dtype)
    nvfp4_blocks.thresholds(np.uint32(shift), np.float32(scale), reached)
    steps = (E4M3 * np.float32(scale))[1:, None]
    patterns = reached[1:127].astype(np.int64)
    patterns[:, 0] -= 1 << (31 - shift)  # the sign
    for offset, expected in ((0, True), (-1, False)):
        magnitudes = ((patterns + offset) << shift).astype(np.uint32).view(np.float32)
        quotients = magnitudes / steps
        codes = plain_e2m1(quotients)
        reaches = np.column_stack([quotients[:, 0] > 0, codes[:, 1:] >= np.arange(1, 8)])
        wrong = np.isfinite(magnitudes) & (reaches != expected)
        assert not wrong.any(), f"(block scale less 1, code): {np.argwhere(wrong)[:5].tolist()}"


@pytest.mark.parametrize("scale", [1.0, 0.0123, 3e-5, 2.0**-126], ids="{:.3g}".format)
def test_every_finite_bf16_pattern(scale: float, to_float) -> None:
    """Once in order, so that blocks hold neighbours; once shuffled, so that they hold all magnitudes."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    patterns = patterns[(patterns & 0x7F80) != 0x7F80]
    for weight in (patterns, np.random.default_rng(0).permutation(patterns)):
        weight = weight.reshape(-1, 16)
        with np.errstate(over="ignore"):
            expected = plain_encode(to_float(weight), np.float32(scale), "max")
        assert_same(nvfp4.encode(weight, scale), expected)


@pytest.mark.parametrize("blocks", [1, 2, 3, 63, 64, 65, 127, 130])
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_blocks(blocks: int, method) -> None:
    """Kernels work on tiles of 64."""
    values = np.random.default_rng(blocks).standard_normal((1, 16 * blocks)).astype(np.float32)
    assert_same(nvfp4.encode(values, 0.002, method), plain_encode(values, np.float32(0.002), method))


# Bounds.


@pytest.mark.parametrize("scale", [1.0, 3e-5, 1.9, 2.0**-126, 1e35], ids="{:.3g}".format)
def test_bounds_hold_and_are_twice_as_wide_as_proven(scale: float) -> None:
    rng = np.random.default_rng(0)
    scales, table = np.empty(127, np.float32), np.empty((3, 127), np.float32)
    unit = nvfp4_search._unit(np.float32(scale))
    nvfp4_search._scales(np.float32(scale), unit, scales, table)
    first = rng.integers(1, 96, 256).astype(np.uint8)
    lattice = (
        scales[first, None] * rng.integers(0, 28, (256, 16)) * np.float32(0.25)
    )  # on midpoints, and next to them
    nudged = np.nextafter(
        lattice, rng.choice([0, np.float32(np.inf)], lattice.shape).astype(np.float32), dtype=np.float32
    )
    spread = scales[first, None] * (6 * rng.random((256, 16)) ** rng.integers(1, 6, (256, 1))).astype(
        np.float32
    )
    for values in (lattice, nudged, spread):
        lower, upper = np.empty((512, 16), np.float32), np.empty((512, 16), np.float32)
        nvfp4_search._bounds(values * unit, first, table, lower, upper)
        low, high = lower.reshape(256, 32).astype(np.float64), upper.reshape(256, 32).astype(np.float64)
        for k in range(32):
            error = plain_error(values, scales[first + k]) * float(unit) ** 2
            middle, quarter = (low[:, k] + high[:, k]) / 2, (high[:, k] - low[:, k]) / 4
            outside = np.abs(error - middle) > quarter
            assert not outside.any(), f"scale {k}: {np.flatnonzero(outside)[:5]}"


# Choices that windows and bounds must not change.


def lattices(rng: np.random.Generator, steps: np.ndarray, blocks: int) -> np.ndarray:
    """Blocks whose values are codes times one scale, or lie halfway between two such values.

    Several scales then have no error, or the same error.
    """
    picked = rng.choice(steps, (blocks, 1))
    codes = np.where(
        rng.random((blocks, 16)) < 0.8,
        rng.choice(E2M1, (blocks, 16)),
        rng.choice([0.25, 0.75, 2.5, 5], (blocks, 16)),
    )
    return picked * codes * rng.choice([-1, 1], (blocks, 16))


def adversarial(rng: np.random.Generator, scale: np.float32) -> dict[str, np.ndarray]:
    with np.errstate(over="ignore"):
        steps = E4M3[1:] * scale
    steps = steps[np.isfinite(steps) & (steps < 1e37)]
    lattice = lattices(rng, steps, 200)
    one = np.zeros((100, 16))
    one[np.arange(100), rng.integers(0, 16, 100)] = rng.choice(steps, 100) * 6
    equal = np.repeat(rng.choice(steps, (100, 1)) * rng.choice([1, 1.5, 4, 6, 7, 9], (100, 1)), 16, 1)
    huge = rng.standard_normal((60, 16)) * np.where(rng.random((60, 16)) < 0.2, 1e30, 1e-30)
    return {
        "lattice": lattice,
        "lattice, nudged": np.nextafter(lattice.astype(np.float32), np.float32(0)),
        "one value": one,
        "all equal": equal,
        "two sizes": np.where(rng.random((100, 16)) < 0.5, equal, equal / 8),
        "huge range": huge,
        "below the smallest scale": rng.standard_normal((60, 16))
        * float(steps[0])
        * 10.0 ** -rng.integers(0, 4, (60, 1)),
        "above the largest": rng.standard_normal((60, 16))
        * float(min(float(steps[-1]) * 6, 1e37))
        * rng.uniform(0.5, 8, (60, 1)),
        "subnormal": rng.integers(-5, 6, (60, 16)) * 2.0**-149,
        "zeros of both signs": np.where(rng.random((60, 16)) < 0.5, 0.0, -0.0),
    }


@pytest.mark.parametrize("scale", SCALES, ids=IDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning"
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_adversarial_blocks(scale: float, method) -> None:
    rng, scale = np.random.default_rng(1), np.float32(scale)
    for name, values in adversarial(rng, scale).items():
        floats = values.astype(np.float32)
        for weight in (floats, bf16(floats)):
            plain = floats if weight is floats else (weight.astype(np.uint32) << 16).view(np.float32)
            found, expected = nvfp4.encode(weight, scale, method), plain_encode(plain, scale, method)
            differ = np.flatnonzero((found[1] != expected[1]).any(1) | (found[0] != expected[0]).any(1))
            assert not len(differ), f"{name}, {weight.dtype}: {len(differ)} blocks, first {differ[:5]}"


def test_many_blocks_of_weights() -> None:
    """Some of 20,000 blocks have two scales within the bounds, and some a window that proves nothing."""
    rng = np.random.default_rng(2)
    weight = bf16(rng.standard_t(4, (100, 3200)) * 0.02)
    scale = nvfp4.global_decode_scale(1.0)
    for method in METHODS:
        expected = plain_encode((weight.astype(np.uint32) << 16).view(np.float32), scale, method)
        assert_same(nvfp4.encode(weight, scale, method), expected)

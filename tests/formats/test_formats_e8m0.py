"""E8M0 against torch's ``float8_e8m0fnu``, and its scales against exact powers of two."""

import math

import numpy as np
import pytest
import torch

from nemoquant.formats import e8m0


def test_values_are_torchs() -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float().numpy()
    np.testing.assert_array_equal(e8m0.VALUES, theirs)
    bits = np.array([e8m0.value_bits(np.uint32(code)) for code in range(256)], np.uint32)
    np.testing.assert_array_equal(bits.view(np.float32), theirs)
    assert e8m0.VALUES[[0, 1, 127, 254]].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127]


@pytest.mark.parametrize("mantissa", [0, 1, 2, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFE, 0x7FFFFF])
def test_the_smallest_power_that_is_not_below(mantissa: int) -> None:
    """Every exponent of float32, subnormal numbers too; below 2^-127 it is 2^-127, above 2^127 it is that."""
    for exponent in range(255):
        bits = np.uint32(exponent << 23 | mantissa)
        fraction, power = math.frexp(float(bits.view(np.float32)))  # fraction * 2^power, in [0.5, 1)
        smallest = power - 1 if fraction == 0.5 else power
        expected = 0 if fraction == 0 else min(max(smallest, -127), 127) + 127
        assert int(e8m0.ceil_code(bits)) == expected, hex(bits)


def test_inf_and_nan() -> None:
    assert int(e8m0.ceil_code(np.uint32(0x7F800000))) == 0xFE
    for bits in (0x7F800001, 0x7FC00000, 0x7FFFFFFF):
        assert int(e8m0.ceil_code(np.uint32(bits))) == e8m0.NAN == 0xFF

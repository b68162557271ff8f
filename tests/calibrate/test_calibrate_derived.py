"""Scalar scales from maxima."""

import numpy as np
import torch

from nemoquant.calibrate.derived import cache_scale, input_scale


def test_a_cache_scale_is_the_next_bf16_number() -> None:
    """Engines that keep it in bf16 have the same number, and it clips nothing that calibration saw."""
    for amax in [1e-30, 0.1, 448.0, 448.1, 7.125, 3.4e38, *np.geomspace(1e-3, 1e3, 400)]:
        exact, scale = input_scale(amax, "fp8"), cache_scale(amax, "fp8")
        rounded = torch.tensor(scale).bfloat16()
        assert rounded.float().item() == scale >= exact
        assert torch.nextafter(rounded, torch.tensor(0, dtype=torch.bfloat16)).float().item() < exact


def test_a_cache_that_was_zero() -> None:
    assert cache_scale(0.0, "fp8") == 1

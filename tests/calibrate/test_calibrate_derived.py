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


def test_headroom_multiplies_what_has_scales_below_it() -> None:
    """2688 is 6 x 448: the largest code times the largest block scale."""
    for amax in [1e-30, 0.1, 7.125, 2688.0, 3.4e38]:
        exact = np.float32(np.float64(np.float32(amax)) / 2688)
        assert input_scale(amax, "nvfp4") == exact
        assert input_scale(amax, "nvfp4", 2) == exact * np.float32(2)
        assert input_scale(amax, "nvfp4", 1.1) == np.float32(float(exact) * 1.1)
        assert input_scale(amax, "fp8", 2) == input_scale(amax, "fp8")
        assert input_scale(amax, "nvfp4", 2).dtype == np.float32
    for nothing in (0.0, 1e-40):
        assert input_scale(nothing, "nvfp4", 2) == 1, "a degenerate scale is 1.0 whatever the headroom"


def test_a_cache_that_was_zero() -> None:
    assert cache_scale(0.0, "fp8") == 1

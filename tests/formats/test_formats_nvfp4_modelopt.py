"""NVFP4 method max: every byte equal to NVIDIA Model Optimizer's."""

import numpy as np
import pytest
import torch
from support import modelopt_run

from nemoquant.formats import nvfp4
from nemoquant.formats.amax import amax

pytestmark = modelopt_run.MARKS


@pytest.fixture(scope="module")
def oracle():
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    return NVFP4QTensor


def test_codes_block_scales_and_global_scale(bf16_weight, oracle) -> None:
    tensor = torch.from_numpy(bf16_weight.copy()).view(torch.bfloat16)
    theirs, block_scales, global_scale = oracle.quantize(tensor, 16)

    scale = nvfp4.global_decode_scale(amax(bf16_weight))
    packed, scales = nvfp4.encode(bf16_weight, scale)
    assert scale.tobytes() == global_scale.numpy().tobytes()
    np.testing.assert_array_equal(scales, block_scales.view(torch.uint8).numpy())
    np.testing.assert_array_equal(packed, theirs._quantized_data.numpy())

    values = theirs.dequantize(
        torch.float32, scale=block_scales, double_scale=global_scale, block_sizes={-1: 16}
    )
    np.testing.assert_array_equal(nvfp4.decode(packed, scales, scale), values.numpy())


def test_with_the_scale_of_a_group(bf16_weight, oracle) -> None:
    tensor = torch.from_numpy(bf16_weight.copy()).view(torch.bfloat16)
    scale = nvfp4.global_decode_scale(amax(bf16_weight) * np.float32(11))
    theirs, block_scales, _ = oracle.quantize(tensor, 16, weights_scaling_factor_2=torch.tensor(scale))
    packed, scales = nvfp4.encode(bf16_weight, scale)
    np.testing.assert_array_equal(scales, block_scales.view(torch.uint8).numpy())
    np.testing.assert_array_equal(packed, theirs._quantized_data.numpy())

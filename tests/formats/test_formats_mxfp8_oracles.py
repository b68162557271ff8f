"""MXFP8 of bf16 weights: every byte is NVIDIA Model Optimizer's, scales are those of compressed-tensors."""

import importlib.util

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import modelopt_run

from nemoquant.formats import mxfp8


@pytest.fixture(scope="module")
def oracle():
    from modelopt.torch.quantization.qtensor import MXFP8QTensor

    return MXFP8QTensor


def modelopt(test):
    for mark in modelopt_run.MARKS:
        test = mark(test)
    return test


def hold(weight: NDArray[np.uint16], oracle) -> None:
    """Codes, block scales and decoded values are Model Optimizer's."""
    theirs, block_scales = oracle.quantize(torch.from_numpy(weight.copy()).view(torch.bfloat16))
    codes, scales = mxfp8.encode(weight)
    np.testing.assert_array_equal(scales, block_scales.numpy())
    np.testing.assert_array_equal(codes, theirs._quantized_data.view(torch.uint8).numpy())
    values = theirs.dequantize(torch.float32, scale=block_scales)
    np.testing.assert_array_equal(mxfp8.decode(codes, scales), values.numpy())


@modelopt
def test_weights(bf16_weight, oracle) -> None:
    hold(bf16_weight, oracle)


@modelopt
def test_every_bf16_number_as_the_largest_of_its_block(oracle) -> None:
    """Their exponent is ceil(log2()) in fp32, ours is read from bits: no bf16 amax tells them apart."""
    weight = np.zeros((0x7F80, 32), np.uint16)
    every = np.arange(0x7F80, dtype=np.uint16)
    weight[:, 5], weight[:, 20], weight[:, 31] = every, every // 2, every | 0x8000
    hold(weight, oracle)


@modelopt
@pytest.mark.parametrize("seed", range(4))
def test_random_bf16_patterns(seed: int, oracle) -> None:
    """All exponents side by side in a block, then a block's values within a few powers of two."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 1 << 16, (512, 96), np.uint16)
    hold(np.where(patterns & 0x7F80 == 0x7F80, 0, patterns).astype(np.uint16), oracle)
    near = rng.integers(0, 0x7F80 - 0x600, (512, 3, 1), np.uint16) + rng.integers(
        0, 0x600, (512, 3, 32), np.uint16
    )
    sign = rng.integers(0, 2, (512, 3, 32), np.uint16) << 15
    hold((near | sign).astype(np.uint16).reshape(512, 96), oracle)


@modelopt
def test_inf(oracle) -> None:
    values = np.zeros((1, 32), np.float32)
    values[0, :5] = np.inf, -np.inf, 2.0**127, -(2.0**120), 1
    theirs, block_scales = oracle.quantize(torch.from_numpy(values))
    codes, scales = mxfp8.encode_activations(values)
    np.testing.assert_array_equal(scales, block_scales.numpy())
    np.testing.assert_array_equal(codes, theirs._quantized_data.view(torch.uint8).numpy())


@modelopt
def test_where_they_differ(oracle) -> None:
    """A float32 amax one ulp above 448 * 2^k: the logarithm in fp32 is k itself, and the value saturates."""
    for amax, ours, theirs in (
        (np.float32(7.0000005), 122, 121),
        (np.float32(448 * 2.0**100) * np.float32(1 + 2**-22), 228, 227),
    ):
        weight = np.zeros((1, 32), np.float32)
        weight[0, 0] = amax
        found = oracle.quantize(torch.from_numpy(weight))
        codes, scales = mxfp8.encode(weight)
        assert (int(scales[0, 0]), int(codes[0, 0])) == (ours, 0x76)
        assert (int(found[1][0, 0]), int(found[0]._quantized_data.view(torch.uint8)[0, 0])) == (theirs, 0x7E)


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="needs compressed-tensors, an oracle"
)
def test_scales_of_compressed_tensors() -> None:
    """By exponents: they double the scale at 448 * 2^k already, not only above; all else is equal.

    Their arithmetic overflows at the largest exponent, and reaches below the smallest scale.
    """
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    amax = np.arange(0x0500, 0x7F00, dtype=np.uint16)
    theirs = generate_mx_scales(torch.from_numpy(amax).view(torch.bfloat16), 8).float().numpy()
    weight = np.zeros((len(amax), 32), np.uint16)
    weight[:, 0] = amax
    _, scales = mxfp8.encode(weight)
    np.testing.assert_array_equal(scales[:, 0] + (amax & 0x7F == 0x60), theirs)

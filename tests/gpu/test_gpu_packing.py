"""Packing on a CUDA device: every kernel gives the CPU's bytes, from parallel threads too.

The CPU's bytes need numba.
"""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.gpu_needs import needs

pytest.importorskip("numba", reason="needs numba, for the CPU's bytes")

from nemoquant.formats import fp8, fp8_gpu, gpu, mxfp8, mxfp8_gpu, nvfp4, nvfp4_gpu
from nemoquant.formats.amax import amax

pytestmark = needs("Triton", importlib.util.find_spec("triton") is not None)

SHAPE = (2688, 1024)  # an expert of Super
METHODS = ("max", "four_over_six", "mse")
KINDS = (
    "normal",
    "all magnitudes",
    "a lattice, rich in ties",
    "near the smallest normal bf16",
    "empty blocks",
)


def weight(kind: str, dtype: str, seed: int = 0) -> NDArray[Any]:
    """[out, in] as bf16 patterns or float32."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(SHAPE)
    values = {
        "normal": normal * 0.02,
        "all magnitudes": np.sign(normal) * 2.0 ** rng.uniform(-40, 10, SHAPE),
        "a lattice, rich in ties": rng.integers(-24, 25, SHAPE) * 0.25,
        "near the smallest normal bf16": normal * 2.0**-105,
        "empty blocks": np.where(np.arange(SHAPE[1]) // 16 % 2 == 0, -0.0, normal),
    }[kind].astype(np.float32)
    return values if dtype == "float32" else (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_codes(dtype: str, kind: str) -> None:
    """Every method, with the tensor's own scale and with a scale that is far too small."""
    one = weight(kind, dtype)
    largest = amax(one)
    assert amax(one, "cuda").tobytes() == largest.tobytes()
    expected = mxfp8.encode(one)
    for ours, theirs in zip(mxfp8.encode(one, device="cuda"), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(mxfp8.decode(*expected, device="cuda"), mxfp8.decode(*expected))
    for group in (np.float32(1), np.float32(0.01)):
        scale = fp8.decode_scale(largest * group)
        np.testing.assert_array_equal(fp8.encode(one, scale, device="cuda"), fp8.encode(one, scale))
        for method in METHODS:
            scale = nvfp4.global_decode_scale(largest * group, method)
            for ours, theirs in zip(
                nvfp4.encode(one, scale, method, device="cuda"), nvfp4.encode(one, scale, method), strict=True
            ):
                np.testing.assert_array_equal(ours, theirs, err_msg=f"{method}, {group}")


@pytest.mark.parametrize("kind", KINDS)
def test_inputs(kind: str) -> None:
    """Rounded on the device and decoded again; NaN and Inf are among them."""
    values = weight(kind, "float32")
    values[0, 5], values[1, 20], values[2, 40] = np.nan, np.inf, -np.inf
    there = torch.from_numpy(values).to(gpu.torch_device("cuda"))
    expected = mxfp8.decode(*mxfp8.encode_activations(values))
    np.testing.assert_array_equal(mxfp8_gpu.rounded(there).cpu().numpy(), expected)
    for scale in (np.float32(0.01), np.float32(1e-4)):
        np.testing.assert_array_equal(
            fp8_gpu.rounded(there, scale).cpu().numpy(), fp8.decode(fp8.encode(values, scale), scale)
        )
        expected = nvfp4.decode(*nvfp4.encode_activations(values, scale), scale)
        np.testing.assert_array_equal(nvfp4_gpu.rounded(there, scale).cpu().numpy(), expected)


def test_threads_do_not_disturb_each_other() -> None:
    """Each thread has its own lane: 64 weights through 8 threads, maximum and codes of each from one copy."""
    weights = [weight("normal", "bfloat16", seed) for seed in range(8)]
    scales = [nvfp4.global_decode_scale(amax(one)) for one in weights]
    expected = [nvfp4.encode(one, scale) for one, scale in zip(weights, scales, strict=True)]

    def encode(number: int) -> bool:
        there = gpu.put(weights[number % 8])
        same = nvfp4.global_decode_scale(amax(there)) == scales[number % 8]
        found = nvfp4.encode(there, scales[number % 8])
        return same and all(np.array_equal(a, b) for a, b in zip(found, expected[number % 8], strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(encode, range(64)))

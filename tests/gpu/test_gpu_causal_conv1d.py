"""CausalConv1d on a CUDA device, with Super's and Nano's channels.

Against float64; streams, strides, states that are cut. NEMOQUANT_KERNELS names the library of `nemoquant
plugins build`. Under compute-sanitizer: `compute-sanitizer python -m pytest
tests/gpu/test_gpu_causal_conv1d.py`.
"""

import pytest
import torch
from support.gpu_needs import needs_kernel

from nemoquant.ops.functional import causal_conv1d

pytestmark = needs_kernel("causal_conv1d")

CHANNELS = {"Super": 10_240, "Nano": 6_144}


def given(
    dtype: torch.dtype, batch: int, length: int, channels: int, kernel: int = 4, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator("cuda").manual_seed(seed)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device="cuda")

    weight, bias = made(channels, kernel) / kernel, made(channels)
    return made(batch, length, channels).to(dtype), weight, bias, made(batch, channels, kernel - 1).to(dtype)


def framework(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, state: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """torch's convolution in ``dtype``."""
    full = torch.cat([state, x.mT], 2).to(dtype)
    y = torch.nn.functional.conv1d(full, weight.to(dtype)[:, None], bias.to(dtype), groups=x.shape[2])
    return torch.nn.functional.silu(y).mT


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 4096])
@pytest.mark.parametrize("model", CHANNELS)
def test_error_is_below_twice_that_of_torch(model: str, length: int, dtype: torch.dtype) -> None:
    x, weight, bias, state = given(dtype, 2, length, CHANNELS[model])
    exact = framework(x, weight, bias, state, torch.float64)
    y, after = causal_conv1d(x, weight, bias, state, dtype)
    assert error(y, exact) <= 2 * error(framework(x, weight, bias, state, dtype), exact)
    assert after.equal(torch.cat([state, x.mT], 2)[:, :, -3:])


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 7, 36, 520])
def test_any_number_of_channels_and_taps(channels: int, kernel: int) -> None:
    x, weight, bias, state = given(torch.bfloat16, 3, 37, channels, kernel)
    y, after = causal_conv1d(x, weight, bias, state)
    exact = framework(x, weight, bias, state, torch.float64)
    assert error(y, exact) <= 2 * error(framework(x, weight, bias, state, torch.float32), exact)
    assert after.equal(torch.cat([state, x.mT], 2)[:, :, 1 - kernel :])


@pytest.mark.parametrize("cut", [1, 2, 63, 64, 65, 511])
def test_a_sequence_that_is_cut_gives_the_same_bits(cut: int) -> None:
    x, weight, bias, state = given(torch.bfloat16, 2, 512, CHANNELS["Nano"])
    y, after = causal_conv1d(x, weight, bias, state)
    first, between = causal_conv1d(x[:, :cut].contiguous(), weight, bias, state)
    second, last = causal_conv1d(x[:, cut:].contiguous(), weight, bias, between)
    assert torch.cat([first, second], 1).equal(y)
    assert last.equal(after)


def test_a_slice_of_a_projection_is_not_copied_and_gives_the_same_bits() -> None:
    x, weight, bias, state = given(torch.bfloat16, 2, 256, CHANNELS["Super"])
    wide = torch.zeros(2, 256, 8192 + x.shape[2] + 128, dtype=x.dtype, device="cuda")
    wide[:, :, 8192 : 8192 + x.shape[2]] = x
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y, _ = causal_conv1d(wide[:, :, 8192 : 8192 + x.shape[2]], weight, bias, state)
    assert torch.cuda.max_memory_allocated() - allocated < 1.5 * y.nbytes
    assert y.equal(causal_conv1d(x, weight, bias, state)[0])


def test_it_runs_on_the_current_stream_and_in_a_graph() -> None:
    x, weight, bias, state = given(torch.bfloat16, 8, 1, CHANNELS["Super"])
    wanted = causal_conv1d(x, weight, bias, state)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        y, _ = causal_conv1d(x, weight, bias, state)
    x.mul_(2)
    graph.replay()
    doubled = causal_conv1d(x, weight, bias, state)[0]
    torch.cuda.synchronize()
    assert y.equal(doubled)
    assert not y.equal(wanted)


def test_more_elements_than_32_bits_count() -> None:
    """2^31 elements and more in x: the last rows equal those of a short sequence from the same state."""
    channels = 4096
    length = 2**31 // channels + 5
    if torch.cuda.mem_get_info()[0] < 3 * 2 * length * channels:
        length = 2**20 // 4  # this is still long
    x, weight, bias, state = given(torch.bfloat16, 1, 64, channels)
    long = torch.zeros(1, length, channels, dtype=torch.bfloat16, device="cuda")
    long[:, -64:] = x
    y, after = causal_conv1d(long, weight, bias, state, torch.bfloat16)
    short, last = causal_conv1d(x, weight, bias, torch.zeros_like(state), torch.bfloat16)
    assert y[:, -64:].equal(short)
    assert after.equal(last)

"""The convolution's cases: y against float64, the state's bits, and a sequence cut in two."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.gpu.cases import DTYPES, FLOAT32, Case, Errors, relative_error, unequal
from nemoquant.ops.functional import causal_conv1d

FLOOR = 3e-7  # float32 sums of 4 products and silu


def exact(full: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(convolution), in float64, of ``full`` [batch, channels, time]: the state, then the inputs."""
    weight, bias = weight.double()[:, None], bias.double()
    y = torch.nn.functional.conv1d(full.double(), weight, bias, groups=full.shape[1])
    return torch.nn.functional.silu(y).mT


def against_float64(
    device: str,
    batch: int,
    length: int,
    channels: int,
    kernel: int,
    dtype: torch.dtype,
    y_dtype: torch.dtype,
) -> Errors:
    """y within twice the error of rounding it once; the state's bits; those of the sequence in two calls."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    x = normal(batch, length, channels).to(dtype)
    weight, bias = normal(channels, kernel) / kernel, normal(channels)
    state = normal(batch, channels, kernel - 1).to(dtype)
    y, after = causal_conv1d(x, weight, bias, state, y_dtype)
    full = torch.cat([state, x.mT], 2)
    expected = exact(full, weight, bias)
    limit = max(2 * relative_error(expected.to(y_dtype), expected), FLOOR)
    errors = [
        ("state", unequal([after], [full[:, :, 1 - kernel :]]), 0),
        ("y", relative_error(y, expected), limit),
    ]
    if length > 1:
        cut = max(1, length // 3)
        first, between = causal_conv1d(x[:, :cut].contiguous(), weight, bias, state, y_dtype)
        second, end = causal_conv1d(x[:, cut:].contiguous(), weight, bias, between, y_dtype)
        errors.append(("cut", unequal([torch.cat([first, second], 1), end], [y, after]), 0))
    return errors


def cases(device: str) -> Iterator[Case]:
    """Super's and Nano's channels on a device, few for the emulator; odd ones on both."""
    small = device == "cpu"
    for dtype in DTYPES:
        for channels in (520, 7) if small else (10240, 6144, 520, 36, 7, 1):
            for length in (1, 70) if small else (1, 2, 3, 5, 64, 1031):
                check = partial(against_float64, device, 2, length, channels, 4, dtype, dtype)
                yield Case(f"conv {dtype} {channels} x {length}", check)
        for kernel in (2, 3):
            check = partial(against_float64, device, 3, 37, 520, kernel, dtype, FLOAT32)
            yield Case(f"conv {dtype} kernel {kernel}", check)

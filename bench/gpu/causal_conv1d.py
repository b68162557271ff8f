"""Times CausalConv1d against its memory floor, torch's convolution, and the package causal_conv1d where it is installed.

    python bench/gpu/causal_conv1d.py            needs a CUDA device and `nemoquant plugins build`

A decode step of one sequence is shorter than a launch takes; what counts there is the step of a whole batch.
"""

import importlib.util

import torch
from timing import bandwidth, row, seconds, title

from nemoquant.ops.functional import causal_conv1d, library_for

MODELS = {"Super": 10_240, "Nano": 6_144}
KERNEL = 4
SHAPES = [(1, 4096), (1, 65_536), (8, 4096), (1, 1), (16, 1), (128, 1), (512, 1)]  # batch, length


def floor(batch: int, length: int, channels: int, size: int) -> float:
    """Seconds to move x, y, both states and the weights once."""
    moved = 2 * batch * length * channels * size + 2 * batch * channels * (KERNEL - 1) * size + 4 * channels * (KERNEL + 1)
    return moved / bandwidth()


def others(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, state: torch.Tensor) -> dict[str, float]:
    """Of what else does the same; layouts as each likes them best."""
    full, taps, low = torch.cat([state, x.mT], 2).contiguous(), weight.to(x.dtype)[:, None], bias.to(x.dtype)

    def in_torch() -> torch.Tensor:
        return torch.nn.functional.silu(torch.nn.functional.conv1d(full, taps, low, groups=x.shape[2]))

    found = {"torch": seconds(in_torch)}
    if importlib.util.find_spec("causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

        weights = weight.to(x.dtype)
        if x.shape[1] == 1:
            kept = torch.cat([state, x.mT], 2)[:, :, -KERNEL:].contiguous()
            found["causal_conv1d_update"] = seconds(lambda: causal_conv1d_update(x[:, 0], kept, weights, low, activation="silu"))
        else:
            found["causal_conv1d_fn"] = seconds(lambda: causal_conv1d_fn(x.mT, weights, low, activation="silu"))
    return found


def main() -> None:
    library_for(torch.device("cuda"))
    title("CausalConv1d, bf16 in and out, K = 4")
    for model, channels in MODELS.items():
        for batch, length in SHAPES:
            x = torch.randn(batch, length, channels, device="cuda", dtype=torch.bfloat16)
            weight, bias = torch.randn(channels, KERNEL, device="cuda"), torch.randn(channels, device="cuda")
            state = torch.randn(batch, channels, KERNEL - 1, device="cuda", dtype=torch.bfloat16)
            ours = seconds(lambda: causal_conv1d(x, weight, bias, state, torch.bfloat16))  # noqa: B023
            row(f"{model}, {batch} x {length}", ours, floor(batch, length, channels, 2), others(x, weight, bias, state))


if __name__ == "__main__":
    main()

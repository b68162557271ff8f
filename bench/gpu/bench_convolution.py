"""Times of the convolution beside torch's, and beside the package causal_conv1d where it is installed.

The floor is x, y, both states and the weights moved once, at the rate of a copy. A decode step of one
sequence is shorter than a launch takes; what counts there is the step of a whole batch.
"""

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu.timing import CACHE, Table, timed
from nemoquant.ops.functional import causal_conv1d

MODELS = {"Super": 10_240, "Nano": 6_144}  # channels
SHAPES = ((1, 1), (8, 1), (64, 1), (1, 4096), (1, 65_536))  # batch, length
WIDE_SHAPES = (*SHAPES, (16, 1), (128, 1), (512, 1), (8, 4096))
KERNEL = 4
MOST = 700  # calls of a row: those of a step of one sequence fill the cache at last
BFLOAT16 = torch.bfloat16


@dataclass(frozen=True)
class Call:
    """The tensors of one call, and the calls: ours, torch's, the package's."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    state: Tensor

    @classmethod
    def random(cls, batch: int, length: int, channels: int) -> "Call":
        return cls(
            torch.randn(batch, length, channels, device="cuda").to(BFLOAT16),
            torch.randn(channels, KERNEL, device="cuda"),
            torch.randn(channels, device="cuda"),
            torch.randn(batch, channels, KERNEL - 1, device="cuda").to(BFLOAT16),
        )

    def ours(self) -> object:
        return causal_conv1d(self.x, self.weight, self.bias, self.state, BFLOAT16)

    def others(self) -> dict[str, float]:
        """Microseconds of what else does the same; layouts as each likes them best."""
        full = torch.cat([self.state, self.x.mT], 2).contiguous()
        weight, bias, channels = self.weight.to(BFLOAT16), self.bias.to(BFLOAT16), self.x.shape[2]

        def in_torch() -> object:
            y = torch.nn.functional.conv1d(full, weight[:, None], bias, groups=channels)
            return torch.nn.functional.silu(y)

        times = {"torch_us": timed([in_torch], 5)}
        if importlib.util.find_spec("causal_conv1d") is None:
            return times
        from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

        if self.x.shape[1] == 1:
            kept, x = full[:, :, -KERNEL:].contiguous(), self.x[:, 0]
            step = timed([lambda: causal_conv1d_update(x, kept, weight, bias, activation="silu")], 5)
            return times | {"causal_conv1d_update_us": step}
        whole = timed([lambda: causal_conv1d_fn(self.x.mT, weight, bias, activation="silu")], 5)
        return times | {"causal_conv1d_fn_us": whole}


def moved(batch: int, length: int, channels: int) -> int:
    """Bytes: x and y, both states, weight and bias."""
    return 4 * batch * length * channels + 4 * batch * channels * (KERNEL - 1) + 4 * channels * (KERNEL + 1)


def measure(table: Table, name: str, batch: int, length: int, channels: int) -> None:
    """One row."""
    nbytes = moved(batch, length, channels)
    sets = [Call.random(batch, length, channels) for _ in range(max(1, min(MOST, CACHE // nbytes)))]
    us = timed([call.ours for call in sets], 7)
    table.row(name, us, table.limits.floor(nbytes), **sets[0].others())


def rows(table: Table, wide: bool = False) -> None:
    """Super; ``wide``: Nano too, and more shapes."""
    for model in MODELS if wide else ("Super",):
        for batch, length in WIDE_SHAPES if wide else SHAPES:
            name = f"conv {'' if model == 'Super' else f'{model} '}{batch} x {length}"
            measured = (table, name, batch, length, MODELS[model])
            table.guarded(name, lambda given=measured: measure(*given))

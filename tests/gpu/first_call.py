"""A process whose first call of an operator is captured in a CUDA graph: ``python first_call.py NAME``.

Then the replay, also of inputs that changed, must have the bits of a plain call. What a library does at its
first launch (loading code, setting attributes, asking the device) may not be possible while capturing.
"""

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemoquant.ops.functional import causal_conv1d, mamba2_scan, routed_experts

Call = tuple[Tensor, Callable[[], Sequence[Tensor]]]
"""An input that changes between capture and replay, and the call."""


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


def decode() -> Call:
    x, dt, b, c = (normal(4, 1, *shape).bfloat16() for shape in ((64, 64), (64,), (8, 128), (8, 128)))
    a, state, seed = (
        -torch.rand(64, device="cuda"),
        normal(4, 64, 64, 128).half(),
        torch.tensor([7], device="cuda"),
    )
    return x, lambda: mamba2_scan(x, dt, a, b, c, None, None, state, seed, rounding="stochastic")


def prefill() -> Call:
    x, dt, b, c = (normal(1, 2111, *shape).bfloat16() for shape in ((8, 64), (8,), (1, 128), (1, 128)))
    a, state = -torch.rand(8, device="cuda"), normal(1, 8, 64, 128)
    return x, lambda: mamba2_scan(x, dt, a, b, c, None, None, state)


def convolution() -> Call:
    x, weight, bias, state = normal(4, 1, 6144).bfloat16(), normal(6144, 4), normal(6144), normal(4, 6144, 3)
    state = state.bfloat16()
    return x, lambda: causal_conv1d(x, weight, bias, state)


def experts(products: str = "auto") -> Call:
    """16 tokens with 4 of 8 experts in bf16: the format that every way of multiplying has."""
    x, ids = normal(16, 256).bfloat16(), torch.rand(16, 8, device="cuda").topk(4).indices
    factors, up, down = torch.rand(16, 4, device="cuda"), normal(8, 512, 256), normal(8, 256, 512)
    parts = [up.bfloat16()], [down.bfloat16()]
    return x, lambda: [routed_experts(x, ids, factors, *parts, "bf16", products=products)]


CALLS: dict[str, Callable[[], Call]] = {
    "decode": decode,
    "prefill": prefill,
    "convolution": convolution,
    "experts": experts,
    "grouped experts": lambda: experts("grouped"),
}


def main(name: str) -> None:
    """Raises AssertionError where the bits differ."""
    x, run = CALLS[name]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for factor in (1, 2):
        x.mul_(factor)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for i, (one, other) in enumerate(zip(replayed, run(), strict=True)):
            assert one.isfinite().all(), f"{name}, output {i}, inputs times {factor}: not finite"
            assert one.equal(other), (
                f"{name}, output {i}, inputs times {factor}: not the bits of a plain call"
            )


if __name__ == "__main__":
    main(sys.argv[1])

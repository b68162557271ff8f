"""Cases of CUDA alone: a call captured in a graph, replayed after its inputs changed; on another stream."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.gpu import check_experts, check_scan
from bench.gpu.cases import BFLOAT16, FLOAT16, Case, Errors, unequal
from nemoquant.ops.functional import mamba2_scan


def replayed(run: Callable[[], Sequence[Tensor]], change: Callable[[], object]) -> Errors:
    """What a replay makes of changed inputs has the bits of a plain call."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    change()
    graph.replay()
    torch.cuda.synchronize()
    kept = [tensor.clone() for tensor in out]
    return [("bits", unequal(kept, run()), 0)]


def decode() -> Errors:
    """A step with a seed in memory that changes."""
    given = check_scan.inputs("cuda", batch=4, length=1, state_dtype=FLOAT16, **check_scan.SUPER)
    seed = torch.tensor([1], device="cuda")

    def change() -> None:
        seed.fill_(7)
        given["x"].mul_(2)

    return replayed(lambda: mamba2_scan(**given, rounding="stochastic", seed=seed), change)


def segments() -> Errors:
    """A prefill long enough to be cut into segments."""
    given = check_scan.inputs("cuda", length=2111, heads=8, groups=1)
    return replayed(lambda: mamba2_scan(**given), lambda: given["x"].mul_(2))


def experts_call() -> tuple[Callable[[], Tensor], Tensor]:
    """16 tokens of an NVFP4 layer, and the ids that it reads."""
    one = check_experts.layer("cuda", "nvfp4", check_experts.Sizes(64, 6, 1024, 2688))
    ids, weights = torch.randint(0, 64, (16, 6), device="cuda"), torch.rand(16, 6, device="cuda")
    x = torch.randn(16, 1024, device="cuda").to(BFLOAT16)
    return lambda: one(x, ids, weights), ids


def experts() -> Errors:
    """Other experts are chosen between capture and replay."""
    call, ids = experts_call()
    return replayed(lambda: [call()], lambda: ids.copy_(ids.flip(0)))


def experts_on_another_stream() -> Errors:
    """The bits of a call on the current one."""
    call, _ = experts_call()
    first = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = call()
    torch.cuda.current_stream().wait_stream(stream)
    return [("bits", unequal([second], [first]), 0)]


def cases() -> Iterator[Case]:
    yield Case("graph scan decode stochastic", decode)
    yield Case("graph scan segments", segments)
    yield Case("graph experts", experts)
    yield Case("experts on another stream", experts_on_another_stream)

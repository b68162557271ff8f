"""Cases of CUDA alone: calls captured in graphs and replayed after their inputs changed, and other streams.

    python -m bench.gpu.check_graphs 'scan decode'|'scan segments'|conv|experts

captures the very first call of a process, before any other one has loaded code or set an attribute; the exit
code says whether a replay has the bits of a plain call.
"""

import argparse
import atexit
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from bench.gpu import check_experts, check_scan
from bench.gpu.cases import BFLOAT16, FLOAT16, Case, Errors, unequal
from nemoquant.ops.functional import causal_conv1d, mamba2_scan

FIRST_CALL_S = 60  # seconds for a process of its own
ROUNDS = 20  # of calls side by side on two streams


@dataclass(frozen=True)
class Replayed:
    """A call, and what changes its inputs in place."""

    run: Callable[[], Sequence[Tensor]]
    change: Callable[[], object]


def decode() -> Replayed:
    """A step with a seed in memory that changes."""
    given = check_scan.inputs("cuda", batch=4, length=1, state_dtype=FLOAT16, **check_scan.SUPER)
    seed = torch.tensor([1], device="cuda")

    def change() -> None:
        seed.fill_(7)
        given["x"].mul_(2)

    return Replayed(lambda: mamba2_scan(**given, rounding="stochastic", seed=seed), change)


def segments() -> Replayed:
    """A prefill long enough to be cut into segments."""
    given = check_scan.inputs("cuda", length=2111, heads=8, groups=1)
    return Replayed(lambda: mamba2_scan(**given), lambda: given["x"].mul_(2))


def convolution() -> Replayed:
    """A step of a batch with Super's channels."""
    x = torch.randn(8, 1, 10240, device="cuda").to(BFLOAT16)
    weight, bias = torch.randn(10240, 4, device="cuda"), torch.randn(10240, device="cuda")
    state = torch.randn(8, 10240, 3, device="cuda").to(BFLOAT16)
    return Replayed(lambda: causal_conv1d(x, weight, bias, state, BFLOAT16), lambda: x.mul_(2))


def experts() -> Replayed:
    """16 tokens of an NVFP4 layer; other experts are chosen between capture and replay."""
    one = check_experts.layer("cuda", "nvfp4", check_experts.Sizes(64, 6, 1024, 2688))
    ids, weights = torch.randint(0, 64, (16, 6), device="cuda"), torch.rand(16, 6, device="cuda")
    x = torch.randn(16, 1024, device="cuda").to(BFLOAT16)
    return Replayed(lambda: [one(x, ids, weights)], lambda: ids.copy_(ids.flip(0)))


CALLS = {"scan decode": decode, "scan segments": segments, "conv": convolution, "experts": experts}
"""By name, of which the first word is the operator's, as in the names of all cases."""


def replayed(call: Replayed, *, first: bool) -> Errors:
    """What a replay makes of changed inputs has the bits of a plain call; ``first``: no call came before."""
    if not first:
        call.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call.run()
    call.change()
    graph.replay()
    torch.cuda.synchronize()
    kept = [tensor.clone() for tensor in out]
    return [("bits", unequal(kept, call.run()), 0)]


def warm(name: str) -> Errors:
    return replayed(CALLS[name](), first=False)


@cache
def processes() -> dict[str, subprocess.Popen[str]]:
    """All of them at once: each spends seconds on importing torch. None outlives this process."""
    command, pipe = [sys.executable, "-m", "bench.gpu.check_graphs"], subprocess.PIPE
    begun = {name: subprocess.Popen([*command, name], stdout=pipe, stderr=pipe, text=True) for name in CALLS}
    for process in begun.values():
        atexit.register(process.kill)
    return begun


def first_call(name: str) -> Errors:
    """In a process of its own."""
    process = processes()[name]
    try:
        said, complained = process.communicate(timeout=FIRST_CALL_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    if not said.startswith("bits "):
        raise RuntimeError(f"exit code {process.returncode}: {complained[-250:]}")
    return [("bits", float(said.split()[1]), 0)]


def on_another_stream(name: str) -> Errors:
    """The bits of a call on the current one."""
    call = CALLS[name]()
    first = call.run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = call.run()
    torch.cuda.current_stream().wait_stream(stream)
    return [("bits", unequal(second, first), 0)]


def on_two_streams(name: str) -> Errors:
    """Two streams at once, with inputs of their own: each has the bits of a call alone, every time."""
    calls = [CALLS[name]() for _ in range(2)]
    calls[1].change()
    alone = [[tensor.clone() for tensor in call.run()] for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found: list[list[Sequence[Tensor]]] = [[], []]
    for _ in range(ROUNDS):
        for call, stream, outputs in zip(calls, streams, found, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(call.run())
    torch.cuda.synchronize()
    differ = [unequal(out, right) for outs, right in zip(found, alone, strict=True) for out in outs]
    return [("bits", sum(differ), 0)]


def cases() -> Iterator[Case]:
    """Every call in every way; the processes come last, because they take seconds."""
    ways = {
        "graph": warm,
        "another stream": on_another_stream,
        "two streams": on_two_streams,
        "graph of a first call": first_call,
    }
    for way, check in ways.items():
        for name in CALLS:
            yield Case(f"{way}: {name}", partial(check, name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("call", choices=CALLS)
    [(_, differ, _)] = replayed(CALLS[parser.parse_args().call](), first=True)
    print("bits", differ)
    raise SystemExit(bool(differ))


if __name__ == "__main__":
    main()

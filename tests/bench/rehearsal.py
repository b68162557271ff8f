"""Every row of bench_ops' wide table, run without a GPU: host build, tiny models, no timing.

python rehearsal.py LIBRARY OUT.json, run in the root of the checkout. Tensors for "cuda" are made on the CPU.
Of the calls that would be timed, one runs, once.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bench.gpu import bench_convolution, bench_experts, bench_scan, timing
from nemoquant.ops import library


class OnTheCpu(TorchFunctionMode):
    """Makes tensors for CUDA on the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if given.get("device") == "cuda":
            given = given | {"device": "cpu"}
        return func(*args, **given)


def once(calls: Sequence[Callable[[], object]], repeats: int = 1) -> float:  # noqa: ARG001
    """Stands in for ``timing.timed``; returns a microsecond."""
    calls[0]()
    return 1.0


def main() -> None:
    host = Path(sys.argv[1])
    library.use(host, "cpu")
    library.use(host, "cuda")
    torch.cuda.get_device_name = lambda: "none"
    torch.cuda.get_device_capability = lambda: (9, 0)
    torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=None)
    timing.measured_limits = lambda: timing.Limits(copy=1e12, products=1e14, empty=1.0)
    bench_experts.narrow_rate = lambda kind: 2e14
    for module in (bench_scan, bench_convolution, bench_experts):
        module.timed = once
    bench_scan.MODELS = {"Super": (4, 16, 2, 16), "Nano": (2, 16, 1, 16)}
    bench_scan.WIDE_LENGTHS = (2, 5, 33, 64, 65, 130)
    bench_convolution.MODELS = {"Super": 8, "Nano": 4}
    bench_convolution.WIDE_SHAPES = ((1, 1), (8, 1), (1, 70), (2, 5))
    bench_experts.MODELS = {"Super": (4, 2, 32, 32), "Nano": (4, 1, 32, 64)}
    bench_experts.WIDE_TOKENS = (1, 5)
    table = timing.Table(Path(sys.argv[2]), seconds=600)
    with OnTheCpu():
        for module in (bench_scan, bench_convolution, bench_experts):
            module.rows(table, wide=True)


if __name__ == "__main__":
    main()

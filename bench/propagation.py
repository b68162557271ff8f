"""The command line with other targets than it has, for what each part of them wins: see `bench.methods`.

    python -m bench.propagation PARTS RIDGE quantize SOURCE OUT --fmt nvfp4-full --propagate quantized

PARTS of `propagate: quantized` are `both`, `inner` (weights that write the stream are solved as the others,
without what the stream lacks), `writers` (only those have a target) and `none`: layers see the quantized
stream, and weights are solved for themselves.
"""

import sys
from typing import Any

from nemoquant.cli import main
from nemoquant.solve import layer

PARTS = ("both", "inner", "writers", "none")


def change(parts: str, ridge: float) -> None:
    """Change how targets are made in this process."""
    layer.RIDGE = ridge
    made, writers = layer.LayerSolver._target, layer.WRITERS

    def target(self: layer.LayerSolver, row: Any, moments: Any, tokens: int) -> Any:
        if parts == "none" or (parts == "writers" and row.role not in writers):
            return lambda weight: weight
        return made(self, row, moments, tokens)

    if parts == "inner":
        layer.WRITERS = frozenset()
    layer.LayerSolver._target = target  # type: ignore[method-assign]


if __name__ == "__main__":
    change(sys.argv[1], float(sys.argv[2]))
    del sys.argv[1:3]
    main()

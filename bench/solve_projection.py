"""Estimates of solving for Super and Nano: amounts over rates, as `quantize` makes them.

    python -m bench.solve_projection [--rows 32] [--seq-len 512] [--threads 2] [--disk 0.5] [--busy]

No weights are read: plans come from tests/configs. Rates are this machine's; `--disk` are GB/s of writing,
`--busy` counts processor time, where other programs run beside this one. With a GPU, rates of an H100 are
assumed (run/solve_time.py), and the host has the same threads. Passes of the quantized stream and of the
loss's gradients are not in it. Beside the seconds stand the memory that the largest step takes, and the disk
for inputs and solved weights that wait.
"""

import argparse
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from bench.measure import machine
from nemoquant import api
from nemoquant.calibrate.batch import Batch
from nemoquant.planning.solving import OUTPUTS, PROPAGATE
from nemoquant.run.solve_speeds import solve_speeds
from nemoquant.run.solve_time import solve_seconds
from nemoquant.run.speeds import Speeds
from nemoquant.solve.memory import solve_bytes, waiting_bytes
from nemoquant.units import duration, size

CONFIGS = Path(__file__).resolve().parents[1] / "tests/configs"
MODELS = ("super-120b-a12b", "nano-30b-a3b")
VARIANTS: list[tuple[str, dict[str, Any]]] = [  # a preset and what is changed of it
    *(("fp8", {"propagate": stream}) for stream in PROPAGATE),
    *((preset, {"descent": sweeps}) for preset in ("nvfp4", "nvfp4-full") for sweeps in (0, 1, 2)),
    *(("nvfp4-full-w4a16", {"descent": 1, "outputs": outputs}) for outputs in OUTPUTS),
]
HEADER = (
    "| model | sweeps | stream | outputs | solving | M weights/s | with an H100 | memory | "
    "disk while it runs |\n"
    "|---|---:|---|---|---:|---:|---:|---:|---:|"
)
NOTHING = Speeds(read=1, write=1, sync=1, hash=1, encode={}, product=1, expert=1, mixer=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--disk", type=float, default=0.5)
    parser.add_argument("--busy", action="store_true")
    args = parser.parse_args()
    print(f"{machine()}, {args.rows} rows of {args.seq_len} tokens, {args.threads} threads\n\n{HEADER}")
    for model, (preset, changed) in product(MODELS, VARIANTS):
        plan = api.plan(CONFIGS / f"{model}.json", preset, **changed)
        solve = plan.recipe.solve
        rates = solve_speeds(plan, args.threads, busy=args.busy)
        speeds = replace(NOTHING, sync=args.disk * 1e9, solve=rates)
        batch = Batch(args.rows, args.seq_len, "bfloat16")
        seconds, gpu = (
            solve_seconds(plan, batch, speeds, args.threads, device) for device in ("cpu", "cuda")
        )
        weights = sum(row.elements for row in plan.quantized if row.solved)
        _, memory = solve_bytes(plan, args.threads)
        print(
            f"| {model}, `{preset}` | {solve.descent} | {solve.propagate} | {solve.outputs} | "
            f"{duration(seconds)} | {weights / seconds / 1e6:.1f} | {duration(gpu)} | {size(memory)} | "
            f"{size(waiting_bytes(plan, batch))} |"
        )


if __name__ == "__main__":
    main()

"""Estimates of solving for Super and Nano: amounts over rates of this machine, as `quantize` makes them.

    python -m bench.solve_projection [--rows 32] [--seq-len 512] [--threads 2]

No weights are read: plans come from tests/configs. Beside the seconds stand the memory that the largest step
takes, and the disk for inputs and solved weights that wait.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from bench.measure import machine
from nemoquant import api
from nemoquant.calibrate.batch import Batch
from nemoquant.run.solve_speeds import solve_speeds
from nemoquant.run.solve_time import solve_seconds
from nemoquant.run.speeds import Speeds
from nemoquant.solve.memory import input_bytes, solve_bytes, solved_bytes
from nemoquant.units import duration, size

CONFIGS = Path(__file__).resolve().parents[1] / "tests/configs"
MODELS = ("super-120b-a12b", "nano-30b-a3b")
NOTHING = Speeds(read=1, write=1, sync=1, hash=1, encode={}, product=1, expert=1, mixer=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print(f"{machine()}, {args.rows} rows of {args.seq_len} tokens, {args.threads} threads")
    for model in MODELS:
        for descent in (0, 1):
            plan = api.plan(CONFIGS / f"{model}.json", "nvfp4", descent=descent)
            speeds = replace(NOTHING, sync=args.disk, solve=solve_speeds(plan, args.threads))
            batch = Batch(args.rows, args.seq_len, "bfloat16")
            seconds = solve_seconds(plan, batch, speeds, args.threads)
            weights = sum(row.elements for row in plan.quantized if row.solved)
            module, memory = solve_bytes(plan, args.threads)
            print(
                f"{model}, nvfp4, descent {descent}: {duration(seconds)} for {weights / 1e9:.1f} G weights "
                f"({weights / seconds / 1e6:.1f} M/s); {size(memory)} of memory ({module}), "
                f"{size(input_bytes(plan, batch) + solved_bytes(plan))} of disk"
            )


if __name__ == "__main__":
    main()

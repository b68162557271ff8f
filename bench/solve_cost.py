"""What solving costs, and whether the estimate knew: whole runs of `quantize` against `plan --estimate`.

    python -m bench.solve_cost --work DIR [--models demo nano mid super]
                               [--variants gptq:1 gptq:1:quantized hess:0 mse max] [--recipe nvfp4]
                               [--rows 32] [--seq-len 512] [--threads N] [--json FILE]

DIR gets `mid` (the checkpoint of `bench.peers`) and `super`, a MoE layer with 64 of Super's 512 experts, at
their true sizes and with as many tokens each; 6 GB at the most. A variant is a method, its sweeps, what is
propagated and how errors of outputs count (gptq:1:quantized:loss). Every figure of a run is of the whole
process, from the start of the interpreter to the last byte, verify included; the estimate is of the same
stages. Solving's own share is the difference of a run's processor time from that of `max`, which is run too.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from bench.measure import Cost, machine, run
from nemoquant.formats import SolvedMethod

ROOT = Path(__file__).resolve().parents[1]
TRAINED = {"demo": ROOT / "calib/demo_model", "nano": ROOT / "calib/nano_model"}
MADE = {"mid": ["--size", "mid"], "super": ["--size", "super", "--experts", "64"]}
SOLVED = get_args(SolvedMethod)
VARIANTS = (
    "max",
    "mse",
    "hess:0",
    "hess:1",
    "gptq:0",
    "gptq:1",
    "gptq:2",
    "gptq:1:source",
    "gptq:1:quantized",
    "gptq:1:source:loss",
)


@dataclass(frozen=True)
class Result:
    """A run and what was expected of it; ``weights`` are those that are solved for."""

    model: str
    variant: str
    weights: int
    expected: dict[str, Any]
    cost: Cost

    def json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "variant": self.variant,
            "weights": self.weights,
            "expected": self.expected,
            "cost": self.cost.json(),
        }


def checkpoint(work: Path, model: str) -> Path:
    """Make it in a separate process, so that this one stays small."""
    if model in TRAINED:
        return TRAINED[model]
    folder = work / model
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "bench.checkpoints", str(folder), *MADE[model]], check=True)
    return folder


def text(work: Path, source: Path, count: int, length: int) -> list[str]:
    """The option for calibration rows; a checkpoint without a tokenizer gets random tokens."""
    if (source / "tokenizer.json").exists():
        return []
    path = work / f"{source.name}-{count}-{length}.npy"
    if not path.exists():
        vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
        make = (
            "import numpy, sys; count, length, top = map(int, sys.argv[2:]); "
            "numpy.save(sys.argv[1], numpy.random.default_rng(0).integers(0, top, (count, length)))"
        )
        subprocess.run(
            [sys.executable, "-c", make, str(path), str(count), str(length), str(vocabulary)], check=True
        )
    return ["--calib", str(path)]


def measured(args: argparse.Namespace, model: str, variant: str) -> Result:
    source, out = checkpoint(args.work, model), args.work / "out"
    flags = zip(("--method", "--descent", "--propagate", "--outputs"), variant.split(":"), strict=False)
    options = ["--recipe", args.recipe, *(word for flag in flags for word in flag)]
    options += ["--rows", str(args.rows), "--seq-len", str(args.seq_len)]
    options += ["--threads", str(args.threads)] if args.threads else []
    for folder in (out, out.with_name("out.partial")):
        shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    asked = subprocess.run(
        [
            sys.executable,
            "-m",
            "nemoquant",
            "plan",
            str(source),
            *options,
            "--out",
            str(out),
            "--estimate",
            "--json",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    plan = json.loads(asked.stdout)
    log = args.work / f"{model}-{variant.replace(':', '-')}.log"
    command = [sys.executable, "-m", "nemoquant", "quantize", str(source), str(out), *options]
    command += text(args.work, source, args.rows, args.seq_len)
    cost = run(command, log, disk=(out, out.with_name("out.partial")))
    shutil.rmtree(out)
    solved = sum(math.prod(row["shape"]) for row in plan["rows"] if row["scale_method"] in SOLVED)
    return Result(model, variant, solved, plan["estimate"], cost)


HEADER = (
    "| model | method | wall, said | measured | processor time | memory, said | measured | disk, said | "
    "measured | M weights/s |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def line(result: Result, plain: dict[str, Result]) -> str:
    e, c = result.expected, result.cost
    before = plain.get(result.model)
    solving = c.cpu - before.cost.cpu if before else 0.0
    speed = f"{result.weights / solving / 1e6:.2f}" if result.weights and solving > 0 else ""
    return (
        f"| {result.model} | {result.variant} | {e['seconds']:.0f} s | {c.wall:.0f} s | {c.cpu:.0f} s | "
        f"{e['memory'] / 1e9:.2f} GB | {c.peak:.2f} GB | {e['disk'] / 1e9:.2f} GB | {c.disk:.2f} GB | "
        f"{speed} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=[*TRAINED, *MADE], default=[*TRAINED, *MADE])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--recipe", default="nvfp4")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}, {time.strftime('%Y-%m-%d')}, {args.recipe}\n\n{HEADER}", flush=True)
    results, plain = [], {}
    for model in args.models:
        for variant in sorted(args.variants, key=VARIANTS.index):
            result = measured(args, model, variant)
            results.append(result)
            if variant == "max":
                plain[model] = result
            print(line(result, plain), flush=True)
    if args.json:
        args.json.write_text(json.dumps([result.json() for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()

"""nemoquant and its peers on the same checkpoint, in turn, several rounds: medians and ratios in Markdown.

    python -m bench.peers --work DIR --modelopt PYTHON --llmcompressor PYTHON [--rounds 3] [--jobs fp8 nvfp4
    ...]

PYTHON is the interpreter of an environment with that peer; without one, its jobs are measured for nemoquant
alone. Measurements stay in DIR/peers.json: run the same command again to continue; `--fresh` starts again
from nothing. Every job is a whole process, from the start of the interpreter to the last byte written,
nemoquant's verify included.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.measure import machine, rounds, run
from nemoquant.planning.recipe import presets

RECIPES = Path(__file__).parent / "recipes"
PEERS = Path(__file__).parent / "peer"

# job: (nemoquant's recipe, calibrated, peer, the peer's argument, description)
JOBS: dict[str, tuple[str, bool, str, str, str]] = {
    "fp8": ("fp8", True, "modelopt", "MAMBA_MOE_FP8_AGGRESSIVE_CFG", "FP8, calibrated on 4 x 512 tokens"),
    "nvfp4": (
        "nvfp4",
        True,
        "modelopt",
        "MAMBA_MOE_NVFP4_CONSERVATIVE_CFG",
        "NVFP4 (`max`), calibrated on 4 x 512 tokens",
    ),
    "nvfp4-mse": (
        str(RECIPES / "nvfp4-mse.yaml"),
        True,
        "ours",
        "nvfp4",
        "NVFP4 (`mse`), against our own `max`",
    ),
    "w4a16": ("nvfp4-w4a16", False, "llmcompressor", "NVFP4A16", "NVFP4 W4A16, no calibration"),
    "fp8-weights": (
        "fp8",
        False,
        "llmcompressor",
        "FP8_DYNAMIC",
        "FP8 weights, no calibration (ours: scales of an earlier run)",
    ),
}


def ours(work: Path, recipe: str, calibrated: bool, out: Path) -> list[str]:
    command = [sys.executable, "-m", "nemoquant", "quantize", str(work / "mid"), str(out), "--recipe", recipe]
    if recipe in presets():
        command += ["--method", "max"]  # what the peers compute
    if calibrated:
        return [*command, "--calib", str(work / "rows.npy"), "--rows", "4", "--seq-len", "512"]
    return [*command, "--scales", str(work / "scales.json")] if recipe == "fp8" else command


def theirs(work: Path, python: str, peer: str, argument: str, out: Path) -> list[str]:
    rows = [str(work / "rows.npy")] if peer == "modelopt" else []
    return [python, str(PEERS / f"run_{peer}.py"), str(work / "mid"), argument, *rows, str(out)]


def prepare(work: Path) -> None:
    """Make the checkpoint and the rows in separate processes, so that this one stays small."""
    if (work / "mid").exists() and (work / "rows.npy").exists():
        return
    shutil.rmtree(work / "mid", ignore_errors=True)
    subprocess.run(
        [sys.executable, "-m", "bench.checkpoints", str(work / "mid")], check=True, stdout=subprocess.DEVNULL
    )
    rows = (
        "import numpy, sys; numpy.save(sys.argv[1], numpy.random.default_rng(0).integers(0, 8192, (4, 512)))"
    )
    subprocess.run([sys.executable, "-c", rows, str(work / "rows.npy")], check=True)


def prepare_scales(work: Path, out: Path) -> None:
    """Copy the scales of an FP8 run, for runs that calibrate nothing."""
    if not (work / "scales.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        run(ours(work, "fp8", True, out), work / "scales.log")
        shutil.copy(out / "nemoquant_scales.json", work / "scales.json")


def commands(args: argparse.Namespace, job: str, out: Path) -> dict[str, list[str]]:
    recipe, calibrated, peer, argument, _ = JOBS[job]
    jobs = {"nemoquant": ours(args.work, recipe, calibrated, out)}
    if peer == "ours":
        jobs["peer"] = ours(args.work, argument, calibrated, out)
    elif getattr(args, peer):
        jobs["peer"] = theirs(args.work, getattr(args, peer), peer, argument, out)
    return jobs


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Medians of all rounds, as a Markdown table."""
    lines = [
        "| job | rounds | nemoquant | peer | ratio | nemoquant's CPU time | peer's | peak memory, nemoquant "
        "| peer | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for job, (*_, what) in JOBS.items():
        mine, peer = results.get(f"{job} nemoquant", []), results.get(f"{job} peer", [])
        if not mine:
            continue
        a = {key: median(cost[key] for cost in mine) for key in mine[0]}
        cells = [what, str(len(mine)), f"{a['wall']:.1f} s"]
        if peer:
            b = {key: median(cost[key] for cost in peer) for key in peer[0]}
            cells += [
                f"{b['wall']:.1f} s",
                f"{b['wall'] / a['wall']:.2f}",
                f"{a['cpu']:.1f} s",
                f"{b['cpu']:.1f} s",
            ]
            cells += [f"{a['peak']:.2f} GB", f"{b['peak']:.2f} GB", f"{a['peak'] / b['peak']:.2f}"]
        else:
            cells += ["", "", f"{a['cpu']:.1f} s", "", f"{a['peak']:.2f} GB", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the checkpoint, outputs and results; needs 5 GB"
    )
    parser.add_argument("--modelopt", metavar="PYTHON")
    parser.add_argument("--llmcompressor", metavar="PYTHON")
    parser.add_argument("--rounds", type=rounds, default=3)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args.work)
    store = args.work / "peers.json"
    results: dict[str, list[dict[str, Any]]] = (
        json.loads(store.read_text()) if store.exists() and not args.fresh else {}
    )
    for number in range(args.rounds):
        for job in args.jobs:
            out = args.work / "out"
            if job == "fp8-weights":
                prepare_scales(args.work, out)
            for who, command in commands(args, job, out).items():
                done = results.setdefault(f"{job} {who}", [])
                if len(done) > number:
                    continue
                for folder in (out, out.with_name("out.partial")):
                    shutil.rmtree(folder, ignore_errors=True)
                os.sync()  # this run must not wait for the writes of the last one
                cost = run(command, args.work / f"{job}-{who}.log")
                done.append(cost.json())
                store.write_text(json.dumps(results, indent=1))
                print(
                    f"round {number + 1}, {job}, {who}: {cost.wall:.1f} s, {cost.peak:.2f} GB",
                    file=sys.stderr,
                    flush=True,
                )
                shutil.rmtree(out, ignore_errors=True)
    print(f"{machine()}, {time.strftime('%Y-%m-%d')}\n\n{table(results)}")


if __name__ == "__main__":
    main()

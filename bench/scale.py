"""Time and memory by model size: packs 1, 2 and 4 MoE layers as large as Nemotron 3 Super's, 5.6 GB each.

    python -m bench.scale --work DIR [--layers 1 2 4] [--recipe nvfp4-w4a16]

Each size is made, quantized (with verify) and removed before the next; the largest needs 30 GB in DIR.
Results stay in DIR/scale.json: run again to continue; `--fresh` starts again from nothing. A line is fitted
by least squares and extended to the whole of Super, which has as many bytes as 44 such layers: 247 GB.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.measure import machine, run
from bench.pipeline import plain

SUPER_BYTES = 247_222_108_160


def measure(work: Path, layers: int, recipe: str) -> dict[str, float]:
    source, out = work / f"super-{layers}", work / f"super-{layers}-out"
    for folder in (source, out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(folder, ignore_errors=True)
    maker = [
        sys.executable,
        "-m",
        "bench.checkpoints",
        str(source),
        "--size",
        "super",
        "--layers",
        str(layers),
    ]
    command = [sys.executable, "-m", "nemoquant", "quantize", str(source), str(out), "--recipe", recipe]
    method = plain(recipe)
    command += ["--method", method] if method else []
    try:
        subprocess.run(maker, check=True, stdout=subprocess.DEVNULL)
        os.sync()
        size = sum(file.stat().st_size for file in source.iterdir())
        cost = run(command, work / f"scale-{layers}.log", every=0.02)
        return cost.json() | {"bytes": size, "bytes_out": sum(file.stat().st_size for file in out.iterdir())}
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(start, slope) of the least-squares line through two or more points."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x, slope


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| layers | source | written | wall | CPU | peak RssAnon | ru_maxrss |",
        "|---|---|---|---|---|---|---|",
    ]
    sizes = sorted(results, key=int)
    for size in sizes:
        r = results[size]
        lines.append(
            f"| {size} | {r['bytes'] / 1e9:.1f} GB | {r['bytes_out'] / 1e9:.1f} GB | {r['wall']:.1f} s | "
            f"{r['cpu']:.1f} s | "
            f"{r['peak_anonymous']:.2f} GB | {r['peak']:.2f} GB |"
        )
    if len(sizes) > 1:
        lines.append("")
        for key, unit in (("wall", "s"), ("cpu", "s"), ("peak_anonymous", "GB"), ("peak", "GB")):
            start, slope = fit([(results[size]["bytes"] / 1e9, results[size][key]) for size in sizes])
            whole = start + slope * SUPER_BYTES / 1e9
            lines.append(
                f"- {key}: {start:.2f} + {slope:.4f} x GB of source, in {unit}; Super, "
                f"{SUPER_BYTES / 1e9:.1f} GB: {whole:.4g} {unit}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--recipe", default="nvfp4-w4a16")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    store = args.work / "scale.json"
    results: dict[str, dict[str, Any]] = (
        json.loads(store.read_text()) if store.exists() and not args.fresh else {}
    )
    for layers in args.layers:
        if str(layers) not in results:
            results[str(layers)] = measure(args.work, layers, args.recipe)
            store.write_text(json.dumps(results, indent=1))
            print(f"{layers} layers: {results[str(layers)]['wall']:.1f} s", file=sys.stderr, flush=True)
    print(f"{machine()}, {time.strftime('%Y-%m-%d')}, recipe {args.recipe}\n\n{table(results)}")


if __name__ == "__main__":
    main()

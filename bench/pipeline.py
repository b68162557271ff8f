"""Whether packing waits only for its slowest step: a packing run, and read, encode, hash and write alone.

    python -m bench.pipeline --work DIR [--rounds 3] [--recipe nvfp4-w4a16]

Uses (or makes) DIR/mid, the checkpoint of `bench.peers`, which is in the page cache for all of them. The
run's time is that of `quantize` for its stage `pack`: hashing included, verify not. Encoding has as many
threads as the run; the others have one.
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Literal

from bench.measure import machine, rounds, run
from bench.peers import prepare
from nemoquant.formats import Method
from nemoquant.planning.recipe import presets

BUFFER = 8 << 20


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read(folder: Path) -> None:
    buffer = bytearray(BUFFER)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def encode(folder: Path, recipe: str | Path, threads: int, device: Literal["cpu", "cuda"] = "cpu") -> None:
    """Encode every quantized weight; results are dropped."""
    import nemoquant
    from nemoquant.pack.encode import pack_weights
    from nemoquant.sources.source import open_weights

    resolved = nemoquant.plan(folder, recipe, method=plain(recipe))
    checkpoint = open_weights(folder, "a benchmark needs the weights").checkpoint
    assert checkpoint is not None
    with checkpoint, ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda row: bool(pack_weights(checkpoint, [row], device)), resolved.quantized))


def plain(recipe: str | Path) -> Method | None:
    """Method max for a preset: codes that calibration solves for would leave packing nothing to encode."""
    return "max" if str(recipe) in presets() else None


def write(path: Path, size: int, data: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-size // BUFFER)):
            file.write(data)


def digest(size: int) -> None:
    data, sha = bytes(BUFFER), hashlib.sha256()
    for _ in range(-(-size // BUFFER)):
        sha.update(data)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=rounds, default=3)
    parser.add_argument("--recipe", default="nvfp4-w4a16", help="one that needs no calibration")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args.work)
    source, out, log = args.work / "mid", args.work / "out", args.work / "pipeline.log"
    threads = os.cpu_count() or 1
    data = os.urandom(BUFFER)
    times: dict[str, list[float]] = {}
    read(source)
    encode(source, args.recipe, threads)  # compiles or loads the kernels
    for _ in range(args.rounds):
        for folder in (out, out.with_name("out.partial")):
            shutil.rmtree(folder, ignore_errors=True)
        os.sync()
        command = [sys.executable, "-m", "nemoquant", "quantize", str(source), str(out)]
        method = plain(args.recipe)
        run([*command, "--recipe", args.recipe, *(["--method", method] if method else [])], log)
        match = re.search(r"pack: done in ([\d.]+) (ms|s|min)", log.read_text())
        assert match is not None, f"{log} does not say how long packing took"
        size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        alone = {
            "read": lambda: read(source),
            "encode": lambda: encode(source, args.recipe, threads),
            "hash": lambda size=size: digest(size),
            "write": lambda size=size: write(args.work / "written", size, data),
        }
        times.setdefault("pack", []).append(float(match[1]) * {"ms": 0.001, "s": 1, "min": 60}[match[2]])
        for name, work in alone.items():
            os.sync()
            times.setdefault(name, []).append(seconds(work))
        (args.work / "written").unlink()
    shutil.rmtree(out, ignore_errors=True)
    middle = {name: median(values) for name, values in times.items()}
    slowest = max(middle[name] for name in middle if name != "pack")
    print(f"{machine()}, {time.strftime('%Y-%m-%d')}, recipe {args.recipe}, medians of {args.rounds}\n")
    print(f"| {' | '.join(middle)} | pack / slowest alone |\n|{'---|' * (len(middle) + 1)}")
    print(f"| {' | '.join(f'{value:.2f} s' for value in middle.values())} | {middle['pack'] / slowest:.2f} |")


if __name__ == "__main__":
    main()

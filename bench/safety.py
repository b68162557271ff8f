"""What care costs: hashes of the source, and the count of what weights lose to their scale, as shares of a
run's processor time; fsync of its wall time. (The sha256 of what is written is not counted: it is part of the
output.)

python -m bench.checkpoints SRC            1.6 GB
python -m bench.safety SRC [--rounds 3] [--folder FOLDER]

Each call is timed within the run: a difference between two runs would be smaller than what they differ by
anyway.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from bench.measure import machine, rounds

JOBS = {
    "packing alone (nvfp4-w4a16)": ["--recipe", "nvfp4-w4a16", "--method", "max"],
    "calibrated on 8 rows of 256 tokens (fp8)": ["--fmt", "fp8", "--method", "max", "--calib", "ROWS"],
}
TIMED = """
import json, os, resource, sys, threading, time
from nemoquant.checkpoint import identity
from nemoquant.pack import encode, verify

spent, lock = {"hashes": 0.0, "counts": 0.0, "fsync": 0.0}, threading.Lock()

def timed(name, clock, function):
    def call(*arguments):
        begin = clock()
        result = function(*arguments)
        with lock:
            spent[name] += clock() - begin
        return result
    return call

for module in (encode, verify):  # each has the name for itself
    module.piece_hash = timed("hashes", time.thread_time, module.piece_hash)
encode.lost_to_scale = timed("counts", time.thread_time, encode.lost_to_scale)
identity.hash_unit = timed("hashes", time.thread_time, identity.hash_unit)
os.fsync = timed("fsync", time.monotonic, os.fsync)
begin, results = time.monotonic(), sys.argv.pop(1)
from nemoquant.cli import main
main(standalone_mode=False)
usage = resource.getrusage(resource.RUSAGE_SELF)
found = spent | {"wall": time.monotonic() - begin, "cpu": usage.ru_utime + usage.ru_stime}
with open(results, "w") as f:
    json.dump(found, f)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--rounds", type=rounds, default=3)
    parser.add_argument("--folder", type=Path, help="for the outputs; a temporary folder where none is given")
    args = parser.parse_args()
    print(f"{machine()}, {time.strftime('%Y-%m-%d')}, medians of {args.rounds}\n")
    print(
        "| job | wall | processor | hashes, of processor time | lost values, the same | fsync, of wall time |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        vocabulary = json.loads((args.source / "config.json").read_text())["vocab_size"]
        np.save(folder / "rows.npy", np.random.default_rng(0).integers(3, vocabulary, (8, 256)))
        for job, options in JOBS.items():
            given = [str(folder / "rows.npy") if option == "ROWS" else option for option in options]
            found = [_run(args.source, folder, given) for _ in range(args.rounds + 1)][1:]
            wall, cpu = (median(run[key] for run in found) for key in ("wall", "cpu"))
            hashes, counts = (median(run[key] / run["cpu"] for run in found) for key in ("hashes", "counts"))
            fsync = median(run["fsync"] / run["wall"] for run in found)
            print(
                f"| {job} | {wall:.2f} s | {cpu:.2f} s | {hashes:.1%} | {counts:.1%} | {fsync:.1%} |",
                flush=True,
            )


def _run(source: Path, folder: Path, options: list[str]) -> dict[str, float]:
    out, results = folder / "out", folder / "results.json"
    command = [sys.executable, "-c", TIMED, results, "quantize", source, out, *options]
    subprocess.run(command, check=True, capture_output=True)
    shutil.rmtree(out)
    found: dict[str, float] = json.loads(results.read_text())
    return found


if __name__ == "__main__":
    main()

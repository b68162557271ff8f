"""What care costs: hashes of the source, and waiting for the disk, switched off one at a time.

python -m bench.checkpoints SRC            1.6 GB
python -m bench.safety SRC [--rounds 5] [--folder FOLDER]

For each job: the whole run, one without the hashes of the source's units, and one without fsync, in turn.
Ratios are those of one round, their median is shown with the least and the most.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from bench.measure import machine, run

JOBS = {
    "packing alone, weights of the experts (nvfp4-w4a16)": ["quantize", "--recipe", "nvfp4-w4a16"],
    "calibrated on 8 rows of 256 tokens (fp8)": ["quantize", "--fmt", "fp8", "--calib", "ROWS"],
}
WITHOUT = {
    "nothing": "",
    "hashes": """
from nemoquant.checkpoint import identity
from nemoquant.pack import encode
encode.piece_hash = identity.piece_hash = lambda data: bytes(16)
identity.hash_unit = lambda *arguments: "0" * 32
""",
    "fsync": "import os; os.fsync = os.fdatasync = lambda handle: None\n",
}


def seconds(source: Path, out: Path, job: list[str], without: str, rows: Path, log: Path) -> float:
    verb, *options = job
    code = WITHOUT[without] + "from nemoquant.cli import main\nmain()"
    given = [str(rows) if option == "ROWS" else option for option in options]
    cost = run([sys.executable, "-c", code, verb, str(source), str(out), *given], log)
    shutil.rmtree(out)
    return cost.wall


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="for the outputs; a temporary folder where none is given")
    args = parser.parse_args()
    print(f"{machine()}, {time.strftime('%Y-%m-%d')}, {args.rounds} rounds, seconds and ratios\n")
    print("| job | whole | hashes cost | fsync costs |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        vocabulary = json.loads((args.source / "config.json").read_text())["vocab_size"]
        rows = folder / "rows.npy"
        np.save(rows, np.random.default_rng(0).integers(3, vocabulary, (8, 256)))
        for job, command in JOBS.items():
            found: dict[str, list[float]] = {without: [] for without in WITHOUT}
            for _ in range(args.rounds + 1):
                for without, times in found.items():
                    times.append(seconds(args.source, folder / "out", command, without, rows, folder / "log"))
            whole = found["nothing"][1:]  # the first reads files from disk
            shares = [
                [a / b - 1 for a, b in zip(whole, found[without][1:], strict=True)]
                for without in ("hashes", "fsync")
            ]
            cells = [f"{median(s):+.1%} ({min(s):+.1%} to {max(s):+.1%})" for s in shares]
            print(f"| {job} | {median(whole):.2f} s | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

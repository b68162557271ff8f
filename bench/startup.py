"""Time that `nemoquant --help` takes to start, compared with an interpreter that does nothing.

python -m bench.startup [--rounds 20]
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from bench.measure import machine, rounds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=rounds, default=20)
    args = parser.parse_args()
    tool = shutil.which("nemoquant", path=str(Path(sys.executable).parent)) or "nemoquant"
    commands = {"python -c pass": [sys.executable, "-c", "pass"], "nemoquant --help": [tool, "--help"]}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.rounds + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - start)
    medians = {name: median(values[1:]) for name, values in times.items()}  # the first reads files from disk
    print(f"{machine()}, {time.strftime('%Y-%m-%d')}, medians of {args.rounds}\n")
    print(f"| {' | '.join(medians)} | more |\n|---|---|---|")
    print(
        f"| {' | '.join(f'{value:.3f} s' for value in medians.values())} | "
        f"{medians['nemoquant --help'] - medians['python -c pass']:.3f} s |"
    )


if __name__ == "__main__":
    main()

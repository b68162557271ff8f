"""``python -m tests.faults``: see ``tests/faults/__init__.py``."""

import argparse
import dataclasses
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # tests/, for `support`

from . import watch  # noqa: E402
from .cases import table  # noqa: E402

SUITES = ("seen", "kills", "disk", "power", "pairs", "flips", "sources", "promises", "parsing")
CHILD = "NEMOQUANT_FAULTS_FOLDER"  # environment variable: this process is the watched one


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--long", action="store_true", help="every case, instead of a sample")
    parser.add_argument(
        "--only",
        action="append",
        choices=SUITES,
        metavar="NAME",
        help=f"one of {', '.join(SUITES)}; repeatable",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--minutes", type=float, default=1e9, help="end each suite after so long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every case there")
    return parser.parse_args()


def watched() -> int:
    """Start this program again under the library of ``watch.c``, with one thread; its exit code."""
    with tempfile.TemporaryDirectory(prefix="nemoquant-faults-") as folder:
        library = watch.compiled(Path(folder))
        environment = os.environ | {CHILD: folder, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.faults", *sys.argv[1:]]
        return subprocess.run(command, env=environment, check=False).returncode


def main() -> int:
    """Run the suites; 1 where one has a problem."""
    chosen = options()
    if CHILD not in os.environ:
        return watched()
    from .world import World

    world, cases, took = World(Path(os.environ[CHILD]) / "world"), [], {}
    for name in chosen.only or SUITES:
        began, before = time.monotonic(), len(cases)
        suite = importlib.import_module(f".{name}", __package__)
        for case in suite.run(world, random.Random(f"{name} {chosen.seed}"), chosen.long):
            cases.append(case)
            if case.problems:
                print(
                    f"{case.suite}, {case.scene}, {case.fault}: {case.problems[0]}",
                    file=sys.stderr,
                    flush=True,
                )
            if time.monotonic() - began > 60 * chosen.minutes:
                break
        took[name] = round(time.monotonic() - began, 1)
        print(f"{name}: {len(cases) - before:,} cases in {took[name]:.0f} s", file=sys.stderr, flush=True)
    if chosen.json:
        data = {"seed": chosen.seed, "long": chosen.long, "seconds": took}
        chosen.json.write_text(
            json.dumps(data | {"cases": [dataclasses.asdict(case) for case in cases]}, indent=1) + "\n"
        )
    print(table(cases))
    return int(any(case.problems for case in cases))


if __name__ == "__main__":
    sys.exit(main())

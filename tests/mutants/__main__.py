"""Puts each fault of mutants.py into a copy of the checkout, builds it, and runs the tests that must fail.

    python -m tests.mutants                     all of them: minutes
    python -m tests.mutants stages decay        those whose name has one of these words
    python -m tests.mutants --json FILE         the result too, as JSON

A mutant is caught when a test fails or its process dies, and survives when all pass; what does not compile,
or fails without the fault too, is an error of the list. Needs what `nemoquant plugins build --host` needs.
The exit code is 1 if one is not caught.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
DEATHS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)  # by the fault; others come from outside


def copy_of_the_checkout(to: Path) -> None:
    """Files that git knows, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def run(tree: Path, work: Path, mutant: Mutant) -> tuple[str, str]:
    """``caught``, ``survived`` or ``error``, and the first line that says why."""
    tests = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/plugins/test_{mutant.tests}.py"]
    only = ["-k", mutant.only] if mutant.only else []
    done = subprocess.run(
        [sys.executable, *tests, *only],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree), "TMPDIR": str(work), "NQ_HOST_FOLDER": str(work / "host")},
        capture_output=True,
        text=True,
        check=False,
    )
    said = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    if done.returncode == 0:
        return "survived", ""
    if -done.returncode in DEATHS:
        return "caught", f"the process died of signal {-done.returncode}"
    if done.returncode == 1 and said.startswith("FAILED"):
        return "caught", said.removeprefix("FAILED tests/plugins/").split(" - ")[0]
    return "error", said or (done.stdout + done.stderr)[-400:]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.words or any(word in m.name for word in options.words)]
    if not chosen:
        parser.error(f"no mutant has {' or '.join(options.words)} in its name")
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        tree, work = Path(temporary) / "checkout", Path(temporary) / "work"
        work.mkdir()
        copy_of_the_checkout(tree)
        for mutant in {(mutant.tests, mutant.only): mutant for mutant in chosen}.values():
            verdict, why = run(tree, work, mutant)
            if verdict != "survived":
                sys.exit(
                    f"tests/plugins/test_{mutant.tests}.py -k '{mutant.only}' fails without a fault: {why}"
                )
        for mutant in chosen:
            path, began = tree / mutant.file, time.monotonic()
            whole = path.read_text(encoding="utf-8")
            path.write_text(whole.replace(mutant.old, mutant.new), encoding="utf-8")
            verdict, why = run(tree, work, mutant)
            path.write_text(whole, encoding="utf-8")
            results.append({"mutant": mutant.name, "verdict": verdict, "by": why})
            print(f"{verdict:9}{time.monotonic() - began:6.0f} s  {mutant.name}  {why}", flush=True)
    bad = [row for row in results if row["verdict"] != "caught"]
    print(f"{len(results)} mutants, {len(results) - len(bad)} caught")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()

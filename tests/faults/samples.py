"""The seeded samples for the tests: some suites in one process, as ``python -m tests.faults`` runs them."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.places import ROOT

Cases = dict[str, list[dict[str, Any]]]


def sample(suites: Sequence[str], folder: Path) -> Cases:
    """Every case of the suites' samples, by suite."""
    file = folder / "cases.json"
    chosen = [argument for name in suites for argument in ("--only", name)]
    command = [sys.executable, "-m", "tests.faults", *chosen, "--json", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert file.exists(), done.stderr[-3000:]
    found = json.loads(file.read_text())["cases"]
    return {name: [case for case in found if case["suite"] == name] for name in suites}


def check(cases: Sequence[dict[str, Any]]) -> None:
    """None has a problem, and some were tried."""
    problems = [f"{case['scene']}, {case['fault']}: {p}" for case in cases for p in case["problems"]]
    assert not problems, "\n".join(problems)
    assert cases, "nothing was tried"

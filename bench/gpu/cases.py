"""What the checks of operators share: a case, its errors and limits, and the run that writes them down."""

import datetime
import json
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BFLOAT16, FLOAT16, FLOAT32)

DIED = "its process died"
Errors = list[tuple[str, float, float]]
"""What was measured: a name, the error, the most that it may be. What must be equal has the error 0 or 1."""


class MissingError(Exception):
    """What a case checks is not in this library, or not for this device."""


@dataclass(frozen=True)
class Case:
    """A check with a name. ``check`` makes its own tensors, so that a list of cases costs nothing."""

    name: str
    check: Callable[[], Errors]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """By norms, in float64. NaN stays NaN, which is below no limit."""
    found, exact = found.double(), exact.double()
    return float((found - exact).norm() / exact.norm())


def unequal(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """1 if any pair differs in a single value, else 0."""
    return float(not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)))


class Run:
    """Runs cases in turn; results are written after each, so that a crash leaves those before it."""

    def __init__(
        self, out: Path, device: str, seconds: float, names: Sequence[str] = (), resume: bool = False
    ) -> None:
        """
        Args:
            out: JSON, written anew after each case.
            device: cuda or cpu.
            seconds: when they are over, the rest is listed as not run.
            names: of all cases that will be run, written too: a truncated list shows.
            resume: keep the results that ``out`` has, and run no case twice. The one that its process died in
                is kept as wrong.
        """
        self.out, self.device, self.seconds, self.names = out, device, seconds, list(names)
        self.began = time.time()
        self.results: list[dict[str, Any]] = []
        self.running: str | None = None
        if resume and out.is_file():
            found = json.loads(out.read_text())
            self.results = found["results"]
            if died := found.get("running"):
                self.results.append({"case": died, "ok": False, "why": DIED})
        self.done = {row["case"] for row in self.results}

    def elapsed(self) -> float:
        return time.time() - self.began

    def run(self, case: Case) -> None:
        """One case. An error of the device ends the process, because every later call would get the same."""
        if case.name in self.done:
            return
        if self.elapsed() > self.seconds:
            self.results.append({"case": case.name, "ok": None, "why": "out of time"})
            return
        start, self.running = time.time(), case.name
        self.write()
        row = self._row(case)
        row["s"], self.running = round(time.time() - start, 3), None
        self.results.append(row)
        self.write()
        if row["ok"] is False:
            print(json.dumps(row)[:400], flush=True)
        if "CUDA error" in row.get("why", ""):
            raise SystemExit(f"the device does not answer any more: {row['why']}")

    def _row(self, case: Case) -> dict[str, Any]:
        try:
            errors = case.check()
            if self.device == "cuda":
                torch.cuda.synchronize()
        except MissingError as error:
            return {"case": case.name, "ok": None, "why": f"missing: {error}"[:300]}
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:300]
            return {"case": case.name, "ok": False, "why": why, "trace": traceback.format_exc()[-500:]}
        shown = {name: [float(f"{value:.3e}"), float(f"{limit:.3e}")] for name, value, limit in errors}
        return {"case": case.name, "ok": all(value <= limit for _, value, limit in errors), "errors": shown}

    def write(self) -> None:
        found = {
            "device": self.device,
            "capability": torch.cuda.get_device_capability() if self.device == "cuda" else None,
            "date": str(datetime.date.today()),
            "cases": self.names,
            "running": self.running,
            "results": self.results,
        }
        self.out.write_text(json.dumps(found, indent=0))

    def bad(self) -> int:
        """How many are not right; those that were late count, those of what is missing do not."""
        return sum(not row["ok"] and not self._missing(row) for row in self.results)

    def missing(self) -> int:
        """How many check what is not there."""
        return sum(map(self._missing, self.results))

    @staticmethod
    def _missing(row: dict[str, Any]) -> bool:
        return row["ok"] is None and str(row["why"]).startswith("missing: ")

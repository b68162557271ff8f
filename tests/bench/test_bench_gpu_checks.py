"""Runs of checks that a fault of the device ends: what came before stays, and another process goes on."""

import json
import sys
from pathlib import Path

import pytest

from bench.gpu import check_ops, check_triton
from bench.gpu.cases import Case, Errors, Run

CHILD = """
import os, signal, sys
from pathlib import Path
from bench.gpu.cases import Case, Run
out, deadly = Path(sys.argv[1]), sys.argv[2].split(",")
names = ["one", "two", "three", "four"]
def check(name):
    if name in deadly:
        os.kill(os.getpid(), signal.SIGSEGV)
    return [("y", 0.0, 0.0)]
run = Run(out, "cpu", float(os.environ["NQ_SECONDS"]), names, "--resume" in sys.argv)
for name in names:
    run.run(Case(name, lambda name=name: check(name)))
run.write()
raise SystemExit(bool(run.bad()))
"""


@pytest.mark.parametrize(("deadly", "wrong"), [("none", []), ("two", ["two"]), ("one,four", ["one", "four"])])
def test_a_process_that_dies_is_followed_by_another(
    deadly: str, wrong: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    out = tmp_path / "correct.json"
    out.write_text("of an earlier run")
    code = check_ops.supervise([sys.executable, "-c", CHILD, str(out), deadly], out, 60)
    assert code == bool(wrong)
    found = json.loads(out.read_text())
    assert found["running"] is None
    assert {row["case"]: row["ok"] for row in found["results"]} == {
        name: name not in wrong for name in ("one", "two", "three", "four")
    }


def test_one_that_cannot_even_begin_is_not_tried_for_ever(tmp_path: Path) -> None:
    out = tmp_path / "correct.json"
    assert check_ops.supervise([sys.executable, "-c", "raise SystemExit(3)"], out, 60) == 1
    begun = json.dumps({"running": None, "results": [], "cases": ["a"]})
    stuck = f"open({str(out)!r}, 'w').write({begun!r}); 1/0"
    assert check_ops.supervise([sys.executable, "-c", stuck], out, 60) == 1


def test_results_name_all_cases_and_the_one_that_runs(tmp_path: Path) -> None:
    out = tmp_path / "out.json"

    def look() -> Errors:
        seen.append(json.loads(out.read_text())["running"])
        return [("y", 0.0, 0.0)]

    seen: list[str | None] = []
    run = Run(out, "cpu", 60, ["a", "b"])
    run.run(Case("a", look))
    found = json.loads(out.read_text())
    assert (seen, found["running"], found["cases"]) == (["a"], None, ["a", "b"])
    assert [row["case"] for row in found["results"]] == ["a"]


def test_a_row_that_fails_ends_no_step_but_a_fault_of_the_device_does(tmp_path: Path) -> None:
    rows = check_triton.Rows(tmp_path / "triton.json")
    rows.guarded("one", lambda: 1 / 0)  # type: ignore[arg-type, return-value]

    def fault() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(SystemExit, match="the device does not answer any more: RuntimeError: CUDA error"):
        rows.guarded("two", fault)
    assert [row["ok"] for row in json.loads((tmp_path / "triton.json").read_text())] == [False, False]

"""The report of bench/gpu: goals, both pages, and folders in which something is missing or damaged."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import report

ROOT = Path(__file__).resolve().parents[2]


def timing(faster: float = 1.0) -> dict[str, Any]:
    """Every row that a goal asks for, just good enough; ``faster`` divides our times."""
    rows = []
    for dtype in ("float32", "float16"):
        for batch in (1, 8, 64):
            share = 0.8 * faster if batch >= 8 else 0.1
            case = f"scan decode B{batch} state {dtype}"
            rows.append({"case": case, "us": 10.0, "floor_us": share * 10, "of_floor": share})
    for length in (512, 4096, 65_536):
        case, us = f"scan prefill {length}", 100 / faster
        rows.append({"case": case, "us": us, "floor_us": 50.0, "of_floor": 0.5, "mamba_ssm_us": 100.0})
    for format in ("nvfp4", "fp8", "bf16", "w4a16"):
        for tokens in (1, 16, 256, 4096):
            share = 0.667 * faster
            case = f"experts Super {format} {tokens}"
            rows.append({"case": case, "us": 30.0, "floor_us": 30 * share, "of_floor": share})
    rows.append({"case": "conv 8 x 1", "skipped": "time"})
    return {"device": "GPU X", "date": "2030-01-02", "limits": {"copy_TB_s": 3.0}, "rows": rows}


def whole() -> dict[str, Any]:
    """What all.sh writes, by file: everything right, every goal just met."""
    kernels = ("mxfp8", "nvfp4 max", "nvfp4 four_over_six", "nvfp4 mse")
    triton = [{"case": f"kernel {name}", "ms": 1.0, "GB_s": 50.0} for name in kernels]
    triton.append({"case": "pinned host to device", "ms": 1.0, "GB_s": 50.0})
    triton.append({"case": "4 threads", "ok": True, "GB_s_bf16_in": 40.0})
    stages = {"calibrate": 10.0, "encode nvfp4-mse": 5.0, "diff": 3.0}
    pack = [{"stage": stage, "cpu_s": t, "device_s": 1.0, "times": t} for stage, t in stages.items()]
    tool = {"rc": 0, "ran": 120, "bad": 0}
    right = [{"case": "scan", "ok": True}, {"case": "native", "ok": None, "why": "missing: x"}]
    return {
        "env.json": {"device": "GPU X", "date": "2030-01-02", "torch": "2.11", "triton": "3.6"},
        "steps.json": {"env": {"rc": 0}, "pytest": {"rc": 124, "timed_out": True}},
        "runner.json": {"runner": tool},
        "correct.json": {"device": "cuda", "cases": ["scan", "native"], "results": right},
        "sanitizer.json": {"memcheck": tool | {"errors": 0}, "racecheck": {"rc": 124}},
        "pack.json": [*pack, {"check": "same bytes", "ok": True}],
        "triton.json": triton,
        "timing.json": timing(),
        "grouped.json": {"device": "cuda", "results": [{"case": "experts", "ok": False}]},
        "grouped_runner.json": {"runner": tool},
        "pytest.json": {
            "passed": 5,
            "failed": [{"test": "a::b", "why": "x"}],
            "skipped": {"no mamba_ssm": 6},
        },
    }


def folder(path: Path, **instead: Any) -> Path:
    """The whole folder; of a step that is named, other JSON, a text, or None for no file."""
    path.mkdir(parents=True)
    for name, content in (whole() | {f"{step}.json": made for step, made in instead.items()}).items():
        if content is not None:
            (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_every_goal_is_just_met_and_missed_below(tmp_path: Path) -> None:
    met = report.goals(report.Folder(folder(tmp_path / "met")))
    assert [(one.goal, one.met) for one in met] == [(one.goal, True) for one in met]
    assert len(met) == 10
    small = [{**row, "GB_s": 49.0} if "kernel" in row["case"] else row for row in whole()["triton.json"]]
    small[-1] |= {"GB_s_bf16_in": 39.0}
    pack = [{**row, "times": row.get("times", 0) * 0.9} for row in whole()["pack.json"]]
    slow = folder(tmp_path / "slow", timing=timing(0.9), triton=small, pack=pack)
    missed = report.goals(report.Folder(slow))
    assert [(one.goal, one.met) for one in missed] == [(one.goal, False) for one in missed]
    worst = next(one for one in missed if one.goal.startswith("experts, 1 tokens"))
    assert (worst.got, worst.of) == (0.6, "experts Super nvfp4 1")


def test_what_a_truncated_list_lacks_was_not_run(tmp_path: Path) -> None:
    cut = {"device": "cuda", "cases": ["a", "b", "c"], "results": [{"case": "a", "ok": True}]}
    short = report.Folder(folder(tmp_path / "cut", correct=cut))
    assert str(report.operators(short, "correct")) == "1 of 1 right, 2 not run"


def test_speed_with_wrong_bytes_meets_no_goal(tmp_path: Path) -> None:
    pack = [*whole()["pack.json"], {"check": "mid: same bytes", "ok": False}]
    triton = [*whole()["triton.json"], {"case": "8 threads", "ok": False, "GB_s_bf16_in": 90.0}]
    found = report.goals(report.Folder(folder(tmp_path / "wrong", pack=pack, triton=triton)))
    assert [one.met for one in found] == [True] * 6 + [None] * 4


def test_reports_of_tests_that_make_no_sense() -> None:
    for failed in ([1], [{"why": 1}], {"a": 1}, None):
        assert report.pytest_line({"passed": 1, "failed": failed, "skipped": []}).startswith("1 passed, ")
    late = {"passed": 1, "failed": [], "skipped": {}, "not_begun": ["packing", "files"]}
    assert report.pytest_line(late) == "1 passed, 0 failed, 0 skipped; not begun: packing, files"


def test_a_goal_without_all_of_its_figures_is_open_unless_one_misses_it() -> None:
    assert report.goal("x", 1, {"a": None, "b": None}).met is None
    assert report.goal("x", 1, {"a": 2.0, "b": None}).met is None
    assert report.goal("x", 1, {"a": 0.5, "b": None}).met is False
    assert report.goal("x", 1, {"a": 2.0, "b": 1.0}).met is True


def checkout(root: Path) -> Path:
    """The two pages, as they are."""
    (root / "bench").mkdir(parents=True)
    for name in ("README.md", "bench/RESULTS.md"):
        shutil.copy(ROOT / name, root / name)
    return root


def run(monkeypatch: pytest.MonkeyPatch, root: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    report.main(root)


def test_the_pages_of_this_checkout_are_what_its_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, ROOT, "--check")


def test_without_results_both_pages_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without a device is no result of one."""
    root = checkout(tmp_path / "root")
    folder(root / "bench/gpu/results/2030-01-02-no-device")
    run(monkeypatch, root)
    assert (root / "README.md").read_text().count("Nothing here has been run on a GPU yet") == 1
    assert "There are no results of a GPU." in (root / "bench/RESULTS.md").read_text()


def test_results_are_written_into_both_pages_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = checkout(tmp_path / "root")
    results = folder(root / "bench/gpu/results/2030-01-02-GPU-X")
    with pytest.raises(SystemExit, match=r"^RESULTS\.md, README\.md: not what bench/gpu/results says"):
        run(monkeypatch, root, "--check")
    run(monkeypatch, root)
    run(monkeypatch, root, "--check")
    status, found = (root / "README.md").read_text(), (root / "bench/RESULTS.md").read_text()
    assert "Nothing here has been run" not in status
    assert (
        "- GPU X, 2030-01-02: operators 1 of 1 right, 1 not run; 10 of 10 measured goals met; steps that did "
        "not end well: pytest (exit code 124, time was over).\n"
    ) in status
    assert "(bench/RESULTS.md#on-a-gpu)" in status
    for line in (
        "### GPU X, 2030-01-02",
        "[2030-01-02-GPU-X](gpu/results/2030-01-02-GPU-X/); torch 2.11, triton 3.6.",
        "Steps that did not end well: pytest (exit code 124, time was over).",
        "- operators: 1 of 1 right, 1 not run",
        "- CUTLASS's grouped products: 0 of 1 right; wrong: experts",
        "- memcheck: 120 cases, 0 bad, 0 errors, exit code 0",
        "- racecheck: not finished, exit code 124",
        "- `tests/gpu`: 5 passed, 1 failed (a::b), 6 skipped",
        "| calibration: all processors' time over the device's | 10.0 | 10.0 | calibrate | yes |",
        "| scan prefill 512 | 100.0 | 50.0 | 0.5 | mamba_ssm 100.0 |",
        "Without a time: conv 8 x 1.",
        "| calibrate | 10.0 | 1.0 | 10.0 |",
        "| Triton kernels of the formats | no: with `--device cuda` | - |",
    ):
        assert f"{line}\n" in found, line
    (results / "timing.json").unlink()
    with pytest.raises(SystemExit):
        run(monkeypatch, root, "--check")


@pytest.mark.parametrize(
    "damage", [None, "", "{", "[1, 2]", '"text"', "{}", '{"rows": 3, "results": [1]}', "[{}]"]
)
def test_a_missing_or_damaged_step_is_said_and_ends_nothing(tmp_path: Path, damage: str | None) -> None:
    """Every file alone, then all of them."""
    steps = list(report.FILES)
    for step in steps:
        found = report.Folder(folder(tmp_path / step, **{step: damage}))
        assert "| goal |" in report.section(found)
        if damage in (None, "", "{", '"text"'):
            file = f"{step}.json"
            assert found.missing == {step: f"no {file}" if damage is None else f"{file} is damaged"}
            assert f"Missing: {found.missing[step]}.\n" in report.section(found)
    found = report.Folder(folder(tmp_path / "all", **dict.fromkeys(steps, damage)))
    assert "### unknown device, no date" in report.section(found)
    assert "- unknown device, no date: operators " in report.status_text([found])
    assert {one.met for one in report.goals(found)} == {None}


def test_the_summary_of_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path / "one", triton=None)
    run(monkeypatch, ROOT, "--summary", str(path))
    written = json.loads((path / "summary.json").read_text())
    assert (written["device"], written["missing"]) == ("GPU X", {"triton": "no triton.json"})
    assert [one["met"] for one in written["goals"]].count(True) == 8
    said = capsys.readouterr().out
    assert (
        " yes  calibration: all processors' time over the device's: 10.0, at least 10.0 (calibrate)\n" in said
    )
    assert "open  Triton encoders alone" in said


def test_a_page_without_its_markers_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"^README\.md: got 0 parts between <!-- gpu --> and <!-- /gpu -->"):
        report.between("text", "made", "README.md")

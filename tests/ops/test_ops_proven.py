"""Each operator that is used by default was right on a GPU: its row's results say so."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support.places import ROOT

import nemoquant.ops.functional  # noqa: F401 - registers torch.ops.nemoquant
from bench.gpu import check_ops
from nemoquant.ops.proven import OPERATORS, PROVEN, Proof

RESULTS = ROOT / "bench/gpu/results"
CASES = {"causal_conv1d": "conv", "mamba2_scan": "scan", "routed_experts": "experts"}  # words of their names


def operator_of(name: str) -> str:
    """The operator that a case's name says."""
    [found] = [op for op, word in CASES.items() if word in name.replace("_", " ").split()]
    return found


def all_cases() -> list[str]:
    """Of a device with the host build beside it."""
    return [case.name for case in check_ops.cases("cuda", Path("libnemoquant_host.so"))]


def problems(row: Proof, results: Path, names: Sequence[str] | None = None) -> list[str]:
    """What is wrong with a row; a case that checks what this library or device lacks counts neither way.

    Args:
        names: of the cases that there must be; None: all of a device.
    """
    file = results / row.results / "correct.json"
    if not file.is_file():
        return [f"{file} is not there"]
    found = json.loads(file.read_text())
    if (found["device"], found.get("capability")) != ("cuda", list(row.capability)):
        return [f"{file} is of {found['device']} {found.get('capability')}, not of {row.capability}"]
    cases = {case["case"]: case for case in found["results"] if operator_of(case["case"]) == row.operator}
    wanted = [name for name in names or all_cases() if operator_of(name) == row.operator]
    return [f"{name}: was not run" for name in wanted if name not in cases] + [
        f"{name}: ok is {case['ok']}"
        for name, case in cases.items()
        if case["ok"] is not True and not str(case.get("why")).startswith("missing: ")
    ]


def test_each_row_has_its_results() -> None:
    assert [row for row in PROVEN if row.operator not in OPERATORS] == []
    assert [problem for row in PROVEN for problem in problems(row, RESULTS)] == []


def test_operators_are_those_that_torch_knows() -> None:
    assert set(OPERATORS) == set(CASES)
    assert all(hasattr(torch.ops.nemoquant, op) for op in OPERATORS)
    text = (ROOT / "nemoquant/ops/functional.py").read_text()
    assert text.count('custom_op("nemoquant::') == len(OPERATORS)


def test_every_case_is_one_operator_s() -> None:
    assert {operator_of(name) for name in all_cases()} == set(OPERATORS)


def test_results_that_do_not_show_it(tmp_path: Path) -> None:
    row = Proof("mamba2_scan", (9, 0), "made")
    file = tmp_path / "made/correct.json"
    assert problems(row, tmp_path) == [f"{file} is not there"]
    file.parent.mkdir()

    def after(**changes: Any) -> list[str]:
        cases = [
            {"case": "scan float16", "ok": True},
            {"case": "scan_steps bits", "ok": True},
            {"case": "graph: scan decode", "ok": True},
            {"case": "scan other", "ok": None, "why": "missing: no host library"},
            {"case": "conv 8", "ok": False},
        ]
        whole = {"device": "cuda", "capability": [9, 0], "results": cases}
        file.write_text(json.dumps(whole | changes))
        return problems(row, tmp_path, ["scan float16", "scan_steps bits", "graph: scan decode", "conv 8"])

    assert after() == []
    assert after(device="cpu") == [f"{file} is of cpu [9, 0], not of (9, 0)"]
    assert after(capability=[9, 1]) == [f"{file} is of cuda [9, 1], not of (9, 0)"]
    cut_short = [{"case": "scan float16", "ok": True}, {"case": "graph: scan decode", "ok": True}]
    assert after(results=cut_short) == ["scan_steps bits: was not run"]
    for ok in (False, None):
        late = [*cut_short, {"case": "scan_steps bits", "ok": ok, "why": "out of time"}]
        assert after(results=late) == [f"scan_steps bits: ok is {ok}"]

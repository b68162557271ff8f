"""Recipes of Model Optimizer on the command line: plan, quantize, and converted by ``recipes show``."""

from pathlib import Path
from typing import Any

import pytest
from support import modelopt_run
from support.commands import invoke, nemoquant, refusal
from support.files import parse_strictly
from support.places import SUPER
from support.synthetic import write_rows

from nemoquant.planning.modelopt import library

WEIGHTS = {"num_bits": [2, 1], "block_sizes": {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]}}
THEIRS = """\
metadata: {recipe_type: ptq, description: Experts}
quantize: {algorithm: max, quant_cfg: [{quantizer_name: '*', enable: false}]}
"""
NOTE = "modelopt-theirs: these options of its algorithm have no effect here: layerwise"


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, and a loader that reads it at once."""
    entries = [
        {"pattern": "*", "parent": None, "enable": False, "cfg": None},
        {"pattern": "*.experts.*weight_quantizer", "parent": None, "enable": True, "cfg": [WEIGHTS]},
    ]
    algorithm = {"method": "max", "layerwise": {"enable": True}}
    answer: dict[str, Any] = {"description": "Experts", "entries": entries, "algorithms": [algorithm]}
    monkeypatch.setattr(library, "ask", lambda *_: answer)
    monkeypatch.setattr(library, "folder", lambda: tmp_path)
    file = tmp_path / "theirs.yaml"
    file.write_text(THEIRS)
    return file


def test_plan_tells_what_is_done_otherwise(theirs: Path) -> None:
    shown = invoke("plan", SUPER, "--recipe", theirs)
    assert shown.exit_code == 0
    assert f"warning: {NOTE}" in shown.stderr
    assert shown.stdout.startswith("modelopt-theirs: ")
    data = parse_strictly(nemoquant("plan", SUPER, "--recipe", theirs, "--json").stdout)
    assert NOTE in data["warnings"]


def test_show_converts_and_the_file_plans_the_same(theirs: Path, tmp_path: Path) -> None:
    shown = nemoquant("recipes", "show", theirs, "--model", SUPER)
    assert shown.stdout.splitlines()[0] == f"# {NOTE}"
    ours = tmp_path / "ours.yaml"
    ours.write_text(shown.stdout)
    plans = [parse_strictly(nemoquant("plan", SUPER, "--recipe", r, "--json").stdout) for r in (theirs, ours)]
    assert plans[0]["sha256"] == plans[1]["sha256"]
    as_json = invoke("recipes", "show", theirs, "--model", SUPER, "--json")
    assert parse_strictly(as_json.stdout) == parse_strictly(
        nemoquant("recipes", "show", ours, "--json").stdout
    )
    assert f"warning: {NOTE}" in as_json.stderr


def test_show_of_ours_needs_no_model_and_of_theirs_does(theirs: Path) -> None:
    assert "--model MODEL` converts it" in refusal("recipes", "show", theirs)
    assert "--model MODEL` converts it" in refusal("recipes", "show", "modelopt:theirs", "--json")
    plain, with_model = (
        nemoquant("recipes", "show", "fp8", *more).stdout for more in ([], ["--model", SUPER])
    )
    assert plain == with_model


def test_quantize_keeps_a_recipe_of_ours(theirs: Path, source: Path, tmp_path: Path) -> None:
    done = invoke("quantize", source, tmp_path / "out", "--recipe", theirs)
    assert done.exit_code == 0, done.stderr
    assert NOTE in done.stdout + done.stderr
    manifest = parse_strictly((tmp_path / "out/nemoquant.json").read_text())
    assert NOTE in manifest["warnings"]
    assert manifest["plan"]["recipe"]["rules"][0] == {
        "roles": ["experts.*"],
        "format": "nvfp4",
        "activations": "none",
    }
    assert nemoquant("verify", tmp_path / "out", "--against", source).exit_code == 0


@pytest.mark.slow
class TestModelOptimizer:
    pytestmark = modelopt_run.MARKS

    def test_a_recipe_of_its_library_from_end_to_end(self, source: Path, tmp_path: Path) -> None:
        """By its own loader, in a process of its own."""
        rows = write_rows(tmp_path / "rows.npy")
        name = "modelopt:models/nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16/ptq/nvfp4-mse"
        calib = ("--calib", rows, "--rows", 8, "--seq-len", 32)
        done = invoke("quantize", source, tmp_path / "out", "--recipe", name, *calib)
        assert done.exit_code == 0, done.stderr
        data = parse_strictly((tmp_path / "out/nemoquant.json").read_text())
        assert data["plan"]["recipe"]["name"] == "modelopt-nvfp4-mse"
        assert [rule["roles"] for rule in data["plan"]["recipe"]["rules"]] == [
            ["mamba.*", "shared_experts.*"],
            ["experts.*"],
            ["*"],
        ]
        assert nemoquant("verify", tmp_path / "out", "--against", source).exit_code == 0

"""The presets as they are: codes solved for with the inputs that calibration sees, by the command line.

What the solvers compute is held in ``tests/solve``; most other tests take method max, which an oracle knows.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from support.commands import nemoquant
from support.files import changed_files, tree
from support.pack_oracle import read
from support.stops import stopped_after

from nemoquant.calibrate import run

PRESETS = ("fp8", "nvfp4", "nvfp4-full", "nvfp4-full-w4a16", "nvfp4-w4a16")
SOLVED, FOLDS, SCALES = "nemoquant_solved.json", "nemoquant_folds.st", "nemoquant_scales.json"


@pytest.fixture
def make(source, token_rows, tmp_path):
    """Runs ``quantize`` into tmp_path/NAME; returns that folder and the result."""

    def call(name, *options, code=0):
        out = tmp_path / name
        given = ("--calib", token_rows, "--compute", "float32", "--row-batch", 4, "--threads", 1)
        return out, nemoquant("quantize", source, out, *given, *options, code=code)

    return call


def planned(source: Path, *options: object) -> dict[str, dict[str, object]]:
    """The quantized rows of a plan, by name."""
    rows = json.loads(nemoquant("plan", source, *options, "--json").stdout)["rows"]
    return {row["name"]: row for row in rows if row["format"] != "source"}


@pytest.mark.parametrize(
    "options",
    [
        *(["--recipe", preset] for preset in PRESETS),
        ["--recipe", "nvfp4-full", "--method", "hess"],
        ["--recipe", "fp8-published", "--method", "gptq", "--descent", "0"],
        ["--recipe", "nvfp4-full", "--folds", "latent,norm,gate,expert"],
        ["--fmt", "nvfp4", "--folds", "none"],
    ],
    ids=lambda options: " ".join(options[1:]),
)
def test_it_is_written_verified_and_compared(options, make, source, token_rows):
    rows = planned(source, *options)
    assert {row["scale_method"] for row in rows.values()} <= {"gptq", "hess", "mse", "max"}
    solved = [name for name, row in rows.items() if row["scale_method"] in ("gptq", "hess")]
    out, result = make("out", *options)
    assert "calibrated on 8 rows of 32 tokens" in result.stdout
    told = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(told) == ("nvfp4-full-w4a16" in options), "SGLang reads its in_proj wrongly"
    noted = json.loads((out / SOLVED).read_text())["units"].values()
    assert sum(len(unit["method"]) for unit in noted) == len(solved) > 30
    assert all(np.less_equal(unit["objective"], unit["plain"]).all() for unit in noted)
    assert sum(sum(unit["objective"]) for unit in noted) < sum(sum(unit["plain"]) for unit in noted)
    recipe = json.loads((out / "nemoquant.json").read_text())["plan"]["recipe"]
    assert (out / FOLDS).exists() == bool(recipe.get("folds"))
    report = json.loads(nemoquant("verify", out, "--against", source, "--json").stdout)
    assert (report["ok"], report["problems"], report["warnings"]) == (True, [], [])
    assert report["checked"]["solved"] == len(solved)
    assert report["checked"].get("encoded_again", 0) == len(rows) - len(solved)
    compared = ("diff", source, out, "--data", token_rows, "--threads", 1, "--no-card", "--json", "-")
    (found,) = json.loads(nemoquant(*compared).stdout)["candidates"]
    assert found["warnings"] == []
    assert found["recipe"] == recipe["name"]
    units = json.loads((out / SOLVED).read_text())["units"]
    for layer in found["layers"]:
        here = [unit for name, unit in units.items() if f".layers.{layer['name']}." in name]
        assert (layer["solved"] is None) == (not here)
        if here:
            error, plain = (sum(sum(unit[key]) for unit in here) for key in ("objective", "plain"))
            assert layer["solved"]["error_of_plain"] == pytest.approx(error / plain)
            assert sum(layer["solved"]["methods"].values()) == sum(len(unit["method"]) for unit in here)


def test_codes_alone_differ_from_those_of_method_max(make):
    """Weights without experts keep the maximum's scale: what is solved for is the codes."""
    solved, plain = (
        read(make(name, "--fmt", "fp8", *more)[0])
        for name, more in (("solved", []), ("plain", ["--method", "max"]))
    )
    assert solved.keys() == plain.keys()
    changed = {name for name, t in solved.items() if t.data != plain[name].data}
    assert changed and all(name.endswith("_proj.weight") for name in changed)


def test_it_is_the_same_again_with_any_number_of_threads(make):
    one, _ = make("one", "--fmt", "nvfp4")
    two, _ = make("two", "--fmt", "nvfp4", "--threads", 2)
    assert changed_files(one, two) in ([], ["nemoquant.json", SCALES])  # which name the threads


@pytest.mark.parametrize(("fmt", "layers"), [("fp8", 2), ("nvfp4", 1), ("nvfp4", 4)])
def test_it_goes_on_after_an_interrupt_of_the_calibration(fmt, layers, make, monkeypatch):
    layer, seen, options = run._Run.layer, [], ["--fmt", fmt]

    def stopping(self, i, *rest):
        if i == layers:
            raise KeyboardInterrupt
        return layer(self, i, *rest)

    whole, _ = make("whole", *options)
    with monkeypatch.context() as patch:
        patch.setattr(run._Run, "layer", stopping)
        out, result = make("out", *options, code=130)
    assert f"out.partial is kept ({layers} layers calibrated)" in result.stderr

    def counted(self, i, *rest):
        seen.append(i)
        return layer(self, i, *rest)

    monkeypatch.setattr(run._Run, "layer", counted)
    make("out", *options, "--resume")
    assert seen[0] == layers
    assert tree(out) == tree(whole)


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4"])
def test_it_goes_on_after_an_interrupt_of_the_packing(fmt, make, monkeypatch):
    options = ["--fmt", fmt, "--shard-size", "0.00003"]
    whole, _ = make("whole", *options)
    with monkeypatch.context() as patch:
        stopped_after(3, patch)
        out, result = make("out", *options, code=130)
    assert "out.partial is kept (calibrated, 3 shards written)" in result.stderr
    make("out", *options, "--resume")
    assert tree(out) == tree(whole)


def test_another_method_is_another_run(make, monkeypatch):
    with monkeypatch.context() as patch:
        stopped_after(3, patch)
        make("out", "--fmt", "nvfp4", "--shard-size", "0.00003", code=130)
    for more in (["--method", "max"], ["--descent", "3"], ["--folds", "none"]):
        _, result = make("out", "--fmt", "nvfp4", "--shard-size", "0.00003", *more, "--resume", code=2)
        assert "begun with other options: the recipe was nvfp4 (" in result.stderr


def test_what_needs_the_inputs_is_refused_without_them(source, make, tmp_path):
    """A scales file has their maxima alone, and nodes of a cluster see a part of them each."""
    out, _ = make("first", "--fmt", "fp8", "--method", "max")
    before = tree(tmp_path)
    for preset in PRESETS:
        command = ("quantize", source, tmp_path / "out", "--recipe", preset)
        told = nemoquant(*command, "--scales", out / SCALES, code=2).stderr.splitlines()[-1]
        assert "nemoquant_scales.json has the maxima of GEMM inputs alone, but recipe " in told
        assert f" {preset} solves for codes or folds" in told and "give --method max or mse" in told
        told = nemoquant(*command, "--on", "ray", code=2).stderr.splitlines()[-1]
        assert f"--on ray does not solve for codes or folds, which recipe {preset} asks for" in told
    assert tree(tmp_path) == before
    taken = ("--fmt", "nvfp4", "--method", "mse", "--scales", out / SCALES)
    assert "nvfp4-mse, " in nemoquant("quantize", source, tmp_path / "out", *taken).stdout


def test_a_scales_file_of_a_solved_run_serves_method_max(source, make, tmp_path):
    """Maxima are those of the source's inputs, whatever was solved for."""
    solved, _ = make("solved", "--fmt", "nvfp4")
    plain, _ = make("plain", "--fmt", "nvfp4", "--method", "max")
    assert (
        json.loads((solved / SCALES).read_text())["input_amax"]
        == json.loads((plain / SCALES).read_text())["input_amax"]
    )
    taken = ("--fmt", "nvfp4", "--method", "max", "--scales", solved / SCALES, "--threads", 1)
    nemoquant("quantize", source, tmp_path / "again", *taken)
    assert read(tmp_path / "again") == read(plain)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--folds", "heads"], "'heads' is no fold; expected none, or some of latent, norm, gate, expert"),
        (["--method", "best"], "'best' is not one of 'max', 'mse', 'four_over_six', 'hess', 'gptq'"),
        (["--descent", "17"], "17 is not in the range 0<=x<=16"),
    ],
)
@pytest.mark.parametrize("verb", [["plan"], ["quantize"]], ids=str)
def test_wrong_words(verb, options, says, source, tmp_path):
    places = [source, *([tmp_path / "out"] if verb == ["quantize"] else [])]
    result = nemoquant(*verb, *places, "--fmt", "nvfp4", *options, code=2)
    assert says in " ".join(result.stderr.split())


def test_no_fold_is_an_option_too(source):
    names = [
        json.loads(nemoquant("plan", source, "--fmt", "nvfp4", *more, "--json").stdout)["recipe"]
        for more in ([], ["--folds", "none"], ["--folds", "gate"], ["--method", "max", "--folds", "gate"])
    ]
    assert names == ["nvfp4", "nvfp4-unfolded", "nvfp4-gate", "nvfp4-max-gate"]

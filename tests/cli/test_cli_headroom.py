"""Headroom: what it changes in an output, and what stays to the byte."""

import json
import shutil

import numpy as np
import pytest
from support.commands import nemoquant
from support.files import tree
from support.pack_oracle import read
from support.places import DEMO
from support.stops import stopped_after

SCALES, SOLVED, MANIFEST = "nemoquant_scales.json", "nemoquant_solved.json", "nemoquant.json"


@pytest.fixture
def make(source, token_rows, tmp_path):
    """Runs ``quantize`` into tmp_path/NAME; returns that folder and the result."""

    def call(name, *options, code=0, calib=True):
        given = ("--compute", "float32", "--row-batch", 4, "--threads", 1) if calib else ()
        given += ("--calib", token_rows) if calib else ()
        return tmp_path / name, nemoquant("quantize", source, tmp_path / name, *given, *options, code=code)

    return call


def formats(source, *options):
    """module -> format of its input."""
    rows = json.loads(nemoquant("plan", source, *options, "--json").stdout)["rows"]
    return {row["name"].removesuffix(".weight"): row["activation_format"] for row in rows}


def scales(folder):
    return json.loads((folder / SCALES).read_text())


@pytest.mark.parametrize("factor", ["2", "1.1"])
def test_input_scales_of_nvfp4_are_multiplied_and_no_other_byte_changes(factor, source, make):
    without, _ = make("without", "--fmt", "nvfp4", "--method", "max", "--headroom", 1)
    out, _ = make("with", "--fmt", "nvfp4", "--method", "max", "--headroom", factor)
    before, after = read(without), read(out)
    inputs, seen = formats(source, "--fmt", "nvfp4"), set()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        module, _, part = name.rpartition(".")
        if part == "input_scale" and inputs[module] == "nvfp4":
            scale = np.frombuffer(tensor[2], np.float32)[0]
            assert np.frombuffer(after[name][2], np.float32)[0] == np.float32(float(scale) * float(factor))
        else:
            assert after[name] == tensor, name
        seen.add((part, inputs.get(module)))
    assert {("input_scale", "nvfp4"), ("input_scale", "fp8"), ("k_scale", "fp8")} <= seen
    assert scales(without)["input_amax"] == scales(out)["input_amax"], "the file has what was seen"
    assert json.loads((out / MANIFEST).read_text())["plan"]["recipe"]["headroom"] == float(factor)
    assert f"for activation scales (headroom {factor})" in (out / "README.md").read_text()
    assert "(headroom" not in (without / "README.md").read_text()
    nemoquant("verify", out, "--against", source)


def test_codes_are_solved_for_inputs_as_they_are_rounded_with_it(source, make):
    """The second moments of NVFP4 inputs are others, those of FP8 inputs the same."""
    grams = []
    for name, factor in (("without", 1), ("with", 3)):  # by powers of two, most inputs round the same
        out, _ = make(name, "--fmt", "nvfp4", "--folds", "none", "--headroom", factor)
        units = json.loads((out / SOLVED).read_text())["units"]
        grams.append({unit.removesuffix(".weight"): values["gram"] for unit, values in units.items()})
        nemoquant("verify", out, "--against", source)
    inputs = formats(source, "--fmt", "nvfp4")
    others = {unit for unit in grams[0] if inputs.get(unit) == "fp8"}
    assert others and set(grams[0]) - others, "a unit of experts has no module's name"
    assert {unit for unit in grams[0] if grams[0][unit] == grams[1][unit]} == others


def test_a_scales_file_serves_any_headroom(make):
    first, _ = make("first", "--fmt", "nvfp4", "--method", "max", "--headroom", 1)
    wanted, _ = make("wanted", "--fmt", "nvfp4", "--method", "max", "--headroom", 2)
    again, _ = make(
        *("again", "--fmt", "nvfp4", "--method", "max", "--headroom", 2, "--scales", first / SCALES),
        calib=False,
    )
    assert read(again) == read(wanted)


def test_another_headroom_is_another_run(make, monkeypatch, tmp_path):
    given = ("--fmt", "nvfp4", "--method", "max", "--shard-size", "0.00003")
    with monkeypatch.context() as patch:
        stopped_after(3, patch)
        make("out", *given, "--headroom", 3, code=130)
    before = tree(tmp_path)
    _, result = make("out", *given, "--headroom", 4, "--resume", code=2)
    assert "begun with other options: the recipe was nvfp4-max-headroom3 (" in result.stderr
    assert ") and is nvfp4-max-headroom4 (" in result.stderr
    assert tree(tmp_path) == before
    make("out", *given, "--headroom", 3, "--resume")


def test_verify_sees_a_scale_without_the_headroom_of_its_manifest(make):
    out, _ = make("out", "--fmt", "nvfp4", "--method", "max", "--headroom", 2)
    other, _ = make("other", "--fmt", "nvfp4", "--method", "max", "--headroom", 1)
    for shard in other.glob("*.safetensors"):
        shutil.copy(shard, out / shard.name)
    assert ".input_scale is " in nemoquant("verify", out, code=1).output


@pytest.mark.parametrize(
    "recipe", ["fp8", "mxfp8", "nvfp4-w4a16"], ids=["FP8 inputs", "no scales", "no inputs"]
)
def test_no_effect_is_told(recipe):
    result = nemoquant("plan", DEMO, "--recipe", recipe, "--headroom", 2)
    told = [line for line in result.stderr.splitlines() if "headroom" in line]
    assert told == [
        "warning: headroom 2: has no effect, no GEMM of this model has NVFP4 inputs, whose calibrated scales "
        "it multiplies"
    ]
    assert "headroom" not in nemoquant("plan", DEMO, "--recipe", recipe, "--headroom", 1).stderr


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("0.5", "0.5 is not in the range 1<=x<=16"),
        ("17", "17.0 is not in the range 1<=x<=16"),
        ("nan", "is not"),
        ("much", "'much' is not a valid float"),
    ],
)
@pytest.mark.parametrize("verb", [["plan"], ["quantize"]], ids=str)
def test_what_is_no_headroom(verb, given, says, source, tmp_path):
    places = [source, *([tmp_path / "out"] if verb == ["quantize"] else [])]
    result = nemoquant(*verb, *places, "--fmt", "nvfp4", "--headroom", given, code=2)
    assert says in " ".join(result.stderr.split())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]

"""FP8 weights whose inputs are not quantized (W8A16): how files say it, and who reads it how."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from support.commands import nemoquant as command
from support.commands import refusal
from support.places import DEMO, TESTS
from support.tampering import changed_copy

import nemoquant
from nemoquant.layouts.engines import cautions, mixture, outcome
from nemoquant.quantized.checkpoint import PackedCheckpoint

Make = Callable[..., Path]
RECIPE = TESTS / "consumers/recipes/fp8-weights-only.yaml"
HEAD, OUT_PROJ = "lm_head", "backbone.layers.{}.mixer.out_proj"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Weights only: lm_head, and out_proj of the first of two Mamba layers; the other FP8 as usual."""
    path = tmp_path / "w8a16.yaml"
    path.write_text(
        "name: w8a16\nextends: fp8-published\nrules:\n"
        "- {roles: [lm_head], format: fp8, activations: none}\n"
        "- {roles: [mamba.out_proj], layers: [first], format: fp8, activations: none}\n"
    )
    return path


@pytest.fixture
def made(quantized: Make, recipe: Path) -> Path:
    return quantized(str(recipe))


def section(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def parts(folder: Path, module: str) -> set[str]:
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            found |= {name[len(module) + 1 :] for name in opened.keys() if name.startswith(f"{module}.")}  # noqa: SIM118
    return found


def test_what_is_written(made: Path) -> None:
    """As Model Optimizer declares it, FP8 without `input_scale`; a group without inputs tells it apart."""
    whole = {HEAD, OUT_PROJ.format(0)}
    assert all(parts(made, module) == {"weight", "weight_scale"} for module in whole)
    assert parts(made, OUT_PROJ.format(4)) == {"weight", "weight_scale", "input_scale"}
    declared, legacy = section(made), json.loads((made / "hf_quant_config.json").read_text())["quantization"]
    assert declared["quant_algo"] == legacy["quant_algo"] == "FP8"
    assert not {"quantized_layers"} & (declared.keys() | legacy.keys()), "SGLang would take it for w4afp8"
    groups = {"input_activations" in g: set(g["targets"]) for g in declared["config_groups"].values()}
    assert groups[False] == whole
    assert {OUT_PROJ.format(4), "backbone.layers.0.mixer.in_proj"} <= groups[True]
    assert not groups[True] & (whole | set(declared["ignore"]))


def test_what_is_written_beside_nvfp4(quantized: Make, tmp_path: Path) -> None:
    """Then the file lists its modules, all of them FP8 or NVFP4."""
    path = tmp_path / "beside.yaml"
    path.write_text(
        "name: beside\nextends: nvfp4\nfolds: []\nrules:\n"
        "- {roles: [lm_head], format: fp8, activations: none}\n"
    )
    made = quantized(str(path))
    declared, legacy = section(made), json.loads((made / "hf_quant_config.json").read_text())["quantization"]
    assert declared["quant_algo"] == legacy["quant_algo"] == "MIXED_PRECISION"
    assert declared["quantized_layers"] == legacy["quantized_layers"]
    assert {entry["quant_algo"] for entry in declared["quantized_layers"].values()} == {"FP8", "NVFP4"}
    assert [g["targets"] for g in declared["config_groups"].values() if "input_activations" not in g] == [
        [HEAD]
    ]
    opened = PackedCheckpoint(made)
    with opened.checkpoint:
        assert opened.weights_only == {HEAD}
    assert command("inspect", made).stdout.count("MIXED_PRECISION") == 1


def test_all_verbs(made: Path, recipe: Path, source: Path, tmp_path: Path, token_rows: Path) -> None:
    opened = PackedCheckpoint(made)
    with opened.checkpoint:
        assert opened.weights_only == {HEAD, OUT_PROJ.format(0)}
        assert {OUT_PROJ.format(0), HEAD} & set(opened.inputs) == set()
        assert opened.inputs[OUT_PROJ.format(4)][0] == "fp8"
        assert opened.formats(HEAD) == ("fp8", None)
    assert nemoquant.verify(made, against=source)["ok"]
    report = nemoquant.diff(source, made, data=token_rows, threads=1, card=False)
    inputs = {m.name: m.input_format for m in report.candidates[0].modules}
    assert (inputs[OUT_PROJ.format(0)], inputs[OUT_PROJ.format(4)]) == (None, "fp8")
    bf16 = nemoquant.convert(made, tmp_path / "bf16", "bf16", progress=False)
    assert bf16.decoded == {"fp8": len(nemoquant.plan(source, recipe).quantized)}
    with safe_open(next((tmp_path / "bf16").glob("*.safetensors")), "pt") as file:
        names = list(file.keys())
    assert not any(name.endswith("scale") for name in names)


def test_a_graph_computes_as_torch_does(made: Path, source: Path, token_rows: Path) -> None:
    pytest.importorskip("onnxruntime", reason="extra: ort")
    nemoquant.export_onnx(made, progress=False)
    settings: dict[str, Any] = {"data": token_rows, "threads": 1, "card": False}
    torch, graph = (
        nemoquant.diff(source, made, engine=engine, **settings).candidates[0].logits.kl.mean
        for engine in ("torch", "onnxruntime")
    )
    assert graph == pytest.approx(torch, rel=0.02), "float32 both; rounding to FP8 falls otherwise in places"


def test_converted_to_compressed_tensors(made: Path, tmp_path: Path) -> None:
    """Two schemes by that package's own reading; the codes are the same."""
    result = nemoquant.convert(made, tmp_path / "ct", "compressed-tensors", progress=False)
    read = QuantizationConfig.model_validate(section(result.out))
    schemes = {scheme.input_activations is None: scheme for scheme in read.config_groups.values()}
    assert set(schemes) == {False, True}
    assert sorted(schemes[True].targets) == ["re:.*layers\\.0\\.mixer\\.out_proj$", "re:.*lm_head$"]
    assert "re:.*layers\\.4\\.mixer\\.out_proj$" in schemes[False].targets
    before, after = PackedCheckpoint(made), PackedCheckpoint(result.out)
    with before.checkpoint, after.checkpoint:
        assert after.weights_only == before.weights_only
        assert set(after.inputs) == {name for name in before.inputs if not name.endswith(".output")}
        for name in (f"{HEAD}.weight", f"{OUT_PROJ.format(0)}.weight"):
            assert np.array_equal(after.checkpoint.array(name), before.checkpoint.array(name))
    assert nemoquant.verify(result.out)["ok"]


def test_lost_input_scales_are_not_taken_for_it(quantized: Make, tmp_path: Path) -> None:
    """Where a file declares quantized inputs, a scale that is missing is damage."""
    whole = quantized("fp8")

    def without(tensors: dict[str, Any]) -> None:
        del tensors["backbone.layers.0.mixer.in_proj.input_scale"]

    changed = changed_copy(whole, tmp_path / "changed", without)
    refusal(
        "convert", changed, tmp_path / "bf16", "--to", "bf16", parts=["lack `input_scale`", "calibrate again"]
    )


def test_what_engines_do() -> None:
    plan = nemoquant.plan(DEMO, RECIPE)
    file = mixture(plan)
    runs = [outcome(file, "vLLM", sm).runs for sm in (75, 80, 89, 90, 100, 120)]
    assert runs == ["refused", "weights only", *["wrong"] * 4]
    assert {outcome(file, engine, 90).runs for engine in ("vLLM", "SGLang")} == {"wrong"}
    told = cautions(plan)
    assert [text.split(":")[0] for text in told] == ["10 modules are W8A16_FP8"] * 2
    assert "--to compressed-tensors" in told[0] and "SGLANG_FORCE_FP8_MARLIN=1" in told[1]
    result = command("plan", DEMO, "--recipe", RECIPE)
    assert all(f"warning: {text}" in result.stderr for text in told)

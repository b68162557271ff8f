"""verify on a folder without a manifest: what it checks, and what it says that it could not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.commands import nemoquant as command
from support.commands import refusal
from support.files import edit_json
from support.tampering import changed_copy

import nemoquant

Make = Callable[..., Path]
IN_PROJ = "backbone.layers.0.mixer.in_proj"
UP = "backbone.layers.2.mixer.experts.3.up_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def theirs(quantized: Make, tmp_path: Path) -> Callable[..., Path]:
    """A folder as another tool would leave it, with its tensors edited."""

    def make(preset: str = "nvfp4", edit: Callable[[Tensors], object] = lambda _: None) -> Path:
        out = changed_copy(quantized(preset), tmp_path / "theirs", edit)
        (out / "nemoquant_scales.json").unlink(missing_ok=True)
        return out

    return make


@pytest.mark.parametrize("preset", ["fp8", "mxfp8", "nvfp4", "nvfp4-w4a16"])
def test_a_folder_of_another_tool(theirs: Make, preset: str) -> None:
    said = command("verify", theirs(preset))
    (warning, *_) = [line for line in said.stderr.splitlines() if line.startswith("warning: ")]
    assert warning == (
        "warning: it has no nemoquant.json, another tool wrote it: no hash of a file and no plan could be "
        "checked"
    )
    assert ": ok (" in said.stdout and " decoded)" in said.stdout


def test_an_unquantized_one(source: Path) -> None:
    report = nemoquant.verify(source, progress=False)
    assert report["ok"] and report["checked"]["decoded"] == 0 and report["checked"]["tensors"] > 90


def test_against_needs_a_manifest(theirs: Make, source: Path) -> None:
    assert "nemoquant.json does not exist" in refusal("verify", theirs(), "--against", source)


def nan_code(tensors: Tensors) -> None:
    tensors[f"{IN_PROJ}.weight"].view(torch.uint8)[1, 2] = 0x7F


def nan_value(tensors: Tensors) -> None:
    tensors["lm_head.weight"][3, 4] = torch.nan


def block_scale(tensors: Tensors) -> None:
    tensors[f"{UP}.weight_scale"].view(torch.uint8)[0, 1] = 0xFF


def scale(tensors: Tensors) -> None:
    tensors[f"{UP}.weight_scale_2"] = torch.tensor(torch.inf)


def missing(tensors: Tensors) -> None:
    del tensors[f"{UP}.weight_scale"]


def shape(tensors: Tensors) -> None:
    tensors["backbone.norm_f.weight"] = torch.ones(7, dtype=torch.bfloat16)


def extra(tensors: Tensors) -> None:
    tensors["backbone.layers.0.mixer.in_proj.bias"] = torch.ones(7)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (nan_code, f"{IN_PROJ}.weight decodes to NaN or Inf"),
        (nan_value, "lm_head.weight: 1 values are NaN or Inf"),
        (block_scale, f"{UP}.weight_scale: 1 of 96 scales are not finite and positive"),
        (scale, f"{UP}.weight_scale_2 is inf; expected a positive finite scale"),
        (missing, f"{UP}.weight_scale is missing"),
        (shape, "backbone.norm_f.weight is BF16 [7], expected BF16 [64]"),
        (extra, "1 tensors of unknown meaning: backbone.layers.0.mixer.in_proj.bias"),
    ],
)
def test_what_is_wrong(theirs: Make, edit: Callable[[Tensors], object], problem: str) -> None:
    folder = theirs("nvfp4", edit)
    said = command("verify", folder, code=1)
    (line,) = [line for line in said.stderr.splitlines() if line.startswith("problem: ")]
    assert problem in line and f"{folder}: FAILED" in said.stdout


def test_configs_that_contradict_each_other(theirs: Make) -> None:
    folder = theirs("nvfp4")
    edit_json(folder / "hf_quant_config.json", lambda data: data["quantization"].update(quant_algo="FP8"))
    (problem,) = nemoquant.verify(folder, progress=False)["problems"]
    assert "config.json declares the algorithm MIXED_PRECISION, hf_quant_config.json FP8" in problem


def test_a_manifest_that_was_lost(quantized: Make) -> None:
    """What nemoquant wrote has one: without it nothing vouches for the files."""
    out = quantized("fp8")
    (out / "nemoquant.json").unlink()
    words = "nemoquant.json does not exist, and nemoquant wrote nemoquant_scales.json beside one; copy"
    assert words in refusal("verify", out)
    (out / "nemoquant.json").symlink_to("nowhere")
    assert "nemoquant.json is no regular file" in refusal("verify", out)


def test_a_record_that_is_none(quantized: Make, tmp_path: Path) -> None:
    out = nemoquant.convert(quantized("fp8"), tmp_path / "bf16", "bf16", progress=False).out
    record = out / "nemoquant_converted.json"
    data = json.loads(record.read_text())
    assert data["made_from"]["layout"] == "ModelOpt" and data["to"] == "bf16"
    assert not {"time", "host", str(tmp_path)} & set(map(str, data.values()))
    record.write_text("{}")
    assert "is not as nemoquant writes it: `schema`" in refusal("verify", out)
    record.write_text("[")
    assert "cannot be read" in refusal("verify", out)
    record.unlink()
    report = nemoquant.verify(out, progress=False)
    assert report["ok"] and "another tool wrote it" in report["warnings"][0]

"""Model Optimizer's own exports: verified without a manifest, decoded to bf16, written for transformers."""

from pathlib import Path

import pytest
import torch
from support.modelopt_run import MARKS
from support.oracle_tensors import decode
from support.oracle_tensors import read as tensors_of

import nemoquant

pytestmark = [*MARKS, pytest.mark.slow]


@pytest.mark.parametrize("preset", ["fp8", "mxfp8", "nvfp4"])
def test_it_is_verified_and_decoded(runs, preset: str, tmp_path: Path) -> None:
    theirs = runs.theirs(preset)
    report = nemoquant.verify(theirs, progress=False)
    assert report["ok"], report["problems"]
    assert "it has no nemoquant.json" in report["warnings"][0]
    assert nemoquant.inspect(theirs)["quantization"] is not None
    made = nemoquant.convert(theirs, tmp_path / "bf16", "bf16", progress=False)
    found = tensors_of(made.out)
    expected = {
        name.replace("embedding.", "embeddings."): t for name, t in decode(tensors_of(theirs)).items()
    }
    assert set(found) <= set(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), expected[name].to(tensor.dtype).float()), name
    assert nemoquant.plan(made.out, "fp8" if preset != "mxfp8" else "mxfp8").quantized, "it can be quantized"


def test_fp8_for_transformers(runs, tmp_path: Path) -> None:
    made = nemoquant.convert(runs.theirs("fp8"), tmp_path / "ct", "compressed-tensors", progress=False)
    report = nemoquant.verify(made.out, progress=False)
    assert report["ok"] and report["checked"]["decoded"] == 46

"""Every shipped preset that fits the demo model quantizes it, and the result verifies against it, every code encoded again."""

from pathlib import Path

import pytest

import nemoquant
from nemoquant.planning.recipe import presets

DEMO = Path(__file__).resolve().parents[2] / "calib/demo_model"
PRESETS = sorted(set(presets()) - {"super-nvfp4-published"})  # that one fits Super only


@pytest.fixture(scope="module")
def scales(tmp_path_factory):
    """Calibrated once: the file serves every recipe."""
    out = tmp_path_factory.mktemp("fp8") / "out"
    nemoquant.quantize(DEMO, out, "fp8", nemoquant.RunOptions(rows=16))
    return out / "nemoquant_scales.json"


@pytest.mark.parametrize("preset", PRESETS)
def test_preset(preset, scales, tmp_path):
    out = tmp_path / preset
    needed = nemoquant.plan(DEMO, preset).needs_calibration
    result = nemoquant.quantize(DEMO, out, preset, nemoquant.RunOptions(scales=scales) if needed else None)
    assert result.warnings == []
    report = nemoquant.verify(out, against=DEMO)
    assert report["ok"] and not report["problems"] and not report["warnings"]
    assert report["checked"]["encoded_again"] == len(result.plan.quantized) > 0
    assert sum(p.stat().st_size for p in out.glob("*.safetensors")) < sum(p.stat().st_size for p in DEMO.glob("*.safetensors"))

"""Every shipped preset that fits the demo model quantizes it, and the result verifies.

Verify encodes every code again from the source.
"""

import pytest
from support.places import DEMO

import nemoquant
from nemoquant.layouts.engines import cautions
from nemoquant.planning.recipe import presets

OF_OTHERS = {"super-nvfp4-published", "nano-fp8-published", "nano-nvfp4-published"}  # they name layers
PRESETS = sorted(set(presets()) - OF_OTHERS)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset(preset, demo, tmp_path):
    """Calibrated once, also for the graphs' tests: one scales file serves every recipe by method max."""
    out, scales = tmp_path / preset, demo("nvfp4") / "nemoquant_scales.json"
    needed = nemoquant.plan(DEMO, preset, method="max").needs_calibration
    options = nemoquant.RunOptions(method="max", scales=scales if needed else None)
    result = nemoquant.quantize(DEMO, out, preset, options)
    assert result.warnings == cautions(result.plan)
    assert len(result.warnings) == (preset == "nvfp4-full-w4a16"), "SGLang reads its in_proj wrongly"
    report = nemoquant.verify(out, against=DEMO)
    assert report["ok"] and not report["problems"] and not report["warnings"]
    assert report["checked"]["encoded_again"] == len(result.plan.quantized) > 0
    assert sum(p.stat().st_size for p in out.glob("*.safetensors")) < sum(
        p.stat().st_size for p in DEMO.glob("*.safetensors")
    )

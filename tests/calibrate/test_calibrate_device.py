"""Calibration on a simulated device (tests/support/elsewhere.py).

No matrix product is left on the CPU, and the scales equal the CPU's.
"""

from pathlib import Path

import pytest
import torch
from support.elsewhere import ELSEWHERE, Elsewhere

from nemoquant.calibrate.observers import AmaxCollector
from nemoquant.calibrate.run import calibrate
from nemoquant.calibrate.scales import Scales
from nemoquant.sources.source import open_source
from nemoquant.tokens.rows import load_rows


def test_layers_are_on_the_device(source: Path, token_rows: Path) -> None:
    """Within 1e-5 (docs/design.md, "Reproducible"): sums are taken in another order."""
    opened = open_source(source)
    rows = load_rows(token_rows, source, opened.config, 8, 32)

    def run(device: str) -> Scales:
        amax = AmaxCollector(opened.config, Scales())
        calibrate(
            opened.checkpoint, opened.config, rows, [amax], device=device, dtype=torch.float32, row_batch=4
        )
        return amax.scales

    expected, device = run("cpu"), Elsewhere()
    with device:
        found = run(ELSEWHERE.type)
    assert found.input_amax == pytest.approx(expected.input_amax, rel=1e-5)
    assert found.kv_amax == pytest.approx(expected.kv_amax, rel=1e-5)
    assert device.here["mm"] + device.here["bmm"] == 0
    assert device.there["mm"] > 100
    assert device.changed == 0, "bf16 crosses as bf16"

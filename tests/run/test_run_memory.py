"""Bounded memory: the peak stays under the limit for a checkpoint three times as large as the limit.

Peak is VmHWM of a separate process, above that of a process that only imports the same modules and compiles
the kernels.
"""

import json
from pathlib import Path

import pytest
from support.measured import LARGE, child, large_checkpoint, needs_proc

LIMIT = 180e6
CONFIG = LARGE | {"hybrid_override_pattern": "ME*E", "num_hidden_layers": 4}

CHILD = """
import numpy as np, torch
from nemoquant import api
from nemoquant.calibrate import run, scales
from nemoquant.tokens import rows as data
from nemoquant.formats import amax, fp8, nvfp4
from nemoquant.pack import card, verify, write

source, out, preset, options = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
weight = np.ones((16, 1024), np.uint16)
fp8.encode(weight, 1.0), nvfp4.encode(weight, 1.0), amax.amax(weight)
torch.set_num_threads(2)
for dtype in (torch.bfloat16, torch.float32):
    torch.nn.functional.linear(torch.ones(128, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype))
if preset != "none":
    options = {k: Path(v) if k in ("data", "scales") else v for k, v in options.items()}
    api.quantize(source, out, preset, api.RunOptions(method="max", **options, threads=2))
print(memory())
"""

pytestmark = [
    pytest.mark.slow,
    needs_proc,
]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A checkpoint of half a gigabyte."""
    return large_checkpoint(tmp_path_factory.mktemp("large"), CONFIG, (4, 128))


def peak(source, out, preset, **options):
    return child(
        CHILD,
        source,
        out,
        preset,
        json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in options.items()}),
    )


@pytest.fixture(scope="module")
def baseline(large):
    return peak(large, large.parent / "none", "none")


def test_peak_memory_stays_under_the_limit(large, baseline, tmp_path):
    size = (large / "model.safetensors").stat().st_size
    assert size > 2.9 * LIMIT
    rows, scales = large.parent / "rows.npy", tmp_path / "calibrated/nemoquant_scales.json"
    found = {
        "weights only": peak(large, tmp_path / "w4a16", "nvfp4-w4a16"),
        "calibrated": peak(large, tmp_path / "calibrated", "fp8", data=rows, row_batch=2),
        "given scales": peak(large, tmp_path / "scales", "nvfp4", scales=scales),
    }
    above = {run: round((value - baseline) / 1e6) for run, value in found.items()}
    print(f"MB above {baseline / 1e6:.0f}: {above}")
    assert max(above.values()) < LIMIT / 1e6, above

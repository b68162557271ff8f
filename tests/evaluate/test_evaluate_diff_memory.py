"""Bounded memory: with 0.8 GB of source, diffs of the source itself and an output take a fraction of that.

Peak is VmHWM of a separate process, above that of a process that imports the same modules, compiles the
kernels and runs a small diff. The difference consists of the pages of weights that both sides hold at a time
(``HELD_BYTES``: 67 MB each), and some 50 MB of arrays: weights decoded or widened to float32 (17 MB for
Mamba-2's in_proj), the streams and logits of the rows.
"""

from pathlib import Path

import pytest
from support.measured import LARGE, child, large_checkpoint, needs_proc

LIMIT = 220e6
CONFIG = LARGE | {"hybrid_override_pattern": "ME*EE", "num_hidden_layers": 5}

CHILD = """
import torch
from nemoquant import api

def measure(folder, rows, *candidates):
    report = api.diff(folder, candidates, data=rows, threads=1, card=False)
    assert report.data.rows

folder, rows, small = (Path(a) for a in sys.argv[1:4])
measure(small / "source", small / "rows.npy", small / "nvfp4")
torch.nn.functional.linear(torch.ones(128, 1024), torch.ones(1024, 1024))
if sys.argv[4:]:
    measure(folder, rows, *(Path(a) for a in sys.argv[4:]))
print(memory())
"""

pytestmark = [
    pytest.mark.slow,
    needs_proc,
]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A checkpoint of 0.8 GB."""
    return large_checkpoint(tmp_path_factory.mktemp("large"), CONFIG, (2, 64))


def test_peak_memory_stays_under_the_limit(large, quantized, tmp_path):
    size = (large / "model.safetensors").stat().st_size
    assert size > 3.5 * LIMIT
    quantized("nvfp4")  # the small one: loads kernels and libraries first
    out = quantized("nvfp4-w4a16", name="large", of=large)

    def peak(*candidates):
        return child(CHILD, large, large.parent / "rows.npy", tmp_path, *candidates)

    baseline = peak()
    found = {"NVFP4": peak(out), "the source itself": peak(large), "both": peak(large, out)}
    above = {run: round((value - baseline) / 1e6) for run, value in found.items()}
    print(f"MB above {baseline / 1e6:.0f}: {above}")
    assert max(above.values()) < LIMIT / 1e6, above

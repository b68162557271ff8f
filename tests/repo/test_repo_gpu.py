"""`tests/gpu` and the checks of `bench/gpu` run where torch, Triton, NumPy and pytest are all there is."""

import os
import subprocess
import sys

from support.places import ROOT

PROGRAM = """
import sys

import pytest
from support.plain_machine import forbid

hidden = forbid()
assert {"numba", "pydantic", "plotly", "click", "rich", "yaml", "safetensors"} <= set(hidden), hidden
import bench.gpu.bench_ops
import bench.gpu.check_ops
import bench.gpu.environment

sys.exit(pytest.main(["tests/gpu", "-q", "-p", "no:cacheprovider"]))
"""


def test_a_machine_with_torch_alone_runs_them() -> None:
    """Without a device all are skipped, by name; those of the CPU's bytes and of whole files need more."""
    given = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # they are other packages
        "PYTEST_ADDOPTS": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    said = done.stdout.split("= tests/gpu =")[1].splitlines()
    assert "tests/gpu: NOTHING RAN, " in said[1]
    files = {"causal_conv1d", "first_calls", "grouped_experts", "mamba2_scan", "routed_experts"}
    names = ", ".join(sorted(f"test_gpu_{name}.py" for name in files))
    assert said[2].endswith(f" for want of a CUDA device: {names}")
    assert [line.split(" for want of ")[1] for line in said[3:5]] == [
        "numba, which the API imports: test_gpu_files.py",
        "numba, for the CPU's bytes: test_gpu_packing.py",
    ]

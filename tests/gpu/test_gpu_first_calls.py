"""The first call of each operator in a process is one that a CUDA graph captures: see first_call.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.gpu_needs import needs_kernel
from support.places import ROOT
from test_gpu_grouped_experts import needs_grouped

PROGRAM = Path(__file__).with_name("first_call.py")
OPERATORS = {
    "decode": "mamba2_scan",
    "prefill": "mamba2_scan",
    "convolution": "causal_conv1d",
    "experts": "routed_experts",
}


@pytest.mark.parametrize(
    "name",
    [
        *[pytest.param(name, marks=needs_kernel(op)) for name, op in OPERATORS.items()],
        pytest.param("grouped experts", marks=needs_grouped),
    ],
)
def test_the_first_call_of_a_process_is_captured(name: str) -> None:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, PROGRAM, name],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]

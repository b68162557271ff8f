"""Nothing is reported to anyone: onnxruntime would, from its import on."""

import importlib.util
import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from nemoquant.engine.onnxruntime import package
runtime = package()
assert "onnxruntime" in sys.modules
"""


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_onnxruntime_reports_nothing(tmp_path):
    """It keeps what it will send in the home folder: nothing is there."""
    kept = ("PATH", "PYTHONPATH")  # not CI, which would forbid it too
    environment = {name: os.environ[name] for name in kept if name in os.environ} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [path for path in tmp_path.rglob("*") if "icrosoft" in str(path.relative_to(tmp_path))] == []

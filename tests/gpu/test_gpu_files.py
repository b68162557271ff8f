"""`quantize` and `diff` on a CUDA device: whole files with the CPU's bytes, and the CPU's figures.

They need the project with its dependencies, of which a GPU machine may lack some.
"""

# ruff: noqa: E402 - nemoquant.api imports the dependencies

import importlib.util
from pathlib import Path

import pytest
from support.gpu_needs import needs

for name in ("numba", "pydantic", "safetensors", "tokenizers", "xxhash", "yaml", "jinja2"):
    pytest.importorskip(name, reason=f"needs {name}, which the API imports")

from nemoquant.api import RunOptions, diff, quantize

pytestmark = needs("Triton", importlib.util.find_spec("triton") is not None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_and_figures(source: Path, token_rows: Path, tmp_path: Path) -> None:
    """Whole outputs with given scales are equal byte for byte.

    Calibration on the device is within 1e-5, the diff within the effect of flipped codes.
    """
    made: dict[str, Path] = {}
    for device in ("cpu", "cuda"):
        options = RunOptions(method="max", data=token_rows, dtype="float32", device=device, threads=4)
        made[device] = quantize(source, tmp_path / device, "nvfp4", options).out
    given = RunOptions(method="max", scales=made["cpu"] / "nemoquant_scales.json", device="cuda", threads=4)
    assert contents(quantize(source, tmp_path / "given", "nvfp4", given).out) == contents(made["cpu"])
    reports = [
        diff(source, list(made.values()), data=token_rows, card=False, device=device)
        for device in ("cpu", "cuda")
    ]
    for one, two in zip(*(report.candidates for report in reports), strict=True):
        assert two.logits.kl.mean == pytest.approx(one.logits.kl.mean, rel=0.05)
    itself = diff(source, [source], data=token_rows, card=False, device="cuda", threads=4)
    assert itself.candidates[0].logits.kl.max == 0

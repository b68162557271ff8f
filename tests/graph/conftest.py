"""The trained demo model in each preset with its graphs, made once in a session."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemoquant.api import RunOptions, export_onnx, quantize

DEMO = Path(__file__).resolve().parents[2] / "calib/demo_model"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The demo model's folder in a preset (``bf16`` is a copy of the source), with model.onnx and mtp.onnx; calibrated once.

    What changes such a folder must copy it first.
    """
    base = tmp_path_factory.mktemp("demo")

    def make(preset: str) -> Path:
        out = base / preset
        if out.exists():
            return out
        if preset == "bf16":
            return export_onnx(DEMO, out, mtp=True).folder
        options = RunOptions(threads=1)
        if preset != "nvfp4-w4a16":
            scales = None if preset == "nvfp4" else make("nvfp4") / "nemoquant_scales.json"
            options = RunOptions(rows=4, seq_len=128, dtype="float32", scales=scales, threads=1)
        quantize(DEMO, out, preset, options)
        return export_onnx(out, mtp=True).folder

    return make


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., Path]:
    """A folder of one's own with the same files; ``graphs`` False leaves these out (and out of no manifest)."""

    def make(folder: Path, name: str = "copy", graphs: bool = True) -> Path:
        ignored = shutil.ignore_patterns() if graphs else shutil.ignore_patterns("*.onnx")
        return Path(shutil.copytree(folder, tmp_path / name, ignore=ignored))

    return make

"""Output to look at: a checkpoint quantized through the API, with the small calibration that the fixture model can take."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemoquant.api import Result, RunOptions, quantize


@pytest.fixture
def quantized(source: Path, token_rows: Path, tmp_path: Path) -> Callable[..., Path]:
    """Quantizes ``source`` (or the folder given) and returns the new folder."""

    def make(preset: str = "fp8", name: str = "out", of: Path = source, scales: Path | None = None, **options: Any) -> Path:
        given = {"data": token_rows, "dtype": "float32", "scales": scales, "threads": 1, **options}
        result: Result = quantize(of, tmp_path / name, preset, RunOptions(**given))
        return result.out

    return make


@pytest.fixture
def scales_of() -> Callable[[Path], dict[str, Any] | None]:
    """Content of an output's scales file, None where it needed none."""

    def load(out: Path) -> dict[str, Any] | None:
        file = out / "nemoquant_scales.json"
        return json.loads(file.read_text()) if file.exists() else None

    return load

"""What is compared: the synthetic source quantized with a small calibration, and copies with a changed tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from nemoquant.api import RunOptions, diff, quantize
from nemoquant.checkpoint.header import TensorInfo, read_header
from nemoquant.evaluate.schema import Report

INDEX = "model.safetensors.index.json"


@pytest.fixture
def quantized(source: Path, token_rows: Path, tmp_path: Path) -> Callable[..., Path]:
    """Quantizes ``source`` (or the folder given) and returns the new folder, which is named like the preset."""

    def make(preset: str = "nvfp4", name: str | None = None, of: Path = source, **options: Any) -> Path:
        given = {"data": token_rows, "dtype": "float32", "threads": 1, **options}
        return quantize(of, tmp_path / (name or preset), preset, RunOptions(**given)).out

    return make


@pytest.fixture
def compare(token_rows: Path) -> Callable[..., Report]:
    """Runs the diff through the API, over all of ``token_rows``, one thread, cards left alone."""

    def run(source: Path, *candidates: Path, **options: Any) -> Report:
        return diff(source, candidates, **{"data": token_rows, "threads": 1, "card": False, **options})

    return run


def stored(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder, by the name that its file gives it."""
    return {name: info for file in sorted(folder.glob("*.safetensors")) for name, info in read_header(file)[0].items()}


@pytest.fixture
def overwrite() -> Callable[..., None]:
    """Changes a tensor's bytes where they lie: ``change`` is given all of them and returns as many."""

    def run(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
        info = stored(folder)[name]
        with info.file.open("r+b") as f:
            f.seek(info.start)
            data = f.read(info.nbytes)
            f.seek(info.start)
            new = change(data)
            assert len(new) == len(data)
            f.write(new)

    return run


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """Copies a folder with ``edit`` done to its tensors (a dict by name) and ``config`` put into its config.json."""

    def make(folder: Path, edit: Callable[[dict[str, Any]], Any], name: str = "changed", **config: Any) -> Path:
        out = tmp_path / name
        shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
        tensors = {key: t for file in sorted(folder.glob("*.safetensors")) for key, t in load_file(file).items()}
        edit(tensors)
        save_file({key: t.contiguous() for key, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
        file = out / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return out

    return make

"""Fixtures that several rooms use: the synthetic checkpoint, its outputs, the demo model in each preset.

`tests/gpu` runs where torch, Triton, NumPy and pytest are all there is: what needs more is imported by the
fixture that needs it.
"""

# ruff: noqa: E402 - a worker's number of threads is set before any import of torch

import os

WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # of pytest -n
if WORKER:  # one thread for each worker, and for the processes that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.once import Once
from support.places import DEMO

if TYPE_CHECKING:
    from nemoquant.evaluate.schema import Report


def pytest_configure(config: pytest.Config) -> None:
    """xdist keeps the order below; by default it starts with the file that has most tests."""
    config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For ``pytest -n 2 --dist loadfile``: files with slow tests first, so that none is left for the end.

    One worker runs all tests of a file, and makes the file's fixtures once. What several files share is made
    once under a lock (``once``, and the host libraries).
    """
    if WORKER:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: the collector needn't look at it again and again.

    Plans of large models have a hundred thousand objects and no circles: at Python's own threshold, a third
    of their time went into looking for some.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def one_thread_a_worker() -> Iterator[None]:
    """Commands set the number of threads of the worker's process; this resets it to one after each test."""
    yield
    if WORKER:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def stamps(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where stamps of hashed checkpoints are kept in tests: not in the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "stamps"
    if importlib.util.find_spec("pydantic") is None:  # then nothing can hash a checkpoint
        return folder
    from nemoquant.checkpoint import intact

    monkeypatch.setattr(intact, "stamp_folder", lambda: folder)
    return folder


@pytest.fixture
def unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once it was called, a shard that is hashed to load a checkpoint ends the test."""
    from nemoquant.checkpoint import intact

    def forbid() -> None:
        monkeypatch.setattr(intact, "stamp_folder", lambda: tmp_path / "no stamps")
        monkeypatch.setattr(intact, "Reading", None)

    return forbid


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Makes a checkpoint. Config keys are changed by name; ``edit`` changes the tensors before writing."""
    from support.synthetic import CONFIG, random_tensors, write_checkpoint

    def make(
        name: str = "source",
        edit: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None,
        seed: int = 0,
        **changes: Any,
    ) -> Path:
        raw = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
        raw["num_hidden_layers"] = len(raw["hybrid_override_pattern"])
        tensors = random_tensors(raw, seed)
        edit(tensors)
        return write_checkpoint(tmp_path / name, raw, tensors)

    return make


@pytest.fixture
def source(fitting: Callable[..., Path]) -> Path:
    """The base checkpoint, unchanged."""
    return fitting("")


@pytest.fixture
def fitting(make_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """The base checkpoint for a preset, with sizes that its blocks divide; made at the first request."""
    from support.synthetic import WIDE

    def make(preset: str, **changes: Any) -> Path:
        wide = Path(preset).stem == "mxfp8"
        name = "wide" if wide else "source"
        made = made_already.get(name)
        if made is None:
            made = made_already[name] = make_checkpoint(name, **(WIDE if wide else {}), **changes)
        return made

    made_already: dict[str, Path] = {}
    return make


@pytest.fixture
def token_rows(tmp_path: Path) -> Path:
    """Calibration tokens for it, [8, 32]."""
    from support.synthetic import write_rows

    return write_rows(tmp_path / "rows.npy")


@pytest.fixture
def quantized(fitting: Callable[..., Path], token_rows: Path, tmp_path: Path) -> Callable[..., Path]:
    """Quantizes ``fitting`` (or the folder given); returns the new folder, which has the preset's name."""
    from nemoquant.api import RunOptions, quantize

    def make(
        preset: str = "nvfp4",
        name: str | None = None,
        of: Path | None = None,
        scales: Path | None = None,
        **options: Any,
    ) -> Path:
        from nemoquant.planning.recipe import presets

        given = {"data": token_rows, "dtype": "float32", "scales": scales, "threads": 1, **options}
        if preset in presets():
            given.setdefault("method", "max")  # codes that an oracle knows
        return quantize(
            of or fitting(preset), tmp_path / (name or Path(preset).stem), preset, RunOptions(**given)
        ).out

    return make


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """Copies a folder; ``edit`` changes its tensors (a dict by name), ``config`` updates its config.json."""
    from support.tampering import changed_copy

    return lambda folder, edit, name="changed", **config: changed_copy(
        folder, tmp_path / name, edit, **config
    )


@pytest.fixture
def compare(token_rows: Path) -> "Callable[..., Report]":
    """Runs the diff through the API, on all of ``token_rows``, with one thread; cards are not changed."""
    from nemoquant.api import diff

    def run(source: Path, *candidates: Path, **options: Any) -> "Report":
        return diff(source, candidates, **{"data": token_rows, "threads": 1, "card": False, **options})

    return run


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Makes a folder once in a session, in whichever worker needs it first. Copy it before changing it."""
    base = tmp_path_factory.getbasetemp()
    return Once((base.parent if WORKER else base) / "once")


@pytest.fixture(scope="session")
def demo(once: Once) -> Callable[[str], Path]:
    """The demo model's folder in a preset, with codes by method max, and both graphs; calibrated once.

    ``bf16`` is a copy of the source.
    """
    from nemoquant.api import RunOptions, export_onnx, quantize

    def make(preset: str) -> Path:
        def build(out: Path) -> None:
            if preset == "bf16":
                export_onnx(DEMO, out, mtp=True)
                return
            options = RunOptions(threads=1, method="max")
            if preset != "nvfp4-w4a16":
                scales = None if preset == "nvfp4" else make("nvfp4") / "nemoquant_scales.json"
                options = RunOptions(
                    rows=4, seq_len=128, dtype="float32", scales=scales, threads=1, method="max"
                )
            quantize(DEMO, out, preset, options)
            export_onnx(out, mtp=True)

        return once(f"demo/{preset}", build)

    return make


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., Path]:
    """A separate folder with the same files.

    ``graphs`` False leaves the graphs out. No manifest lists them.
    """

    def make(folder: Path, name: str = "copy", graphs: bool = True) -> Path:
        ignored = shutil.ignore_patterns() if graphs else shutil.ignore_patterns("*.onnx")
        return Path(shutil.copytree(folder, tmp_path / name, ignore=ignored))

    return make

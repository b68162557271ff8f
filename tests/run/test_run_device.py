"""Packing on a GPU, by Triton's interpreter in separate processes: the same files, and refusals.

Each weight is sent to the device once.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import nemoquant as command
from support.files import changed_files
from support.processes import run_python

from nemoquant import api
from nemoquant.api import RunOptions, quantize
from nemoquant.checkpoint import identity
from nemoquant.errors import Interrupted, MissingExtraError, UsageError
from nemoquant.formats import gpu

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (extra: dev)"
)

RUN = """
import json, sys
from pathlib import Path
from nemoquant import api
from nemoquant.checkpoint import identity
from nemoquant.formats import gpu
from nemoquant.pack import encode

source, out, preset = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
options, calibration = map(json.loads, sys.argv[4:])
identity.PIECE_BYTES = 4096  # so that weights of this size have several chunks
sent, put = [], gpu.put
gpu.put = lambda weight: sent.append(weight.shape) or put(weight)
options = api.RunOptions(method="max", **calibration, device="cuda", **options)
made = api.quantize(source, out, preset, options)
chunks = [part for row in made.plan.quantized for part in encode.slices(row)]
print(json.dumps({"sent": len(sent), "chunks": len(chunks)}))
"""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same here: hashes of a source depend on its pieces."""
    monkeypatch.setattr(identity, "PIECE_BYTES", 4096)


def on_gpu(
    source: Path, out: Path, preset: str, calibration: dict[str, Any] | None = None, **options: Any
) -> dict[str, int]:
    """``quantize`` on the device cuda; returns the number of weights sent there, and of chunks."""
    arguments = [source, out, preset, json.dumps({"threads": 2} | options), json.dumps(calibration or {})]
    done = run_python(RUN, *arguments, TRITON_INTERPRET="1")
    found: dict[str, int] = json.loads(done.stdout)
    return found


def stopping(at: str | None) -> Callable[..., None]:
    """Progress that ends the run in the middle of a stage, as Ctrl-C does."""

    def report(*told: Any) -> None:
        stage, done, total, _ = told
        if stage == at and done > total / 2:
            raise KeyboardInterrupt

    return report


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4-w4a16"])
def test_every_file_is_that_of_the_cpu(preset: str, source: Path, token_rows: Path, tmp_path: Path) -> None:
    """With and without calibration; verify, which runs on the CPU, encodes everything again.

    The interpreter's cuda is this CPU.
    """
    calibration = {"data": str(token_rows), "dtype": "float32", "row_batch": 8}
    quantize(source, tmp_path / "expected", preset, RunOptions(method="max", **calibration, threads=2))
    found = on_gpu(source, tmp_path / "found", preset, calibration)
    assert found["chunks"] >= 2 * 8 * 2, "experts"
    assert found["sent"] == found["chunks"], "each chunk goes there once, for its maximum and its codes"
    assert changed_files(tmp_path / "expected", tmp_path / "found") == []
    assert api.verify(tmp_path / "found", source)["ok"]


@needs_triton
@pytest.mark.slow
def test_a_run_goes_on_with_the_other_device(
    source: Path, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    """Begun on the CPU, interrupted between shards, resumed on the GPU, with given scales.

    The files equal those of an uninterrupted run.
    """
    scales = quantized("fp8", "first") / "nemoquant_scales.json"
    expected = quantized("fp8", "expected", scales=scales, shard_bytes=30_000)

    out = tmp_path / "out"
    options: dict[str, Any] = {"threads": 1, "shard_bytes": 30_000}
    with pytest.raises(Interrupted, match="shards written"):
        quantize(
            source, out, "fp8", RunOptions(method="max", scales=scales, **options), progress=stopping("pack")
        )
    found = on_gpu(source, out, "fp8", {"scales": str(scales)}, shard_bytes=30_000, resume=True)
    assert 0 < found["sent"] < found["chunks"]
    assert changed_files(expected, out) == []


def test_after_calibration_the_device_may_change(
    source: Path,
    token_rows: Path,
    quantized: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before that, another device would change the calibration: the run is refused.

    Only the device's name is used: nothing runs on a GPU here. After calibration, the dtype that the other
    device would choose for calibration does not matter either.
    """
    usual = {"cpu": "float32", "cuda": "bfloat16"}
    monkeypatch.setattr("nemoquant.run.job.compute_dtype", lambda device: usual[device])
    monkeypatch.setattr(gpu, "check", lambda device: None)
    monkeypatch.setattr("nemoquant.run.job.torch_device", lambda device: torch.device("cpu"))
    expected = quantized("fp8", "expected", shard_bytes=30_000)

    def run(device: Any, at: str | None, resume: bool = False) -> None:
        options = RunOptions(
            method="max", data=token_rows, device=device, threads=1, shard_bytes=30_000, resume=resume
        )
        quantize(source, tmp_path / "out", "fp8", options, progress=stopping(at))

    with pytest.raises(Interrupted, match="layers calibrated"):
        run("cpu", "calibrate")
    with pytest.raises(UsageError, match="--device was cpu and is cuda"):
        run("cuda", None, resume=True)
    with pytest.raises(Interrupted, match="shards written"):
        run("cpu", "pack", resume=True)
    monkeypatch.setattr(gpu, "chosen", lambda device: False)
    run("cuda", None, resume=True)
    assert changed_files(expected, tmp_path / "out") == []


# Refusals.


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a machine without a GPU")
@pytest.mark.parametrize(
    "verb", [("quantize", "out", "--recipe", "nvfp4-w4a16"), ("plan", "--estimate", "--fmt", "fp8")]
)
def test_without_a_gpu_nothing_is_read(
    verb: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that does not exist is not checked first; recipes without calibration are refused too."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("nemoquant.api.quantizing.open_weights", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(api, "plan", lambda *arguments, **options: None)
    name, *rest = verb
    result = command(name, tmp_path / "none", *rest, "--device", "cuda", code=2)
    assert "device: got cuda, but torch finds no CUDA GPU here (torch " in result.stderr
    assert "expected one, or take device cpu" in result.stderr


@pytest.fixture
def seeming_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("seeming_gpu")
def test_without_triton(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest)
    )
    with pytest.raises(
        MissingExtraError,
        match="device cuda needs Triton, which torch for CUDA brings along: pip install triton",
    ):
        quantize(source, tmp_path / "out", "nvfp4-w4a16", RunOptions(device="cuda"))
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.usefixtures("seeming_gpu")
def test_a_gpu_that_can_not_be_used(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            "CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with TORCH_USE_CUDA_DSA"
        )

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    monkeypatch.setattr(torch, "empty", busy)
    says = r"torch can't use the GPU \(CUDA error: all CUDA-capable devices are busy or unavailable\); "
    says += "free it, or take device cpu"
    with pytest.raises(UsageError, match=says):
        quantize(source, tmp_path / "out", "fp8", RunOptions(device="cuda"))

"""Packing on a GPU, by Triton's interpreter in processes of their own: the same files, each weight sent there once; and what is refused."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from nemoquant import api
from nemoquant.api import RunOptions, quantize
from nemoquant.cli import main
from nemoquant.errors import Interrupted, MissingExtraError, UsageError
from nemoquant.formats import gpu

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (extra: dev)")

RUN = """
import json, sys
from pathlib import Path
from nemoquant import api
from nemoquant.formats import gpu
from nemoquant.pack import encode

source, out, preset, options, calibration = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], *map(json.loads, sys.argv[4:])
encode.CHUNK_BYTES = 4096  # so that weights of this size have several chunks
sent, put = [], gpu.put
gpu.put = lambda weight: sent.append(weight.shape) or put(weight)
made = api.quantize(source, out, preset, api.RunOptions(**calibration, device="cuda", **options))
chunks = [part for row in made.plan.quantized for part in encode.slices(row)]
print(json.dumps({"sent": len(sent), "chunks": len(chunks)}))
"""


def on_gpu(source: Path, out: Path, preset: str, calibration: dict[str, Any] | None = None, **options: Any) -> dict[str, int]:
    """``quantize`` with the device cuda; how many weights were sent there, and how many chunks there are."""
    arguments = [str(source), str(out), preset, json.dumps({"threads": 2} | options), json.dumps(calibration or {})]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, int] = json.loads(done.stdout)
    return found


def stopping(at: str | None) -> Callable[..., None]:
    """Progress that ends the run, as Ctrl-C does, in the middle of a stage."""

    def report(*told: Any) -> None:
        stage, done, total, _ = told
        if stage == at and done > total / 2:
            raise KeyboardInterrupt

    return report


def changed(a: Path, b: Path) -> list[str]:
    """Names of the files that differ or are missing on a side."""
    files = {path.name for folder in (a, b) for path in folder.iterdir()}
    return sorted(
        n for n in files if not ((a / n).exists() and (b / n).exists() and (a / n).read_bytes() == (b / n).read_bytes())
    )


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4-w4a16"])
def test_every_file_is_that_of_the_cpu(preset: str, source: Path, token_rows: Path, tmp_path: Path) -> None:
    """With calibration and without; verify, which runs on the CPU, encodes everything again. (The interpreter's cuda is this CPU.)"""
    calibration = {"data": str(token_rows), "dtype": "float32", "row_batch": 8}
    quantize(source, tmp_path / "expected", preset, RunOptions(**calibration, threads=2))
    found = on_gpu(source, tmp_path / "found", preset, calibration)
    assert found["chunks"] >= 2 * 8 * 2, "experts"
    assert found["sent"] == found["chunks"], "each chunk goes there once, for its maximum and its codes"
    assert changed(tmp_path / "expected", tmp_path / "found") == []
    assert api.verify(tmp_path / "found", source)["ok"]


@needs_triton
@pytest.mark.slow
def test_a_run_goes_on_with_the_other_device(source: Path, quantized: Callable[..., Path], tmp_path: Path) -> None:
    """Begun on the CPU, interrupted between shards, gone on with on the GPU, with scales given: the file set of a run in one go."""
    scales = quantized("fp8", "first") / "nemoquant_scales.json"
    expected = quantized("fp8", "expected", scales=scales, shard_bytes=30_000)

    out = tmp_path / "out"
    options: dict[str, Any] = {"threads": 1, "shard_bytes": 30_000}
    with pytest.raises(Interrupted, match="shards written"):
        quantize(source, out, "fp8", RunOptions(scales=scales, **options), progress=stopping("pack"))
    found = on_gpu(source, out, "fp8", {"scales": str(scales)}, shard_bytes=30_000, resume=True)
    assert 0 < found["sent"] < found["chunks"]
    assert changed(expected, out) == []


def test_after_calibration_the_device_may_change(
    source: Path, token_rows: Path, quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, it decides what is calibrated: then the run is refused. (The device's name alone: nothing runs on a GPU here.)

    Nor does it matter then in which dtype the other device would have calibrated by itself.
    """
    usual = {"cpu": "float32", "cuda": "bfloat16"}
    monkeypatch.setattr("nemoquant.run.job.compute_dtype", lambda device: usual[device])
    monkeypatch.setattr(gpu, "check", lambda device: None)
    monkeypatch.setattr("nemoquant.run.job.torch_device", lambda device: torch.device("cpu"))
    expected = quantized("fp8", "expected", shard_bytes=30_000)

    def run(device: Any, at: str | None, resume: bool = False) -> None:
        options = RunOptions(data=token_rows, device=device, threads=1, shard_bytes=30_000, resume=resume)
        quantize(source, tmp_path / "out", "fp8", options, progress=stopping(at))

    with pytest.raises(Interrupted, match="layers calibrated"):
        run("cpu", "calibrate")
    with pytest.raises(UsageError, match="--device was cpu and is cuda"):
        run("cuda", None, resume=True)
    with pytest.raises(Interrupted, match="shards written"):
        run("cpu", "pack", resume=True)
    monkeypatch.setattr(gpu, "chosen", lambda device: False)
    run("cuda", None, resume=True)
    assert changed(expected, tmp_path / "out") == []


# A lane.


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> gpu._Lane:
    """A thread's memory with the GPU's half on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "_lanes", type("Lanes", (), {})())
    return gpu._lane()


def test_a_lane_keeps_its_memory_and_grows_to_the_largest_weight(lane: gpu._Lane) -> None:
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray[Any, Any]:
        return rng.integers(0, 1 << 16, shape, np.uint16)

    large, small = weight(48, 32), weight(4, 16)
    first = gpu.put(large)
    assert first.shape == (48, 32)
    np.testing.assert_array_equal(first.bits.numpy().view(np.uint16), large.reshape(-1))
    assert gpu.put(first) is first, "what is there already stays"
    second = gpu.put(small)
    np.testing.assert_array_equal(second.bits.numpy().view(np.uint16), small.reshape(-1))
    assert second.bits.data_ptr() == first.bits.data_ptr(), "one weight at a time, in the same memory"
    third = gpu.put(weight(49, 32).astype(np.float32))
    assert third.bits.dtype == torch.int32
    assert {(name, here): m.numel() for (name, here), m in lane._memory.items()} == {
        ("weight", True): 4 * 49 * 32,
        ("weight", False): 4 * 49 * 32,
    }
    assert lane.receive(third.bits.view(torch.uint8)).tobytes() == third.bits.numpy().tobytes()


def test_pinned_memory_is_not_written_before_it_was_read(lane: gpu._Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stream that does nothing until it is waited for, as a GPU that is far behind."""
    from contextlib import nullcontext

    class Late:
        def __init__(self) -> None:
            self.work: list[Callable[[], object]] = []

        def synchronize(self) -> None:
            while self.work:
                self.work.pop(0)()

    stream = lane.stream = Late()
    copy, empty = torch.Tensor.copy_, torch.empty
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **options: empty(*sizes, **options))
    monkeypatch.setattr(
        torch.Tensor,
        "copy_",
        lambda there, here, non_blocking: stream.work.append(lambda: copy(there, here)) if non_blocking else None,
    )
    there = gpu.put(np.full((2, 16), 7, np.uint16)).bits.view(torch.uint8)
    gpu.put(np.full((2, 16), 9, np.uint16))
    assert set(there.view(torch.int16).tolist()) == {7}, "the second one is on its way, the first one has come"
    assert set(lane.receive(there).view(np.uint16).tolist()) == {9}
    gpu.put(np.full((4, 16), 5, np.uint16))
    assert set(lane.receive(lane.memory("weight", 128)).view(np.uint16).tolist()) == {5}, "and when it grew"


# Refusals.


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a machine without a GPU")
@pytest.mark.parametrize("verb", [("quantize", "out", "--recipe", "nvfp4-w4a16"), ("plan", "--estimate", "--fmt", "fp8")])
def test_without_a_gpu_nothing_is_read(verb: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that does not even exist is not looked at; recipes without calibration are refused too."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(api, "open_weights", lambda path: pytest.fail("read"))
    monkeypatch.setattr(api, "plan", lambda *arguments, **options: None)
    name, *rest = verb
    result = CliRunner().invoke(main, [name, str(tmp_path / "none"), *rest, "--device", "cuda"])
    assert result.exit_code == 2
    assert "device: got cuda, but torch finds no CUDA GPU here (torch " in result.stderr
    assert "expected one, or take device cpu" in result.stderr


@pytest.fixture
def seeming_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("seeming_gpu")
def test_without_triton(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest))
    with pytest.raises(
        MissingExtraError, match="device cuda needs Triton, which torch for CUDA brings along: pip install triton"
    ):
        quantize(source, tmp_path / "out", "nvfp4-w4a16", RunOptions(device="cuda"))
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.usefixtures("seeming_gpu")
def test_a_gpu_that_can_not_be_used(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    monkeypatch.setattr(torch, "empty", busy)
    says = (
        r"torch can't use the GPU \(CUDA error: all CUDA-capable devices are busy or unavailable\); free it, or take device cpu"
    )
    with pytest.raises(UsageError, match=says):
        quantize(source, tmp_path / "out", "fp8", RunOptions(device="cuda"))

"""The diff on a GPU, without one.

On a simulated device (tests/support/elsewhere.py), and through Triton's interpreter in a separate process.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.elsewhere import ELSEWHERE, Elsewhere
from support.processes import run_python

from nemoquant.cli import main
from nemoquant.errors import CheckpointError, UsageError
from nemoquant.evaluate.layers import batches
from nemoquant.evaluate.schema import Report
from nemoquant.formats import fp8, fp8_gpu, gpu, nvfp4, nvfp4_gpu
from nemoquant.quantized import packed
from nemoquant.sources.source import open_source

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear")


def differences(a: Any, b: Any, rel: float = 1e-5, where: str = "") -> list[str]:
    """Where two reports differ by more than ``rel`` of a figure, or by 1e-9 where it is almost zero.

    The default of ``rel`` is what the rounding of sums causes.
    """
    if isinstance(a, dict):
        return [
            d
            for key in a.keys() | b.keys()
            for d in differences(a.get(key), b.get(key), rel, f"{where}.{key}")
        ]
    if isinstance(a, list):
        return [
            d
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for d in differences(x, y, rel, f"{where}[{i}]")
        ]
    if isinstance(a, float) and isinstance(b, float):
        return [] if a == pytest.approx(b, rel=rel, abs=1e-9) else [f"{where}: {a}, {b}"]
    return [] if a == b else [f"{where}: {a}, {b}"]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    """The device "cuda" is that of tests/support/elsewhere.py; CPU kernels do the Triton kernels' work."""
    made, round_trip = Elsewhere(), packed.fake_quantize

    def rounded(format: str) -> Callable[..., torch.Tensor]:
        return lambda x, scale: round_trip(x.cpu(), format, scale)[0].to(ELSEWHERE)

    monkeypatch.setattr(gpu, "check", lambda device: None)
    monkeypatch.setattr(gpu, "computes", lambda device: device == ELSEWHERE)
    monkeypatch.setattr(fp8_gpu, "decoded", lambda *parts: torch.from_numpy(fp8.decode(*parts)).to(ELSEWHERE))
    monkeypatch.setattr(
        nvfp4_gpu, "decoded", lambda *parts: torch.from_numpy(nvfp4.decode(*parts)).to(ELSEWHERE)
    )
    monkeypatch.setattr(fp8_gpu, "rounded", rounded("fp8"))
    monkeypatch.setattr(nvfp4_gpu, "rounded", rounded("nvfp4"))
    for module in ("run", "reference"):
        monkeypatch.setattr(
            f"nemoquant.evaluate.{module}.torch_device",
            lambda name: ELSEWHERE if name == "cuda" else torch.device(name),
        )
    return made


@pytest.mark.slow
def test_all_products_are_on_the_device(
    device: Elsewhere, source: Path, quantized: Callable[..., Path], compare: Callable[..., Report]
) -> None:
    """All matrix products run on the device, and all figures equal the CPU's.

    Covered are layers of each kind, the head, the multi-token prediction and the effects of modules. Where
    inputs are rounded, a code or two may flip (0.07% of an expert's effect, seen), because sums are taken in
    another order.
    """
    candidates = [quantized("nvfp4-w4a16"), source, quantized("nvfp4-full")]
    expected = compare(source, *candidates)
    with device:
        found = compare(source, *candidates, device="cuda")
    assert (expected.device, found.device) == ("cpu", "cuda")
    one, two = (json.loads(report.dump()) | {"device": ""} for report in (expected, found))
    assert differences(one["candidates"].pop(), two["candidates"].pop(), rel=0.01) == []
    assert differences(one, two) == []
    assert [(op, device.here[op]) for op in PRODUCTS if device.here[op]] == []
    assert device.there["mm"] > 500
    assert device.changed == 0, "bf16 crosses as bf16"
    assert found.candidates[1].logits.kl.max == 0, "the source against itself"


def test_a_tied_head(
    device: Elsewhere, make_checkpoint: Callable[..., Path], compare: Callable[..., Report]
) -> None:
    """The head is the embedding, which is looked up on the CPU."""
    tied = make_checkpoint("tied", tie_word_embeddings=True)
    with device:
        assert compare(tied, tied, device="cuda").candidates[0].logits.kl.max == 0
    assert [(op, device.here[op]) for op in PRODUCTS if device.here[op]] == []


def test_a_cache_of_another_device(
    device: Elsewhere, source: Path, compare: Callable[..., Report], tmp_path: Path
) -> None:
    """With it a model compared with itself would show an error."""
    cache = tmp_path / "cache"
    compare(source, source, reference_cache=cache)
    says = r"cache was computed on another device \(--device\): its device differ; .*give another file"
    says += " or remove this one"
    with device, pytest.raises(CheckpointError, match=says):
        compare(source, source, reference_cache=cache, device="cuda")
    with device:
        compare(source, source, reference_cache=tmp_path / "other", device="cuda")
        again = compare(source, source, reference_cache=tmp_path / "other", device="cuda")
    assert again.candidates[0].logits.kl.max == 0


def test_rows_at_once(source: Path) -> None:
    """On a GPU a MoE layer takes more rows at once: its weights are copied once a batch.

    Expected numbers were computed by hand for segments of 2,048 tokens of this model.
    """
    config, length = open_source(source).config, 1 << 14
    values = {"mamba": 3 * 64 + 4 * 128, "moe": 2 * 80 + 4 * 32}
    for kind, there in (("mamba", 384 << 20), ("moe", 2 << 30)):
        for device, room in (("cpu", 384 << 20), ("cuda", there)):
            first = next(batches(config, kind, 1 << 20, length, torch.device(device)))
            assert first.stop == room // (4 * (values[kind] + 3 * 64) * 2048), (kind, device)


PROGRAM = """
import sys
from pathlib import Path
from nemoquant import api
source, rows, *candidates = map(Path, sys.argv[1:])
print(api.diff(source, candidates, data=rows, device="cuda", threads=1, card=False).dump())
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (extra: dev)")
def test_through_the_kernels(
    source: Path, quantized: Callable[..., Path], compare: Callable[..., Report], token_rows: Path
) -> None:
    """The same figures when Triton, interpreted, decodes weights and rounds inputs: one row of 8 tokens."""
    candidates = [quantized("nvfp4-full"), quantized("fp8")]
    np.save(token_rows, np.load(token_rows)[:1, :8])
    done = run_python(PROGRAM, source, token_rows, *candidates, TRITON_INTERPRET="1")
    found, expected = json.loads(done.stdout), json.loads(compare(source, *candidates).dump())
    assert found["device"] == "cuda"
    assert differences(expected | {"device": ""}, found | {"device": ""}) == []


def test_an_unknown_device(source: Path, compare: Callable[..., Report]) -> None:
    with pytest.raises(UsageError, match="device is 'tpu'; expected cpu or cuda"):
        compare(source, source, device="tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a machine without a GPU")
def test_without_a_gpu_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("nemoquant.api.compare.open_weights", lambda *_: pytest.fail("read"))
    result = CliRunner().invoke(
        main, ["diff", str(tmp_path / "none"), str(tmp_path / "out"), "--device", "cuda"]
    )
    assert result.exit_code == 2
    assert "device: got cuda, but torch finds no CUDA GPU here (torch " in result.stderr

"""``convert --to bf16``: every weight decoded, and what quantizing it again gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import refusal
from support.oracle_tensors import decode
from support.oracle_tensors import read as tensors_of
from support.pack_oracle import Stored, read
from support.tampering import changed_copy

import nemoquant
from nemoquant.formats.bf16 import rounded, rounded_up, value_of

Make = Callable[..., Path]
PRESETS = ["fp8", "mxfp8", "nvfp4", "nvfp4-full", "nvfp4-w4a16"]


def test_rounding_is_torchs() -> None:
    """Every exponent, midpoints and their neighbours, signs; what is too large is Inf."""
    bits = np.arange(0, 0x7F80_0000, 0x1357, np.uint32)
    middle = (np.arange(0, 0x7F7F, 5, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, middle, middle + 1, middle - 1]).view(np.float32)
    values = np.concatenate([values, -values, np.float32([0, -0.0, 3.4e38])])
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(rounded(values), expected)


@pytest.mark.parametrize("value", [1.0, 1.0 + 2**-23, 2 - 2**-24, 0.015904, 1e-30, 1e-40])
def test_rounding_up(value: float) -> None:
    """The smallest pattern that is not below it."""
    bits = rounded_up(np.float32(value))
    assert value_of(bits) >= np.float32(value) > value_of(int(bits) - 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_tensor(quantized: Make, tmp_path: Path, preset: str) -> None:
    """Decoded by a second implementation; the others keep their bytes; the config has no quantization."""
    source = quantized(preset)
    made = nemoquant.convert(source, tmp_path / "bf16", "bf16", progress=False)
    expected = decode(tensors_of(source))
    found, before = tensors_of(made.out), read(source)
    assert set(found) == set(expected)
    decoded = {name for name in expected if before[name].dtype in ("U8", "F8_E4M3")}
    for name, tensor in found.items():
        if name in decoded:
            assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name
        else:
            assert read(made.out)[name][:3] == before[name][:3], name
    assert sum(made.decoded.values()) == len(decoded) >= 32
    raw, kept = (json.loads((folder / "config.json").read_text()) for folder in (made.out, source))
    del kept["quantization_config"]
    assert raw == kept and not (made.out / "hf_quant_config.json").exists()
    report = nemoquant.verify(made.out, progress=False)
    assert report["ok"] and report["warnings"] == [] and nemoquant.inspect(made.out)["quantization"] is None


@pytest.mark.parametrize(("preset", "same"), [("fp8", "codes"), ("nvfp4-full", "codes"), ("mxfp8", "values")])
def test_there_and_back(quantized: Make, tmp_path: Path, preset: str, same: str) -> None:
    """By ``max`` a decoded weight gets its codes again: its largest magnitude still is the largest code.

    FP8 and NVFP4: scales move by a rounding to bf16, less than half a step of a code; NVFP4's -0 (code 8,
    of what was rounded to zero) becomes that of 0. MXFP8: values are exact in bf16, and a block whose largest
    code is a power of two may get half its scale and twice its codes.
    """

    def codes_of(stored: Stored) -> np.ndarray[Any, Any]:
        data = np.frombuffer(stored.data, np.uint8)
        if stored.dtype != "U8":
            return data
        nibbles = np.stack([data & 15, data >> 4])
        return np.where(nibbles == 8, 0, nibbles)

    source = quantized(preset)
    decoded = nemoquant.convert(source, tmp_path / "bf16", "bf16", progress=False).out
    back = quantized(preset, name="back", of=decoded)
    before, after = read(source), read(back)
    if same == "codes":
        codes = [name for name, stored in before.items() if stored.dtype in ("U8", "F8_E4M3")]
        assert len(codes) >= 46
        other = [n for n in codes if not np.array_equal(codes_of(before[n]), codes_of(after[n]))]
        assert other == []
    a, b = decode(tensors_of(source)), decode(tensors_of(back))
    for name, weight in a.items():
        close = torch.equal if same == "values" else lambda x, y: torch.allclose(x, y, rtol=2**-7, atol=0)
        assert close(weight.float(), b[name].float()), name


def test_what_lacks_mtp_can_be_quantized(quantized: Make, tmp_path: Path) -> None:
    """Model Optimizer drops multi-token prediction and leaves it in the config."""

    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith("mtp.")]:
            del tensors[name]

    theirs = changed_copy(quantized("fp8"), tmp_path / "theirs", drop)
    (theirs / "nemoquant_scales.json").unlink()
    made = nemoquant.convert(theirs, tmp_path / "bf16", "bf16", progress=False)
    assert "names no multi-token prediction any more" in made.warnings[-1]
    assert json.loads((made.out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert nemoquant.plan(made.out, "fp8").quantized


def test_a_weight_that_decodes_to_nan(quantized: Make, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["backbone.layers.0.mixer.in_proj.weight"].view(torch.uint8)[3, 4] = 0x7F

    theirs = changed_copy(quantized("fp8"), tmp_path / "theirs", damage)
    parts = ["backbone.layers.0.mixer.in_proj.weight decodes to NaN or Inf", "nothing was kept"]
    refusal("convert", theirs, tmp_path / "bf16", "--to", "bf16", parts=parts)
    assert sorted(tmp_path.glob("bf16*")) == []


def test_an_interrupt_leaves_nothing(quantized: Make, tmp_path: Path) -> None:
    def interrupt(stage: str, *_: object) -> None:
        if stage == "convert":
            raise KeyboardInterrupt

    source = quantized("fp8")
    with pytest.raises(nemoquant.Interrupted, match="nothing was kept"):
        nemoquant.convert(source, tmp_path / "bf16", "bf16", progress=interrupt)
    assert sorted(tmp_path.glob("bf16*")) == []

"""Written checkpoints, read by other software.

The safetensors library, a decoder written for the tests, and transformers' model read them. If a tensor were
transposed, its nibbles swapped, its scale taken from another tensor or its name wrong, logits would be far
off. They are near:

- FP8 rounds to 4 significant bits, a relative error of at most 2^-4 and 2 to 3% on average, 31 dB; 28 with
  half a bit of slack. So does MXFP8, whose scales are powers of two.
- NVFP4 has steps of 0.5 to 2 in a range of 6, and block scales of 4 bits: about 10%, 20 dB; 17 with half a
  bit of slack.

Let e be the error of a weight at that floor: 4% and 14%. A layer is two products in a row, and relu squared
between them doubles the error of the first: sqrt(1 + 4) e = 2.2 e for each of six layers. These add up as
independent errors in the residual stream: sqrt(6) x 2.2 e = 5.5 e, if each layer were the whole stream. The
logits of the median position must be within that: 0.22 for FP8 and MXFP8, 0.77 for NVFP4. The median, because
a token whose second expert flips by a rounding is off by more. Activations are not rounded.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import modelopt_run
from support.oracle_tensors import decode, read, sqnr, weights
from torch import Tensor

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="needs transformers (extra: modelopt), which computes the logits",
)

FLOOR = {torch.float8_e4m3fn: 28.0, torch.uint8: 17.0}  # dB
FP8_BOUND, NVFP4_BOUND = (30**0.5 * 10 ** (-floor / 20) for floor in FLOOR.values())
BOUND = {preset: NVFP4_BOUND if preset.startswith("nvfp4") else FP8_BOUND for preset in modelopt_run.MAPS}


@torch.no_grad()
def logits(folder: Path, tokens: Tensor) -> Tensor:
    """transformers' logits in float32: [rows, length, vocabulary]."""
    return modelopt_run.load(folder, torch.float32)(tokens, use_cache=False).logits


def plain(tensors: dict[str, Tensor], config: Path, folder: Path) -> Path:
    """An unquantized checkpoint of these tensors, names unchanged."""
    folder.mkdir()
    raw = json.loads(config.read_text())
    raw.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def error(found: Tensor, expected: Tensor) -> float:
    """Median over positions of the relative error of a position's logits."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(
        3, 96, (8, 32), generator=torch.Generator().manual_seed(5)
    )  # not the calibration rows


@pytest.fixture(scope="module")
def expected(runs, tokens) -> dict[Path, Tensor]:
    """The logits of each source."""
    return {folder: logits(folder, tokens) for folder in {runs.source(preset) for preset in BOUND}}


@pytest.mark.parametrize("preset", modelopt_run.MAPS)
def test_weights_decode_near_the_source(preset, runs) -> None:
    source_tensors, stored = read(runs.source(preset)), read(runs.ours(preset))
    decoded = decode(stored)
    assert {name: t.shape for name, t in decoded.items()} == {
        name: t.shape for name, t in source_tensors.items()
    }
    for dtype, floor in FLOOR.items():
        low = {name: sqnr(source_tensors[name], decoded[name]) for name in weights(stored, dtype)}
        assert {name: db for name, db in low.items() if db < floor} == {}


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="needs compressed-tensors (extra: dev)"
)
def test_nvfp4_codes_by_compressed_tensors(runs) -> None:
    """Its unpacking of two codes a byte, written for vLLM, agrees with our decoder on each value."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    stored = read(runs.ours("nvfp4-full"))
    decoded = decode(stored)
    for name in weights(stored, torch.uint8):
        codes = unpack_fp4_from_uint8(stored[name], *decoded[name].shape, dtype=torch.float32)
        step = stored[name + "_scale"].float() * stored[name + "_scale_2"]
        assert torch.equal(codes * step.repeat_interleave(16, 1), decoded[name]), name


@pytest.mark.parametrize("preset", modelopt_run.MAPS)
def test_logits_are_near_the_source(preset, runs, tokens, expected, tmp_path) -> None:
    out = runs.ours(preset)
    found = logits(plain(decode(read(out)), out / "config.json", tmp_path / "plain"), tokens)
    off = error(found, expected[runs.source(preset)])
    print(f"{preset}: relative error of logits {off:.3f}, bound {BOUND[preset]:.2f}")
    assert off < BOUND[preset]


def test_the_bound_sees_faults(runs, tokens, expected, tmp_path) -> None:
    """One fault at a time; each puts the logits beyond the bound of every preset."""

    def faulty(name: str, preset: str, change) -> float:
        tensors, source = change(read(runs.ours(preset))), runs.source(preset)
        found = logits(plain(tensors, source / "config.json", tmp_path / name), tokens)
        return error(found, expected[source])

    def other_scale(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for layer in (0, 4):
            mixer = f"backbone.layers.{layer}.mixer."
            tensors[mixer + "in_proj.weight_scale"] = tensors[mixer + "in_proj.weight_scale"].reciprocal()
        return decode(tensors)

    def scales_of_the_next_row(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in weights(tensors, torch.float8_e4m3fn):
            tensors[name + "_scale"] = tensors[name + "_scale"].roll(1, 0)
        return decode(tensors)

    def transposed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        result = decode(tensors)
        for name in [n for n in result if n.endswith(("out_proj.weight", "o_proj.weight"))]:  # square
            result[name] = result[name].T.contiguous()
        return result

    found = {
        "nibbles swapped": faulty("nibbles", "nvfp4-full", lambda t: decode(t, low_nibble_first=False)),
        "scale inverted": faulty("scale", "fp8", other_scale),
        "block scales of the next row": faulty("rows", "mxfp8", scales_of_the_next_row),
        "transposed": faulty("transposed", "fp8", transposed),
    }
    print(found)
    assert {fault: value for fault, value in found.items() if value < max(BOUND.values())} == {}


def test_the_folder_is_whole(runs, tmp_path) -> None:
    """The index names every tensor and file; the folder needs no file outside it."""
    out = shutil.copytree(runs.ours("nvfp4"), tmp_path / "moved")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read(out).keys()
    assert {path.name for path in out.glob("*.safetensors")} == set(index["weight_map"].values())

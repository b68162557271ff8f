"""``convert --to compressed-tensors``: names, scales and patterns that transformers and vLLM take."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import nemoquant as command
from support.commands import refusal
from support.files import edit_json, tree
from support.pack_oracle import read
from support.tampering import changed_copy

import nemoquant
from nemoquant.formats import fp8
from nemoquant.quantized.checkpoint import PackedCheckpoint, PackedWeights

Make = Callable[..., Path]
TO = "compressed-tensors"
IN_PROJ = "backbone.layers.0.mixer.in_proj"


def bf16(data: bytes) -> np.ndarray[Any, Any]:
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.fixture
def converted(quantized: Make, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint in FP8, and what it is converted to."""
    source = quantized("fp8")
    return source, nemoquant.convert(source, tmp_path / "ct", TO, progress=False).out


def test_every_tensor(converted: tuple[Path, Path]) -> None:
    """Codes and unquantized tensors bit for bit; scales bf16 [1], inputs' not smaller; none of a cache."""
    before, after = map(read, converted)
    assert set(before) - set(after) == {n for n in before if n.endswith(("k_scale", "v_scale"))} != set()
    assert set(after) <= set(before)
    for name, stored in after.items():
        if not name.endswith("_scale"):
            assert (stored.dtype, stored.shape, stored.data) == before[name][:3], name
            continue
        assert (stored.dtype, stored.shape) == ("BF16", [1])
        exact, rounded = np.frombuffer(before[name].data, np.float32)[0], bf16(stored.data)[0]
        assert abs(rounded / exact - 1) <= (2**-7 if name.endswith("input_scale") else 2**-8)
        assert not name.endswith("input_scale") or rounded >= exact


def test_the_config(converted: tuple[Path, Path]) -> None:
    """Each module is meant as it is stored, by its name in transformers; all other keys stay."""
    source, out = converted
    raw, kept = (json.loads((folder / "config.json").read_text()) for folder in (out, source))
    section = raw.pop("quantization_config")
    del kept["quantization_config"]
    assert raw == kept
    assert "kv_cache_scheme" not in section and section["quant_method"] == TO
    (group,) = section["config_groups"].values()
    assert group["weights"] == group["input_activations"]
    assert group["weights"]["strategy"] == "tensor" and group["format"] == "float-quantized"
    assert r"re:.*mixer\.experts\..*$" in group["targets"]
    patterns = [*group["targets"], *section["ignore"]]
    assert all(p.startswith("re:") and not re.search(r"backbone|model\\", p) for p in patterns)
    stored = read(out)
    for name in stored:
        module, _, part = name.rpartition(".")
        if part == "weight" and not re.search(r"norm|embeddings", module):
            spelling = re.sub("^backbone", "model", module)
            meant, ignored = (
                any(re.match(p.removeprefix("re:"), spelling) for p in found)
                for found in (group["targets"], section["ignore"])
            )
            assert (meant and not ignored) == (f"{module}.weight_scale" in stored), module
            assert meant or ignored, f"vLLM refuses {module}, which no pattern names"


def test_layers_that_differ(source: Path, token_rows: Path, tmp_path: Path) -> None:
    """What only some layers quantize is ignored layer by layer: layer 1 is not layer 10."""
    recipe = tmp_path / "some.yaml"
    recipe.write_text(
        "name: some\nsummary: A trial.\nrules:\n"
        "  - {roles: [mamba.in_proj], layers: [0], format: source}\n"
        "  - {roles: [experts.*], layers: [5], format: source}\n"
        "  - {roles: [mamba.*_proj, experts.*], format: fp8}\n"
        "  - {roles: ['*'], format: source}\n"
    )
    made = nemoquant.quantize(
        source, tmp_path / "some", recipe, data=token_rows, method="max", progress=False
    )
    out = nemoquant.convert(made.out, tmp_path / "ct", TO, progress=False).out
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert r"re:.*layers\.0\.mixer\.in_proj$" in section["ignore"]
    assert r"re:.*layers\.5\.mixer\.experts\..*$" in section["ignore"]
    assert r"re:.*mixer\.q_proj$" in section["ignore"]
    with PackedCheckpoint(out).checkpoint as checkpoint:
        assert checkpoint.tensors[f"{IN_PROJ}.weight"].dtype == "BF16"


@pytest.mark.slow
def test_its_distance(converted: tuple[Path, Path], source: Path, token_rows: Path) -> None:
    found = nemoquant.diff(source, list(converted), data=token_rows, rows=2, card=False, progress=False)
    a, b = (candidate.logits.kl.mean for candidate in found.candidates)
    assert b == pytest.approx(a, rel=0.3), "no cache is rounded any more, and scales are"


def test_it_is_read_back(converted: tuple[Path, Path]) -> None:
    """inspect and verify take it; graphs are refused, with what to do."""
    _, out = converted
    facts = nemoquant.inspect(out)
    assert facts["quantization"] == "compressed-tensors: FP8"
    assert facts["weights"]["FP8"] == 46 and facts["kv_cache"]["bytes_per_token"] == 2 * 2 * 16 * 2
    report = nemoquant.verify(out, progress=False)
    assert report["ok"] and report["checked"]["decoded"] == 46 and report["warnings"] == []
    before = tree(out)
    text = refusal("export", "onnx", out)
    assert "compressed-tensors layout, whose scales are bf16 or reciprocals" in text and "--to bf16" in text
    assert tree(out) == before


def test_codes_for_the_rounded_scale_would_be_the_same(converted: tuple[Path, Path]) -> None:
    """That is why they are kept: nothing is won by encoding the decoded weights again."""
    source, out = converted
    with PackedCheckpoint(source).checkpoint, PackedCheckpoint(out).checkpoint:
        opened, rounded = PackedCheckpoint(source), PackedCheckpoint(out)
        for name, stored in opened.stored.items():
            if stored.format != "source":
                weight = PackedWeights(opened, "").packed(stored)
                values = np.empty(weight.shape, np.float32)
                weight.decode(values)
                again = fp8.encode(values, rounded.global_scale(rounded.stored[name]))
                assert np.array_equal(again, weight.encoded.codes), name


def test_what_is_said(quantized: Make, tmp_path: Path) -> None:
    """The terminal and the card say how far scales go, and that the cache's are left out."""
    source, out = quantized("fp8"), tmp_path / "ct"
    planned = command("convert", source, out, "--to", TO, "--dry-run")
    assert planned.stdout.splitlines()[-1].startswith(f"dry run: 199 tensors would be written to {out}; ")
    assert sorted(tmp_path.glob("ct*")) == []
    said = command("convert", source, out, "--to", TO)
    card = (out / "README.md").read_text()
    for text in (
        r"by one factor: by 0\.\d\d% at most",
        r"upwards, by 0\.\d\d% at most",
        "The KV cache is bf16: ",
    ):
        assert re.search(text, said.stdout) and re.search(text, card), text
    assert said.stdout.splitlines()[-1].startswith(f"{out}: compressed-tensors, ")
    figures = json.loads(command("convert", source, tmp_path / "again", "--to", TO, "--json").stdout)
    assert figures["tensors"] == 199 and figures["decoded"] == {} and len(figures["notes"]) == 3
    assert figures["verified"]["tensors"] == 199 and not figures["dry_run"]
    assert tree(out) == tree(tmp_path / "again"), "the same bytes each time"


@pytest.mark.parametrize(
    ("preset", "parts"),
    [
        ("nvfp4", ["weights are NVFP4", "ignores the global scale of fused experts", "--to bf16"]),
        ("mxfp8", ["weights are MXFP8", "takes a scale of a block for that of a tensor"]),
    ],
)
def test_formats_that_are_refused(quantized: Make, tmp_path: Path, preset: str, parts: list[str]) -> None:
    refusal("convert", quantized(preset), tmp_path / "ct", "--to", TO, parts=parts)
    assert sorted(tmp_path.glob("ct*")) == []


def without_input_scales(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.endswith("input_scale")]:
        del tensors[name]


def test_other_refusals(source: Path, converted: tuple[Path, Path], tmp_path: Path) -> None:
    folder, ct = converted
    bare = changed_copy(folder, tmp_path / "bare", without_input_scales, quantization_config={})
    (bare / "hf_quant_config.json").unlink()
    for path, words in (
        (source, "has no quantized weight"),
        (ct, "is in the compressed-tensors layout already"),
        (bare, "46 modules have no scale of their inputs"),
    ):
        assert words in refusal("convert", path, tmp_path / "new", "--to", TO)
        assert sorted(tmp_path.glob("new*")) == []
    assert "exists; expected a new folder" in refusal("convert", folder, ct, "--to", TO)
    assert "overlaps the source" in refusal("convert", folder, folder / "in", "--to", TO)
    with pytest.raises(nemoquant.UsageError, match="to is 'gguf'; expected compressed-tensors or bf16"):
        nemoquant.convert(folder, tmp_path / "new", "gguf")  # type: ignore[arg-type]


def test_a_damaged_source_is_not_converted(quantized: Make, tmp_path: Path) -> None:
    source = quantized("fp8")
    shard = source / "model-00001-of-00001.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    said = command("convert", source, tmp_path / "ct", "--to", TO, code=2).stderr.splitlines()
    assert "reading its shards" in said[0] and "is damaged" in said[1]
    assert sorted(tmp_path.glob("ct*")) == []


def test_damage_of_what_was_converted(converted: tuple[Path, Path]) -> None:
    """Its record has the hash of every file; the card may be edited."""
    _, out = converted
    (out / "README.md").write_text("mine")
    report = nemoquant.verify(out, progress=False)
    assert report["ok"] and report["edited"] == ["README.md"]
    edit_json(out / "config.json", lambda data: data.update(layer_norm_epsilon=1e-3))
    report = nemoquant.verify(out, progress=False)
    assert report["problems"] == ["config.json was changed: its sha256 is not the manifest's"]
    edit_json(out / "nemoquant_converted.json", lambda data: data.update(to="bf16"))
    assert "was changed after it was written" in refusal("verify", out)

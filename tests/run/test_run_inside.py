"""A language model inside another goes through every verb; what stands beside it stays byte for byte."""

import importlib.util
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.inside import OMNI, PREFIX, omni_checkpoint, omni_tensors, towers
from support.places import DEMO
from support.synthetic import CONFIG, WIDE, random_tensors, write_checkpoint
from support.tampering import sign

import nemoquant
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.cli import main
from nemoquant.errors import CheckpointError, ConfigError, TensorTableError
from nemoquant.model.nested import language_section, with_values
from nemoquant.model.parse import parse_config
from nemoquant.quantized.checkpoint import PackedCheckpoint

PRESETS = ["fp8", "mxfp8", "nvfp4", "nvfp4-full", "nvfp4-w4a16"]
Header = dict[str, tuple[str, tuple[int, ...], bytes]]


@pytest.fixture
def omni(tmp_path: Path) -> Path:
    return omni_checkpoint(tmp_path / "omni")


def stored(folder: Path) -> Header:
    """Every tensor of a folder, read by hand: dtype, shape, bytes."""
    found: Header = {}
    for shard in sorted(folder.glob("*.safetensors")):
        data = shard.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        body = data[8 + length :]
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = (entry["dtype"], tuple(entry["shape"]), body[begin:end])
    return found


def section(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_the_language_model_is_quantized(
    preset: str, omni: Path, quantized: Callable[..., Path], make_checkpoint: Callable[..., Path]
) -> None:
    """The same bytes as of the language model alone, under its prefix; towers as they were."""
    out = quantized(preset, of=omni)
    alone = quantized(preset, "alone", of=make_checkpoint("plain", **WIDE))
    found, expected = stored(out), stored(alone)
    inside = {PREFIX + name: tensor for name, tensor in expected.items()}
    before = {name: tensor for name, tensor in stored(omni).items() if name in towers()}
    assert found == inside | before
    assert len(before) == len(towers())
    verified = nemoquant.verify(out, against=omni)
    assert verified["ok"], verified
    assert verified["checked"]["compared_with_source"] >= len(before)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(len(raw) for _, _, raw in found.values())
    _check_configs(out, section(alone), preset)


def _check_configs(out: Path, alone: dict[str, Any], preset: str) -> None:
    """Modules have the names of the file, towers are excluded as wholes, the rest is as it was."""
    raw = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in raw["llm_config"], "engines look at the top first"
    assert raw["llm_config"]["mamba_n_groups"] == CONFIG["n_groups"], "spellings for engines stand inside"
    assert "mamba_n_groups" not in raw
    assert {key: raw[key] for key in ("vision_config", "sound_config", "architectures")} == {
        key: OMNI[key] for key in ("vision_config", "sound_config", "architectures")
    }
    inside = section(out)
    listed = {PREFIX + name: entry for name, entry in alone.get("quantized_layers", {}).items()}
    assert inside.get("quantized_layers", {}) == listed
    legacy = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert legacy["exclude_modules"] == inside["ignore"]
    towers_excluded = {"vision_model*", "mlp1*", "sound_encoder*", "sound_projection*"}
    if preset == "mxfp8":  # for SGLang, which reads no pattern there
        towers_excluded |= {name.rstrip("*") for name in towers_excluded}
    mtp = {name for name in alone["ignore"] if name.startswith("mtp")}
    assert set(inside["ignore"]) == {PREFIX + name for name in alone["ignore"]} | mtp | towers_excluded


def test_a_tower_whose_name_is_in_a_module_is_excluded_by_more_of_it(tmp_path: Path) -> None:
    """vLLM finds ``mixer`` within the names of all quantized modules: the pattern has as much as it takes."""
    tensors = omni_tensors() | {"mixer.layers.4.weight": torch.zeros(2), "mixer.up.0.weight": torch.zeros(2)}
    source = write_checkpoint(tmp_path / "odd", OMNI, tensors)
    nemoquant.quantize(source, tmp_path / "out", "mxfp8", nemoquant.RunOptions(threads=1))
    ignored = section(tmp_path / "out")["ignore"]
    assert "mixer.layers*" in ignored
    assert "mixer.up.0*" in ignored, "mixer.up begins mixer.up_proj"
    assert "mixer*" not in ignored


def test_a_tower_with_a_name_that_is_no_pattern(tmp_path: Path) -> None:
    tensors = omni_tensors() | {
        "t" * 230: torch.zeros(2),
        **{f"tower{i}": torch.zeros(1) for i in range(300)},
    }
    source, out = write_checkpoint(tmp_path / "omni", OMNI, tensors), tmp_path / "out"
    nemoquant.quantize(source, out, "nvfp4-w4a16", method="mse", progress=False)
    assert nemoquant.verify(out, source, progress=False)["ok"]
    assert nemoquant.inspect(out)["warnings"] == []
    with PackedCheckpoint(out).checkpoint:
        assert "t" * 230 in section(out)["ignore"]


def test_files_of_processors_and_remote_code_are_copied(omni: Path, quantized: Callable[..., Path]) -> None:
    out = quantized("fp8", of=omni)
    copied = {path.name for path in out.iterdir()} & {path.name for path in omni.iterdir()}
    assert copied - {"config.json", "model.safetensors.index.json"} == {
        "audio_model.py",  # imported by modeling.py
        "configuration.py",  # auto_map of config.json
        "configuration_radio.py",  # of its vision_config
        "evs.py",  # imported by modeling.py
        "modeling.py",
        "preprocessor_config.json",
        "processing.py",  # auto_map of preprocessor_config.json
        "video_preprocessor_config.json",
    }


def test_it_is_measured_spoken_to_exported_and_decoded(
    omni: Path, quantized: Callable[..., Path], token_rows: Path, tmp_path: Path
) -> None:
    out = quantized("nvfp4", of=omni)
    report = nemoquant.diff(omni, out, data=token_rows)
    assert "its language model alone is computed, on text: " in report.candidates[0].warnings[0]
    assert "sound_encoder (5 tensors)" in report.candidates[0].warnings[0]
    decoded = nemoquant.convert(out, tmp_path / "bf16", "bf16")
    assert any("beside the language model are copied" in note for note in decoded.notes)
    assert nemoquant.verify(tmp_path / "bf16")["ok"]
    before, after = stored(omni), stored(tmp_path / "bf16")
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in towers())
    assert nemoquant.plan(tmp_path / "bf16", "fp8").tensors_out > len(before)
    with pytest.raises(CheckpointError, match="its language model inside another"):
        nemoquant.convert(quantized("fp8", of=omni), tmp_path / "ct", "compressed-tensors")


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_its_graph_computes_what_torch_does(
    omni: Path, quantized: Callable[..., Path], tmp_path: Path
) -> None:
    from nemoquant.engine.onnxruntime import OnnxRuntimeEngine
    from nemoquant.engine.torch import TorchEngine

    ids = np.random.default_rng(0).integers(3, 96, (2, 16))
    copy = tmp_path / "copy"
    for folder in (
        nemoquant.export_onnx(quantized("nvfp4-w4a16", of=omni)),
        nemoquant.export_onnx(omni, copy),
    ):
        assert "its language model alone" in folder.warnings[0]
        ours, theirs = (e(folder.folder).forward(ids).logits for e in (TorchEngine, OnnxRuntimeEngine))
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(ours)
    assert stored(copy).keys() == stored(omni).keys(), "tensors that were written anew have their names"


def test_inspect_tells_what_stands_beside(omni: Path, quantized: Callable[..., Path]) -> None:
    for folder, quantization in ((omni, None), (quantized("fp8", of=omni), "FP8")):
        found = nemoquant.inspect(folder)
        assert found["quantization"] == quantization
        assert found["beside"] == {
            "section": "llm_config",
            "tensors": 14,
            "bytes": sum(t.numel() * t.element_size() for t in towers().values()),
            "parts": {"sound_encoder": 5, "vision_model": 6, "mlp1": 2, "sound_projection": 1},
        }
        shown = CliRunner().invoke(main, ["inspect", str(folder)])
        assert "in `llm_config`" in shown.output
        assert "sound_projection (1)" in shown.output


def test_the_card_has_the_sources_task_and_says_what_stands_beside(
    omni: Path, quantized: Callable[..., Path]
) -> None:
    (omni / "README.md").write_text("---\npipeline_tag: image-text-to-text\nlicense: other\n---\n# It\n")
    text = (quantized("mxfp8", of=omni) / "README.md").read_text()
    assert "\npipeline_tag: image-text-to-text\n" in text
    assert "- Beside the language model: 14 tensors (`sound_encoder.*`, `vision_model.*`, " in text
    assert "vllm serve /path/to/this/folder --trust-remote-code" in text


def test_it_speaks_as_the_language_model_alone_does(tmp_path: Path) -> None:
    tensors = {}
    for shard in DEMO.glob("*.safetensors"):
        tensors |= load_file(shard)
    raw = {key: value for key, value in OMNI.items() if key != "auto_map"}
    raw["llm_config"] = json.loads((DEMO / "config.json").read_text())
    inside = {PREFIX + name: tensor for name, tensor in tensors.items()}
    folder = write_checkpoint(tmp_path / "demo", raw, inside | towers())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, folder)
    alone, made = (nemoquant.generate(f, "It is a truth", max_tokens=12, mtp=2) for f in (DEMO, folder))
    assert made.tokens == alone.tokens
    assert made.warnings == ("its language model alone is run, on text; what stands beside it is not",)
    assert alone.warnings == ()


def test_a_config_alone_can_be_planned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OMNI))
    plan = nemoquant.plan(tmp_path / "config.json", "nvfp4")
    assert len(plan.rows) == len(random_tensors(CONFIG | WIDE))
    assert plan.warnings == (
        "sizes are those of its language model: what stands beside it is copied, and no config lists it",
    )


def test_a_changed_tower_does_not_verify(omni: Path, quantized: Callable[..., Path]) -> None:
    out = quantized("mxfp8", of=omni)
    [shard] = out.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    raw = stored(out)["mlp1.1.weight"][2]
    data[data.rindex(raw)] ^= 1
    shard.write_bytes(data)
    sign(out)
    [problem] = nemoquant.verify(out, against=omni)["problems"]
    assert problem.startswith("mlp1.1.weight differs from the source")


def test_the_prefix_alone_is_read(tmp_path: Path, quantized: Callable[..., Path]) -> None:
    """A plain config beside prefixed tensors: a plain checkpoint comes out."""
    tensors = {PREFIX + name: tensor for name, tensor in random_tensors(CONFIG).items()}
    out = quantized("fp8", of=write_checkpoint(tmp_path / "prefixed", CONFIG, tensors))
    assert all(name.startswith(("backbone.", "mtp.", "lm_head.")) for name in stored(out))


@pytest.mark.parametrize("key", ["text_config", "language_config"])
def test_the_section_is_known_by_what_it_holds(key: str) -> None:
    raw = {k: v for k, v in OMNI.items() if k != "llm_config"} | {key: OMNI["llm_config"]}
    assert language_section(raw, "") == key
    assert parse_config(raw) == parse_config(OMNI)
    both = raw | {"llm_config": OMNI["llm_config"]}
    changed = with_values(both, vocab_size=5)
    assert changed[key]["vocab_size"] == changed["llm_config"]["vocab_size"] == 5
    assert both[key]["vocab_size"] == 96, "the argument is not changed"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            OMNI | {"text_config": CONFIG},
            "config.json: `llm_config`, `text_config` are different language models; expected one",
        ),
        (
            OMNI | {"llm_config": OMNI["llm_config"] | {"num_attention_heads": 3}},
            "config.json: `llm_config`: `num_attention_heads` is 3, which `num_key_value_heads` = 2 does not",
        ),
        (
            {"model": {"stt": {"model": {"pretrained_llm": "nvidia/X"}}, "speech_generation": {}}},
            "config.json: it is NeMo's config of a speech model (`model.stt`), such as VoiceChat, which "
            "names its language model by an id ('nvidia/X') instead of describing it; expected",
        ),
        (
            {"model_type": "llava", "text_config": {"model_type": "llama"}},
            "config.json: `model_type` is 'llava', expected 'nemotron_h'; nemoquant quantizes the Nemotron-H "
            "family only, at the top or in a section such as `llm_config`",
        ),
    ],
)
def test_configs_that_are_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(raw)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_what_the_language_model_has_too_much_is_no_tower(tmp_path: Path) -> None:
    tensors = omni_tensors() | {f"{PREFIX}backbone.layers.0.mixer.lora": torch.zeros(2)}
    source = write_checkpoint(tmp_path / "more", OMNI, tensors)
    with pytest.raises(TensorTableError, match=r"1 extra: backbone.layers.0.mixer.lora"):
        nemoquant.plan(source, "fp8")


def test_a_section_that_is_quantized_already_is_refused(omni: Path) -> None:
    raw = json.loads((omni / "config.json").read_text())
    raw["llm_config"]["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (omni / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="is already quantized"):
        nemoquant.plan(omni, "fp8")


def test_what_fine_tuning_leaves_is_put_right_inside(tmp_path: Path, quantized: Callable[..., Path]) -> None:
    """Without multi-token prediction, and with the names of transformers 5."""
    tensors = {
        name.replace("backbone.", "model."): tensor
        for name, tensor in omni_tensors().items()
        if ".mtp." not in name
    }
    out = quantized("fp8", of=write_checkpoint(tmp_path / "tuned", OMNI, tensors))
    raw = json.loads((out / "config.json").read_text())
    assert raw["llm_config"]["num_nextn_predict_layers"] == 0
    assert f"{PREFIX}backbone.embeddings.weight" in stored(out)
    assert nemoquant.verify(out)["ok"]


def test_a_tower_without_a_prefix_is_not_guessed(tmp_path: Path) -> None:
    """A plain config with other tensors beside is no model inside another."""
    folder = write_checkpoint(tmp_path / "plain", CONFIG, random_tensors(CONFIG))
    save_file({"mlp1.weight": torch.zeros(2)}, folder / "extra.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["mlp1.weight"] = "extra.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with Checkpoint(folder) as checkpoint:
        assert "mlp1.weight" in checkpoint.tensors
    with pytest.raises(TensorTableError, match=r"1 extra: mlp1.weight"):
        nemoquant.plan(folder, "fp8")

"""Checkpoints as other tools leave them: each row of the table in docs/sources.md is a case here."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.files import edit_json
from support.inside import OMNI, omni_checkpoint
from support.places import ROOT
from support.synthetic import synthetic_checkpoint

from nemoquant import api
from nemoquant.errors import CheckpointError
from nemoquant.quantized.checkpoint import PackedCheckpoint
from nemoquant.sources.source import Source, open_source

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
EXPERTS, HEAD, EMBEDDINGS = "backbone.layers.2.mixer.experts", "lm_head.weight", "backbone.embeddings.weight"
Q_PROJ = "backbone.layers.1.mixer.q_proj"


class Row(NamedTuple):
    """A kind of checkpoint.

    ``edit`` changes the tensors, ``config`` the keys of config.json (None removes one). ``warns`` are parts
    of the warnings, one each, where it is read; ``refused`` is a part of the error where it is not.
    ``written`` are keys of the output's config.json.
    """

    edit: Callable[[Tensors], Any] = lambda tensors: None
    config: dict[str, Any] = {}  # noqa: RUF012  never changed
    warns: tuple[str, ...] = ()
    refused: str = ""
    written: dict[str, Any] = {}  # noqa: RUF012


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    return edit


def without(*begins: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(begins)]:
            del tensors[name]

    return edit


def stacked(form: str, up: str = "up_proj", down: str = "down_proj", *, transposed: bool = False) -> Any:
    def edit(tensors: Tensors) -> None:
        for layer in (2, 5):
            for projection, theirs in (("up_proj", up), ("down_proj", down)):
                name = f"backbone.layers.{layer}.mixer.experts.{{}}.{projection}.weight"
                parts = [tensors.pop(name.format(e)) for e in range(8)]
                parts = [part.T for part in parts] if transposed else parts
                tensors[f"backbone.layers.{layer}.mixer.{form.format(theirs)}"] = torch.stack(parts)

    return edit


def together(*edits: Callable[[Tensors], Any]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for one in edits:
            one(tensors)

    return edit


def cast(dtype: torch.dtype) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)

    return edit


def mixed(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith(("A_log", ".D", "norm.weight", "gate.weight")):
            tensors[name] = tensors[name].float()
        elif ".k_proj." in name:
            tensors[name] = tensors[name].half()


def padded(*names: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in names:
            tensors[name] = torch.cat([tensors[name], torch.zeros(32, 64, dtype=torch.bfloat16)])

    return edit


def adapters(tensors: Tensors) -> None:
    tensors[f"{Q_PROJ}.base_layer.weight"] = tensors.pop(f"{Q_PROJ}.weight")
    tensors[f"{Q_PROJ}.lora_A.default.weight"] = torch.zeros(4, 64)
    tensors[f"{Q_PROJ}.lora_B.default.weight"] = torch.zeros(64, 4)


NO_MTP = "no tensor of them is there, as transformers leaves it"
TRANSFORMERS_5 = together(
    without("mtp."), stacked("experts.{}"), renamed(lambda name: name.replace("backbone.", "model."))
)
LISTED = {
    "hybrid_override_pattern": None,
    "num_hidden_layers": None,
    "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp", "linear_attention", "moe"],
    "mtp_hybrid_override_pattern": None,
    "mtp_layers_block_type": ["full_attention", "moe"],
    "time_step_limit": [0.0, {"__float__": "Infinity"}],
}
ROWS = {
    "bf16, fp16, fp32, or a mixture": Row(mixed),
    "fp16": Row(cast(torch.float16)),
    "saved by transformers 5: names from `model.`, experts stacked, no MTP": Row(
        TRANSFORMERS_5, LISTED, (NO_MTP,), written={"num_nextn_predict_layers": 0}
    ),
    "its MTP dropped, declared still": Row(
        without("mtp."), warns=(NO_MTP,), written={"num_nextn_predict_layers": 0}
    ),
    "a config in transformers 5's words": Row(
        config=LISTED,
        written={
            "hybrid_override_pattern": "M*E-ME",
            "mtp_hybrid_override_pattern": "*E",
            "num_hidden_layers": 6,
            "torch_dtype": "bfloat16",
            "time_step_limit": [0.0, float("inf")],
        },
    ),
    "names under a wrapper: `module.`, `base_model.model.`, `language_model.`": Row(
        renamed(lambda name: f"base_model.model.{name}")
    ),
    "wrappers of torch within names: `_orig_mod.`, `_fsdp_wrapped_module.`": Row(
        renamed(lambda name: f"_orig_mod.{name}".replace(".mixer.", "._fsdp_wrapped_module.mixer."))
    ),
    "the inner model's names alone, `layers.0...`, and a head": Row(
        renamed(lambda name: name.removeprefix("backbone."))
    ),
    "the vocabulary resized, `vocab_size` not": Row(
        padded(EMBEDDINGS, HEAD),
        warns=("says `vocab_size` 96, and its embeddings have 128 rows: it is taken as 128",),
        written={"vocab_size": 128},
    ),
    "tied, and the head stored beside": Row(
        lambda t: t.update({HEAD: t[EMBEDDINGS].clone()}),
        {"tie_word_embeddings": True},
        ("lm_head.weight equals the embeddings",),
    ),
    "buffers of other programs: `rotary_emb.inv_freq`, `_extra_state`": Row(
        lambda t: t.update({f"{Q_PROJ}._extra_state": torch.zeros(0, dtype=torch.uint8)}),
        warns=("1 tensors that hold no weights are left out",),
    ),
    "mlx-lm's names and convolutions": Row(
        together(
            stacked("switch_mlp.{}.weight", "fc1", "fc2"),
            lambda t: t.update({n: t[n].movedim(1, 2) for n in t if n.endswith("conv1d.weight")}),
        )
    ),
    "convolutions without their dimension of 1": Row(
        lambda t: t.update({n: t[n].squeeze(1) for n in t if n.endswith("conv1d.weight")})
    ),
    "no bias in convolutions": Row(
        lambda t: [t.pop(n) for n in list(t) if n.endswith("conv1d.bias")] and None, {"use_conv_bias": False}
    ),
    "MTP in the file, not in the config": Row(
        config={"num_nextn_predict_layers": 0}, refused="set `num_nextn_predict_layers` to the number of"
    ),
    "a part of the MTP": Row(
        without("mtp.layers.1."), refused="set `num_nextn_predict_layers` to 0 and remove the rest"
    ),
    "no head, not tied": Row(
        without(HEAD), refused="set `tie_word_embeddings` to true if the embeddings are the head"
    ),
    "tied, with another head beside": Row(
        config={"tie_word_embeddings": True}, refused="set `tie_word_embeddings` to false: the head is there"
    ),
    "embeddings and head of different lengths": Row(
        padded(EMBEDDINGS), refused="`vocab_size` is 96 in the config and 128 in its tensors"
    ),
    "other sizes than the config's": Row(
        config={"moe_intermediate_size": 40},
        refused="`moe_intermediate_size` is 40 in the config and 48 in its tensors",
    ),
    "fewer experts than the config's": Row(
        config={"n_routed_experts": 16}, refused="`n_routed_experts` is 16 in the config and 8 in its tensors"
    ),
    "another schedule of layers": Row(
        config={"hybrid_override_pattern": "M*EME-"},
        refused="`hybrid_override_pattern` of its tensors is M*E-ME",
    ),
    "biases of convolutions that the config has not": Row(
        config={"use_conv_bias": False}, refused="`use_conv_bias` is false, and 2 such biases are there"
    ),
    "adapters of PEFT that were not merged": Row(
        adapters, refused="adapters of PEFT that were not merged; save the model after merge_and_unload()"
    ),
    "experts stacked as [E, in, out]": Row(
        stacked("experts.{}", transposed=True), refused="transpose them to [out, in]"
    ),
    "names of two kinds": Row(
        lambda t: t.update({"model.layers.9.mixer.A_log": torch.zeros(4)}),
        refused="its layers have names of two kinds (backbone.layers.",
    ),
    "FP8 or integer weights, and no word of it in the config": Row(
        lambda t: t.update({f"{Q_PROJ}.weight": t[f"{Q_PROJ}.weight"].to(torch.float8_e4m3fn)}),
        refused="it was quantized already, by a tool that left no word of it in config.json",
    ),
    "fp64": Row(cast(torch.float64), refused="expected BF16, F16, F32: cast them to bf16"),
    "quantized by mlx-lm, GPTQ, AWQ and others": Row(
        config={"quantization": {"bits": 4}}, refused="is already quantized (config.json has `quantization`)"
    ),
    "biases in projections": Row(
        config={"attention_bias": True}, refused="`attention_bias` is True, expected false"
    ),
}


def make_row(row: Row, make_checkpoint: Make) -> Path:
    folder = make_checkpoint("theirs", row.edit)
    edit_json(folder / "config.json", lambda data: _changed(data, row.config))
    return folder


def _changed(data: dict[str, Any], config: dict[str, Any]) -> None:
    data.update(config)
    for key in [key for key in data if data[key] is None]:
        del data[key]


@pytest.mark.parametrize("title", [title for title, row in ROWS.items() if not row.refused])
def test_read(title: str, make_checkpoint: Make, tmp_path: Path) -> None:
    row = ROWS[title]
    folder = make_row(row, make_checkpoint)
    out = tmp_path / "out"
    made = api.quantize(folder, out, "nvfp4-w4a16", method="mse", progress=False)
    assert len(made.warnings) == len(row.warns)
    assert all(part in text for part, text in zip(row.warns, made.warnings, strict=True))
    assert api.plan(folder, "fp8").warnings == tuple(made.warnings)
    assert api.verify(out, folder, progress=False)["ok"]
    opened = PackedCheckpoint(folder)  # as generate, export and diff's candidates open it
    with opened.checkpoint:
        assert opened.warnings == made.warnings
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in row.written} == row.written
    assert "layers_block_type" not in config, "SGLang 0.5.23 and transformers 5.3 to 5.11 refuse its words"
    card = (out / "README.md").read_text()
    assert card.count("\n## Warnings\n") == bool(row.warns)


@pytest.mark.parametrize("title", [title for title, row in ROWS.items() if row.refused])
def test_refused(title: str, make_checkpoint: Make, tmp_path: Path) -> None:
    row = ROWS[title]
    folder = make_row(row, make_checkpoint)
    with pytest.raises(CheckpointError, match=re.escape(row.refused)) as error:
        api.quantize(folder, tmp_path / "out", "fp8", progress=False)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_the_page_has_these_rows() -> None:
    page = (ROOT / "docs" / "sources.md").read_text().split("\n**Config keys.**")[0]
    titles = re.findall(r"^\| ([^|]+?) \| (read|refused)", page, re.MULTILINE)
    assert titles == [(title, "refused" if row.refused else "read") for title, row in ROWS.items()]


TRANSLATED = [
    "names under a wrapper: `module.`, `base_model.model.`, `language_model.`",
    "wrappers of torch within names: `_orig_mod.`, `_fsdp_wrapped_module.`",
    "the inner model's names alone, `layers.0...`, and a head",
    "mlx-lm's names and convolutions",
    "convolutions without their dimension of 1",
]


@pytest.mark.parametrize("title", TRANSLATED)
def test_other_names_are_the_same_model(title: str, make_checkpoint: Make) -> None:
    published, theirs = (
        open_source(make_checkpoint(n, e)) for n, e in (("p", Row().edit), ("t", ROWS[title].edit))
    )
    assert isinstance(published, Source) and isinstance(theirs, Source)
    assert published.table == theirs.table
    with published.checkpoint as ours, theirs.checkpoint as others:
        for spec in published.table:
            assert (ours.array(spec.name) == others.array(spec.name)).all(), spec.name


@pytest.mark.parametrize(
    ("file", "told"),
    [
        (
            "consolidated.safetensors",
            "; if consolidated.safetensors is the whole model, rename it to model.saf",
        ),
        (
            "pytorch_model.bin",
            "; it has pytorch_model.bin: download the safetensors files, or save the model",
        ),
        ("model-Q4_K.gguf", "; it has model-Q4_K.gguf: download the safetensors files"),
    ],
)
def test_other_files(source: Path, file: str, told: str) -> None:
    for shard in source.glob("model*"):
        shard.unlink()
    (source / file).write_bytes(b"")
    with pytest.raises(CheckpointError, match="expected a checkpoint in safetensors format") as error:
        open_source(source)
    assert told in str(error.value)


def test_shards_without_an_index(source: Path) -> None:
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no index says which tensor is where: download model\.safeten"
    ):
        open_source(source)


SIZES = {
    "num_key_value_heads": (
        4,
        "`num_key_value_heads` x `head_dim` is 64 in the config and 32 in its tensors",
    ),
    "num_attention_heads": (8, "`num_attention_heads` x `head_dim` is 128 in the config and 64 in its"),
    "mamba_head_dim": (32, "`mamba_num_heads` x `mamba_head_dim` is 128 in the config and 64 in its tensors"),
    "ssm_state_size": (32, " + 2 x `n_groups` x `ssm_state_size` is "),
    "conv_kernel": (3, "`conv_kernel` is 3 in the config and 4 in its tensors"),
    "hidden_size": (128, "`hidden_size` is 128 in the config and 64 in its tensors"),
}


@pytest.mark.parametrize("key", SIZES)
def test_the_key_of_a_size_is_named(key: str, make_checkpoint: Make) -> None:
    value, told = SIZES[key]
    with pytest.raises(CheckpointError, match=re.escape(told)):
        open_source(make_row(Row(config={key: value}), make_checkpoint))


def test_layers_that_differ_alone_are_named(make_checkpoint: Make) -> None:
    def pruned(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(f"{EXPERTS.removesuffix('experts')}gate.")]:
            tensors[name] = tensors[name][:4]
        for name in [n for n in tensors if re.match(rf"{re.escape(EXPERTS)}\.[4-7]\.", n)]:
            del tensors[name]

    told = "layout: `n_routed_experts` is 8 in the config and 4 in its tensors of layers 2"
    with pytest.raises(CheckpointError, match=f"{told}$"):
        open_source(make_checkpoint("theirs", pruned))


@pytest.mark.parametrize(
    ("edit", "advice"),
    [
        (without(f"{EXPERTS}.3.up_proj"), "the checkpoint is not whole, download or convert it again"),
        (
            lambda t: t.update({"v_head.summary.weight": torch.zeros(1, 64)}),
            "no engine reads these, remove them if the model does without",
        ),
        (
            renamed(lambda name: name.replace("e_score_correction_bias", "expert_bias")),
            "is the config the right one?",
        ),
    ],
    ids=["missing", "extra", "renamed, of MTP too"],
)
def test_advice_without_a_key(edit: Any, advice: str, make_checkpoint: Make) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"expected the published layout: {advice}") + "$"):
        open_source(make_checkpoint("theirs", edit))


@pytest.mark.parametrize(
    ("edit", "value"), [(without(), "1, or"), (without("mtp.layers.1."), "0 and remove")]
)
def test_modules_that_are_there_whole_are_counted(edit: Any, value: str, make_checkpoint: Make) -> None:
    folder = make_row(Row(edit, {"num_nextn_predict_layers": 2}), make_checkpoint)
    with pytest.raises(CheckpointError, match=rf"layout: set `num_nextn_predict_layers` to {value}"):
        open_source(folder)


def test_the_section_of_a_key_is_named(tmp_path: Path) -> None:
    folder = omni_checkpoint(tmp_path / "theirs", OMNI | {"tie_word_embeddings": True})
    edit_json(folder / "config.json", lambda data: data["llm_config"].update(num_nextn_predict_layers=2))
    with pytest.raises(
        CheckpointError, match=r"to 1, or add what is missing of it \(keys of `llm_config`\)$"
    ):
        open_source(folder)


@pytest.mark.parametrize("inside", [False, True])
def test_no_quantization_in_so_many_words(inside: bool, tmp_path: Path) -> None:
    """transformers and others save ``quantization_config: null``."""
    folder = (omni_checkpoint if inside else synthetic_checkpoint)(tmp_path / "theirs")
    edit_json(folder / "config.json", lambda data: data.update(quantization_config=None))
    out = tmp_path / "out"
    api.quantize(folder, out, "nvfp4-w4a16", method="mse", progress=False)
    assert api.verify(out, folder, progress=False)["ok"]


def test_an_adapter_beside_the_weights_is_told(source: Path) -> None:
    (source / "adapter_config.json").write_text("{}")
    warnings = api.plan(source, "fp8").warnings
    assert [text for text in warnings if "the weights are taken as they are" in text] == list(warnings[:1])


def test_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"this is an adapter of PEFT: load it on its base model"):
        open_source(tmp_path)


@pytest.mark.parametrize("key", ["quantization_config", "quantization", "compression_config"])
def test_a_bare_config_of_a_quantized_model(source: Path, key: str) -> None:
    edit_json(source / "config.json", lambda data: data.update({key: {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match=f"is already quantized .config.json has `{key}`"):
        api.plan(source / "config.json", "fp8")
    told = api.inspect(source / "config.json")["warnings"]
    assert told == [f"bytes and dtypes are those of the bf16 model, not of this one: config.json has `{key}`"]


class TestInspect:
    """``inspect`` tells what does not fit, and of which tool a quantization is."""

    @pytest.mark.parametrize(
        ("config", "name"),
        [
            ({"quantization_config": {"quant_method": "gptq"}}, "gptq (not read here)"),
            ({"quantization": {"bits": 4, "group_size": 64}}, "mlx (not read here)"),
            ({"compression_config": {}}, "an old compressed-tensors (not read here)"),
        ],
    )
    def test_other_tools(self, source: Path, config: dict[str, Any], name: str) -> None:
        edit_json(source / "config.json", lambda data: data.update(config))
        found = api.inspect(source)
        assert found["quantization"] == name
        assert found["warnings"] == ["no tensor was compared with the config: the layout is not read here"]

    def test_a_quantization_that_nobody_declares(self, make_checkpoint: Make) -> None:
        row = ROWS["FP8 or integer weights, and no word of it in the config"]
        found = api.inspect(make_row(row, make_checkpoint))
        assert found["quantization"] == "none declared, but weights are F8_E4M3"
        assert "1 tensors that its config calls for are not there, or not as " in found["warnings"][0]

    def test_missing_tensors(self, make_checkpoint: Make) -> None:
        found = api.inspect(make_checkpoint("theirs", without(HEAD)))
        assert "parameters are those of the config: " in found["warnings"][0]
        assert "1 missing: lm_head.weight" in found["warnings"][0]

    def test_what_is_put_right(self, make_checkpoint: Make) -> None:
        whole, found = api.inspect(make_checkpoint()), api.inspect(make_checkpoint("t", without("mtp.")))
        assert found["parameters"] == found["parameters_without_mtp"] == whole["parameters_without_mtp"]
        assert NO_MTP in found["warnings"][0]
        assert whole["warnings"] == []

    def test_a_part_lost_from_a_quantized_one(self, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        api.quantize(source, out, "nvfp4-w4a16", method="mse", progress=False)
        assert api.inspect(out)["warnings"] == []
        (out / "nemoquant.json").unlink()
        (shard,) = out.glob("*.safetensors")
        tensors = load_file(shard)
        del tensors[f"{EXPERTS}.0.up_proj.weight_scale"]
        save_file(tensors, shard)
        if (out / "model.safetensors.index.json").exists():
            edit_json(
                out / "model.safetensors.index.json",
                lambda data: data["weight_map"].pop(f"{EXPERTS}.0.up_proj.weight_scale"),
            )
        (told,) = api.inspect(out)["warnings"]
        assert told.startswith("1 tensors that its config calls for are not there, or not as the ModelOpt")
        assert told.endswith(f"{EXPERTS}.0.up_proj.weight")

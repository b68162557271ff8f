"""Sources that may be quantized: all of the config's tensors and no other, floating, not quantized before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import edit_json
from support.places import NANO

from nemoquant.errors import CheckpointError, ConfigError, TensorTableError
from nemoquant.sources.source import BareConfig, Source, open_source

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def test_a_folder(source: Path) -> None:
    opened = open_source(source)
    assert isinstance(opened, Source)
    assert {spec.name for spec in opened.table} == set(opened.checkpoint.tensors)
    assert opened.raw_config == json.loads((source / "config.json").read_text())
    assert {spec.dtype for spec in opened.table} == {"BF16", "F32"}


def test_a_bare_config() -> None:
    opened = open_source(NANO)
    assert isinstance(opened, BareConfig)
    assert len(opened.table) == 6243


def test_dtypes_are_those_of_the_headers(make_checkpoint: Make) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["backbone.layers.2.mixer.gate.weight"] = tensors[
            "backbone.layers.2.mixer.gate.weight"
        ].float()
        tensors["backbone.layers.0.mixer.D"] = tensors["backbone.layers.0.mixer.D"].half()

    found = {spec.name: spec.dtype for spec in open_source(make_checkpoint(edit=edit)).table}
    assert found["backbone.layers.2.mixer.gate.weight"] == "F32"
    assert found["backbone.layers.5.mixer.gate.weight"] == "BF16"
    assert found["backbone.layers.0.mixer.D"] == "F16"


def set_config(folder: Path, **changes: Any) -> None:
    edit_json(folder / "config.json", lambda data: data.update(changes))


def test_already_quantized_by_its_config(source: Path) -> None:
    set_config(source, quantization_config={"quant_method": "modelopt"})
    with pytest.raises(CheckpointError) as error:
        open_source(source)
    assert str(error.value) == (
        f"{source} is already quantized (config.json has `quantization_config`); expected the bf16 "
        f"checkpoint that it was made from, or what `nemoquant convert --to bf16` makes of it"
    )


def test_already_quantized_by_its_legacy_file(source: Path) -> None:
    (source / "hf_quant_config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"is already quantized \(it has hf_quant_config\.json\); expected the bf16"
    ):
        open_source(source)


def test_a_null_quantization_config_is_none(source: Path) -> None:
    set_config(source, quantization_config=None)
    assert isinstance(open_source(source), Source)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64, torch.float64])
def test_weights_that_are_not_floating(make_checkpoint: Make, dtype: torch.dtype) -> None:
    names = ["backbone.layers.1.mixer.q_proj.weight", "backbone.layers.3.mixer.up_proj.weight"]

    def edit(tensors: Tensors) -> None:
        for name in names:
            tensors[name] = tensors[name].to(dtype)

    shown = {
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.int64: "I64",
        torch.float64: "F64",
    }[dtype]
    folder = make_checkpoint(edit=edit)
    with pytest.raises(CheckpointError) as error:
        open_source(folder)
    assert str(error.value) == (
        f"{folder}: 2 tensors are of dtypes that are not read as weights ({names[0]} {shown}, {names[1]} "
        f"{shown}); expected BF16, F16, F32: "
        + (
            "cast them to bf16"
            if dtype is torch.float64
            else "it was quantized already, by a tool that left no word of it in config.json: take the bf16 "
            "checkpoint that it was made from"
        )
    )


def test_one_error_lists_all_that_is_wrong(make_checkpoint: Make) -> None:
    def edit(tensors: Tensors) -> None:
        del tensors["backbone.layers.0.mixer.A_log"]
        del tensors["mtp.layers.1.final_layernorm.weight"]
        tensors["backbone.layers.6.norm.weight"] = torch.zeros(64)
        tensors["model.rotary"] = torch.zeros(1)
        tensors["visual.patch"] = torch.zeros(1)
        tensors["lm_head.weight"] = torch.zeros(96, 63)
        tensors["backbone.layers.2.mixer.experts.3.up_proj.weight"] = torch.zeros(32, 48)

    folder = make_checkpoint(edit=edit)
    with pytest.raises(TensorTableError) as error:
        open_source(folder)
    message = str(error.value)
    assert message.startswith(
        f"{folder}: its tensors are not those that its config.json calls for: 2 missing: "
    )
    assert (
        "2 missing: backbone.layers.0.mixer.A_log, mtp.layers.1.final_layernorm.weight; 3 extra: " in message
    )
    assert all(name in message for name in ("backbone.layers.6.norm.weight", "model.rotary", "visual.patch"))
    assert (
        "; 2 misshapen: backbone.layers.2.mixer.experts.3.up_proj.weight is [32, 48], expected [48, 32], "
        "lm_head.weight is [96, 63], expected [96, 64]; expected the published layout: is the config the "
        "right one?" in message
    )
    assert "\n" not in message


def test_a_long_list_is_cut_and_counted(make_checkpoint: Make) -> None:
    def edit(tensors: Tensors) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            del tensors[name]

    with pytest.raises(TensorTableError) as error:
        open_source(make_checkpoint(edit=edit))
    prefix = "backbone.layers.2.mixer.experts."
    assert (
        f"48 missing: {', '.join(f'{prefix}{e}.up_proj.weight' for e in range(5))} and 43 more; expected"
        in str(error.value)
    )


@pytest.mark.parametrize("transpose", [False, True])
def test_fused_experts_of_another_shape(make_checkpoint: Make, transpose: bool) -> None:
    def edit(tensors: Tensors) -> None:
        name = "backbone.layers.2.mixer.experts.{}.up_proj.weight"
        parts = [tensors.pop(name.format(e)) for e in range(8)]
        fused = torch.stack([p.T for p in parts]) if transpose else torch.stack(parts[:7])
        tensors["backbone.layers.2.mixer.experts.up_proj"] = fused

    expected = (
        "8 misshapen: .*is \\[32, 48\\], expected \\[48, 32\\]"
        if transpose
        else "1 missing: .*experts.7.up_proj.weight"
    )
    with pytest.raises(TensorTableError, match=expected):
        open_source(make_checkpoint(edit=edit))


def test_another_model(source: Path) -> None:
    set_config(source, model_type="llama")
    with pytest.raises(ConfigError, match=r"config\.json: `model_type` is 'llama', expected 'nemotron_h'"):
        open_source(source)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"nowhere does not exist; expected a Nemotron-H checkpoint folder or its config\.json",
    ):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json does not exist; expected"):
        open_source(tmp_path)

"""The summary of ``inspect``: figures by arithmetic over the published sizes, one layer kind at a time."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.places import NANO, SUPER
from support.synthetic import write_rows

from nemoquant import api
from nemoquant.errors import CheckpointError
from nemoquant.model.parse import load_config
from nemoquant.model.roles import tensor_table

Make = Callable[..., Path]
MAMBA_ELEMENTS = 4096 + 3 * 128 + 10240 * 4 + 10240 + 8192 + 18560 * 4096 + 4096 * 8192
ATTENTION_ELEMENTS = 4096 + 2 * 4096 * 4096 + 2 * 256 * 4096
EXPERT = 2 * 2688 * 1024
MOE_DENSE_ELEMENTS = 4096 + 512 * 4096 + 512 + 2 * 1024 * 4096 + 2 * 5376 * 4096
TOP_ELEMENTS = 2 * 131072 * 4096 + 4096
MAIN = 40 * MAMBA_ELEMENTS + 8 * ATTENTION_ELEMENTS + 40 * (MOE_DENSE_ELEMENTS + 512 * EXPERT) + TOP_ELEMENTS
MTP = (2 * 4096 + 4096 * 8192) + ATTENTION_ELEMENTS + MOE_DENSE_ELEMENTS + 512 * EXPERT + 4096


@pytest.fixture(scope="module")
def inspected() -> dict[str, Any]:
    return api.inspect(SUPER)


def test_golden_figures_of_super(inspected: dict[str, Any]) -> None:
    assert inspected["tensors"] == 42_683 == 40 * 9 + 8 * 5 + 40 * (7 + 1024) + 3 + (3 + 5) + (7 + 1024 + 1)
    assert (
        inspected["bytes"] == 247_222_108_160 == 2 * (MAIN + MTP) + 2 * 41 * 512
    )  # the routers' biases are fp32
    assert inspected["parameters"] == MAIN + MTP
    assert round(inspected["parameters"] / 1e9, 1) == 123.6
    assert inspected["parameters_without_mtp"] == MAIN
    assert round(inspected["parameters_without_mtp"] / 1e9, 1) == 120.7
    assert inspected["kv_cache"]["bytes_per_token"] == 8192 == 8 * 2 * 2 * 128 * 2
    assert inspected["ssm_state_bytes_per_sequence"] == 167_772_160 == 40 * 128 * 64 * 128 * 4


def test_active_parameters_of_super(inspected: dict[str, Any]) -> None:
    """Published as 12.7 B; all weights that a token's forward uses, with 22 of 512 experts, are 12.77 B."""
    active = MAIN - 40 * (512 - 22) * EXPERT
    assert inspected["active_parameters"] == active == 12_770_237_440
    assert 12.7e9 <= active < 12.8e9


def test_the_rest_of_inspect(inspected: dict[str, Any]) -> None:
    pattern = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
    assert inspected["layers"] == {
        "total": 88,
        "kinds": {"mamba": 40, "moe": 40, "attention": 8},
        "pattern": pattern,
        "mtp_modules": 1,
        "mtp_pattern": "*E",
        "sizes": {},
    }
    assert inspected["dtypes"] == {
        "BF16": {"tensors": 42_642, "bytes": 247_222_108_160 - 41 * 512 * 4},
        "F32": {"tensors": 41, "bytes": 41 * 512 * 4},
    }
    assert inspected["quantization"] is None
    assert "assumed" in inspected["source"]


@pytest.mark.parametrize(("context", "tokens"), [(None, 262_144), (1_048_576, 1_048_576), (1, 1)])
def test_full_context(context: int | None, tokens: int) -> None:
    kv = api.inspect(SUPER, context=context)["kv_cache"]
    assert kv == {"bytes_per_token": 8192, "context": tokens, "bytes_at_context": 8192 * tokens}


def test_golden_figures_of_nano() -> None:
    found = api.inspect(NANO)
    mamba = 2688 + 3 * 64 + 6144 * 5 + 4096 + 10304 * 2688 + 2688 * 4096
    attention = 2688 + 2 * 4096 * 2688 + 2 * 256 * 2688
    dense, expert = 2688 + 128 * 2688 + 128 + 2 * 3712 * 2688, 2 * 1856 * 2688
    total = 23 * mamba + 6 * attention + 23 * (dense + 128 * expert) + 2 * 131072 * 2688 + 2688
    assert found["parameters"] == found["parameters_without_mtp"] == total
    assert found["active_parameters"] == total - 23 * 122 * expert
    assert found["tensors"] == 23 * 9 + 6 * 5 + 23 * (5 + 256) + 3
    assert found["kv_cache"]["bytes_per_token"] == 6 * 2 * 2 * 128 * 2
    assert found["ssm_state_bytes_per_sequence"] == 23 * 64 * 64 * 128 * 4


def test_inspect_reads_headers(make_checkpoint: Make) -> None:
    folder = make_checkpoint(
        edit=lambda t: t.update({"backbone.layers.0.mixer.D": t["backbone.layers.0.mixer.D"].float()})
    )
    found = api.inspect(folder)
    assert found["source"] == "headers"
    assert found["dtypes"]["F32"] == {
        "tensors": 4,
        "bytes": 3 * 8 * 4 + 4 * 4,
    }  # two routers' biases, MTP's, and D
    assert found["bytes"] == sum(v["bytes"] for v in found["dtypes"].values())
    roles = Counter(s.role for s in tensor_table(load_config(folder)[0]))
    assert found["tensors"] == sum(roles.values())


@pytest.mark.parametrize(
    ("section", "algorithm", "item"),
    [
        (
            {"quant_algo": "FP8", "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}},
            "FP8",
            1,
        ),
        ({"quant_algo": "NVFP4", "kv_cache_scheme": None}, "NVFP4", 2),
        ({"quant_algo": "NVFP4"}, "NVFP4", 2),
        (None, None, 2),
    ],
)
def test_inspect_of_a_quantized_config(
    tmp_path: Path, section: Any, algorithm: str | None, item: int
) -> None:
    (tmp_path / "c.json").write_text(
        json.dumps(json.loads(NANO.read_text()) | {"quantization_config": section})
    )
    found = api.inspect(tmp_path / "c.json")
    assert found["quantization"] == algorithm
    assert found["kv_cache"]["bytes_per_token"] == 6 * 2 * 2 * 128 * item


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_the_state_cache_dtype(tmp_path: Path, dtype: str, item: int) -> None:
    (tmp_path / "c.json").write_text(
        json.dumps(json.loads(NANO.read_text()) | {"mamba_ssm_cache_dtype": dtype})
    )
    assert api.inspect(tmp_path / "c.json")["ssm_state_bytes_per_sequence"] == 23 * 64 * 64 * 128 * item


@pytest.mark.parametrize("section", [{}, {"bits": 4}])
def test_a_section_that_names_no_method(section: dict[str, Any], make_checkpoint: Make) -> None:
    folder = make_checkpoint(quantization_config=section)
    for path in (folder, folder / "config.json"):
        assert "names no method" in api.inspect(path)["quantization"]


@pytest.mark.parametrize("section", ["fp8", [1], 4, False])
def test_a_section_that_is_no_object(section: Any, make_checkpoint: Make) -> None:
    folder = make_checkpoint(quantization_config=section)
    with pytest.raises(
        CheckpointError, match=r"can't be read \(`the whole` is .*: input should be a valid dictionary\)"
    ):
        api.inspect(folder)


WEIGHT = "backbone.layers.1.mixer.q_proj.weight"
SCALE = f"{WEIGHT}_scale"
DAMAGED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], list[str]]] = {
    "a scale is gone": (
        lambda t: t.pop(SCALE),
        ["1 tensors that its config calls for are not there, or not"],
    ),
    "a stranger": (
        lambda t: t.update(foo=torch.zeros(1)),
        ["1 tensors are there that its config has no use"],
    ),
    "scales without codes": (
        lambda t: t.update({WEIGHT: t[WEIGHT].bfloat16()}),
        ["2 tensors are there that its config has no use for: backbone.layers.1.mixer.q_proj."],
    ),
    "nothing": (lambda t: None, []),
}


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_of_a_quantized_one_is_told(damage: str, layout: str, source: Path, tmp_path: Path) -> None:
    made, other = tmp_path / "made", tmp_path / "other"
    rows = write_rows(tmp_path / "rows.npy", (2, 16))
    api.quantize(source, made, "fp8", data=rows, method="max", progress=False)
    if layout != "modelopt":
        api.convert(made, other, layout, progress=False)
        made = other
    edit, told = DAMAGED[damage]
    tensors: dict[str, torch.Tensor] = {}
    for shard in made.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    for index in made.glob("*.index.json"):
        index.unlink()
    edit(tensors)
    save_file(tensors, made / "model.safetensors")
    for record in made.glob("nemoquant*"):
        record.unlink()
    warnings = api.inspect(made)["warnings"]
    assert len(warnings) == len(told)
    assert all(part in text for part, text in zip(told, warnings, strict=True))

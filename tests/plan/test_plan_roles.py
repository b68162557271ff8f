"""The tensor table: names, roles and shapes of published checkpoints, and the figures that follow from a config."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemoquant import api
from nemoquant.model.config import load_config, parse_config
from nemoquant.model.roles import ROLES, TensorSpec, tensor_table

Make = Callable[..., Path]
CONFIGS = Path(__file__).parents[1] / "configs"
SUPER, NANO = CONFIGS / "super-120b-a12b.json", CONFIGS / "nano-30b-a3b.json"


@pytest.fixture(scope="module")
def table() -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in tensor_table(load_config(SUPER)[0])}


def layer(table: dict[str, TensorSpec], prefix: str) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """name -> role, shape, dtype of what lies under a prefix; of experts only the first and the last."""
    middle = re.compile(r"\.experts\.([1-9]|[1-9]\d|[1-4]\d\d|50\d|510)\.")
    found = {n.removeprefix(prefix): s for n, s in table.items() if n.startswith(prefix) and not middle.search(n)}
    return {n: (s.role, s.shape, s.dtype) for n, s in found.items()}


MOE = {
    "mixer.gate.weight": ("router", (512, 4096), "BF16"),
    "mixer.gate.e_score_correction_bias": ("router.bias", (512,), "F32"),
    "mixer.fc1_latent_proj.weight": ("latent.fc1", (1024, 4096), "BF16"),
    "mixer.fc2_latent_proj.weight": ("latent.fc2", (4096, 1024), "BF16"),
    "mixer.shared_experts.up_proj.weight": ("shared_experts.up_proj", (5376, 4096), "BF16"),
    "mixer.shared_experts.down_proj.weight": ("shared_experts.down_proj", (4096, 5376), "BF16"),
    "mixer.experts.0.up_proj.weight": ("experts.up_proj", (2688, 1024), "BF16"),
    "mixer.experts.511.up_proj.weight": ("experts.up_proj", (2688, 1024), "BF16"),
    "mixer.experts.0.down_proj.weight": ("experts.down_proj", (1024, 2688), "BF16"),
    "mixer.experts.511.down_proj.weight": ("experts.down_proj", (1024, 2688), "BF16"),
}
ATTENTION = {
    "mixer.q_proj.weight": ("attention.q_proj", (4096, 4096), "BF16"),
    "mixer.k_proj.weight": ("attention.k_proj", (256, 4096), "BF16"),
    "mixer.v_proj.weight": ("attention.v_proj", (256, 4096), "BF16"),
    "mixer.o_proj.weight": ("attention.o_proj", (4096, 4096), "BF16"),
}
NORM = ("norm", (4096,), "BF16")


def mtp(entries: dict[str, tuple[str, tuple[int, ...], str]]) -> dict[str, tuple[str, tuple[int, ...], str]]:
    return {name: (f"mtp.{role}", shape, dtype) for name, (role, shape, dtype) in entries.items()}


def test_a_mamba_layer_of_super(table: dict[str, TensorSpec]) -> None:
    assert layer(table, "backbone.layers.86.") == {
        "norm.weight": NORM,
        "mixer.A_log": ("ssm.A_log", (128,), "BF16"),
        "mixer.D": ("ssm.D", (128,), "BF16"),
        "mixer.dt_bias": ("ssm.dt_bias", (128,), "BF16"),
        "mixer.conv1d.weight": ("conv1d", (10240, 1, 4), "BF16"),
        "mixer.conv1d.bias": ("conv1d", (10240,), "BF16"),
        "mixer.norm.weight": ("norm", (8192,), "BF16"),
        "mixer.in_proj.weight": ("mamba.in_proj", (18560, 4096), "BF16"),
        "mixer.out_proj.weight": ("mamba.out_proj", (4096, 8192), "BF16"),
    }


def test_a_moe_layer_of_super(table: dict[str, TensorSpec]) -> None:
    assert layer(table, "backbone.layers.87.") == {"norm.weight": NORM} | MOE


def test_an_attention_layer_of_super(table: dict[str, TensorSpec]) -> None:
    assert layer(table, "backbone.layers.78.") == {"norm.weight": NORM} | ATTENTION


def test_mtp_of_super(table: dict[str, TensorSpec]) -> None:
    extra = {"enorm.weight": NORM, "hnorm.weight": NORM, "eh_proj.weight": ("eh_proj", (4096, 8192), "BF16"), "norm.weight": NORM}
    assert layer(table, "mtp.layers.0.") == mtp(extra | ATTENTION)
    assert layer(table, "mtp.layers.1.") == mtp({"norm.weight": NORM, "final_layernorm.weight": NORM} | MOE)


def test_the_rest_of_super(table: dict[str, TensorSpec]) -> None:
    rest = {n: (s.role, s.shape) for n, s in table.items() if ".layers." not in n}
    assert rest == {
        "backbone.embeddings.weight": ("embedding", (131072, 4096)),
        "backbone.norm_f.weight": ("norm", (4096,)),
        "lm_head.weight": ("lm_head", (131072, 4096)),
    }


def test_every_entry_says_where_it_is(table: dict[str, TensorSpec]) -> None:
    for name, spec in table.items():
        numbers = re.match(r"(?:backbone|mtp)\.layers\.(\d+)\.(?:mixer\.experts\.(\d+)\.)?", name)
        expected = (None, None) if numbers is None else tuple(None if n is None else int(n) for n in numbers.groups())
        assert (spec.layer, spec.expert) == expected, name
        assert spec.role in ROLES


def test_experts_are_in_numeric_order(table: dict[str, TensorSpec]) -> None:
    order = [s.expert for s in table.values() if s.layer == 1 and s.role == "experts.up_proj"]
    assert order == list(range(512))


def test_variants() -> None:
    def names(**changes: Any) -> dict[str, tuple[int, ...]]:
        return {s.name: s.shape for s in tensor_table(parse_config(json.loads(NANO.read_text()) | changes))}

    base = names()
    assert set(base) - set(names(tie_word_embeddings=True)) == {"lm_head.weight"}
    assert len(base) - len(names(use_conv_bias=False)) == 23
    assert len(base) - len(names(n_shared_experts=0)) == 2 * 23
    assert base["backbone.layers.1.mixer.experts.127.down_proj.weight"] == (2688, 1856)  # no latent space: the whole hidden state
    assert not any("latent" in n or n.startswith("mtp.") for n in base)
    dense = names(hybrid_override_pattern="M-", num_hidden_layers=2)
    assert dense["backbone.layers.1.mixer.up_proj.weight"] == (1856, 2688)
    assert dense["backbone.layers.1.mixer.down_proj.weight"] == (2688, 1856)
    modules = names(num_nextn_predict_layers=2)
    assert {n.split(".mixer.")[0].split(".")[2] for n in modules if n.startswith("mtp.")} == {"0", "1", "2", "3"}
    assert "mtp.layers.2.eh_proj.weight" in modules
    assert "mtp.layers.3.final_layernorm.weight" in modules


# --- figures: by arithmetic over the published sizes, layer kind by layer kind

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
    assert inspected["bytes"] == 247_222_108_160 == 2 * (MAIN + MTP) + 2 * 41 * 512  # the routers' biases are fp32
    assert inspected["parameters"] == MAIN + MTP
    assert round(inspected["parameters"] / 1e9, 1) == 123.6
    assert inspected["parameters_without_mtp"] == MAIN
    assert round(inspected["parameters_without_mtp"] / 1e9, 1) == 120.7
    assert inspected["kv_cache"]["bytes_per_token"] == 8192 == 8 * 2 * 2 * 128 * 2
    assert inspected["ssm_state_bytes_per_sequence"] == 167_772_160 == 40 * 128 * 64 * 128 * 4


def test_active_parameters_of_super(inspected: dict[str, Any]) -> None:
    """Published as 12.7 B. Everything that a token's forward touches, of 512 experts 22, comes to 12.77 B."""
    active = MAIN - 40 * (512 - 22) * EXPERT
    assert inspected["active_parameters"] == active == 12_770_237_440
    assert 12.7e9 <= active < 12.8e9


def test_the_rest_of_inspect(inspected: dict[str, Any]) -> None:
    pattern = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
    assert inspected["layers"] == {
        "total": 88, "kinds": {"mamba": 40, "moe": 40, "attention": 8}, "pattern": pattern, "mtp_modules": 1, "mtp_pattern": "*E",
    }  # fmt: skip
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
    folder = make_checkpoint(edit=lambda t: t.update({"backbone.layers.0.mixer.D": t["backbone.layers.0.mixer.D"].float()}))
    found = api.inspect(folder)
    assert found["source"] == "headers"
    assert found["dtypes"]["F32"] == {"tensors": 4, "bytes": 3 * 8 * 4 + 4 * 4}  # two routers' biases, MTP's, and D
    assert found["bytes"] == sum(v["bytes"] for v in found["dtypes"].values())
    roles = Counter(s.role for s in tensor_table(load_config(folder)[0]))
    assert found["tensors"] == sum(roles.values())


@pytest.mark.parametrize(
    ("section", "algorithm", "item"),
    [
        ({"quant_algo": "FP8", "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}, "FP8", 1),
        ({"quant_algo": "NVFP4", "kv_cache_scheme": None}, "NVFP4", 2),
        ({"quant_algo": "NVFP4"}, "NVFP4", 2),
        (None, None, 2),
    ],
)
def test_inspect_of_a_quantized_config(tmp_path: Path, section: Any, algorithm: str | None, item: int) -> None:
    (tmp_path / "c.json").write_text(json.dumps(json.loads(NANO.read_text()) | {"quantization_config": section}))
    found = api.inspect(tmp_path / "c.json")
    assert found["quantization"] == algorithm
    assert found["kv_cache"]["bytes_per_token"] == 6 * 2 * 2 * 128 * item


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_the_state_cache_dtype(tmp_path: Path, dtype: str, item: int) -> None:
    (tmp_path / "c.json").write_text(json.dumps(json.loads(NANO.read_text()) | {"mamba_ssm_cache_dtype": dtype}))
    assert api.inspect(tmp_path / "c.json")["ssm_state_bytes_per_sequence"] == 23 * 64 * 64 * 128 * item

"""The tensor table: names, roles and shapes of published checkpoints."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.places import NANO, SUPER

from nemoquant.model.parse import load_config, parse_config
from nemoquant.model.roles import ROLES, TensorSpec, tensor_table

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def table() -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in tensor_table(load_config(SUPER)[0])}


def layer(table: dict[str, TensorSpec], prefix: str) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """name -> role, shape, dtype of the tensors under a prefix; of experts only the first and the last."""
    middle = re.compile(r"\.experts\.([1-9]|[1-9]\d|[1-4]\d\d|50\d|510)\.")
    found = {
        n.removeprefix(prefix): s for n, s in table.items() if n.startswith(prefix) and not middle.search(n)
    }
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
    extra = {
        "enorm.weight": NORM,
        "hnorm.weight": NORM,
        "eh_proj.weight": ("eh_proj", (4096, 8192), "BF16"),
        "norm.weight": NORM,
    }
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
        expected = (
            (None, None)
            if numbers is None
            else tuple(None if n is None else int(n) for n in numbers.groups())
        )
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
    assert base["backbone.layers.1.mixer.experts.127.down_proj.weight"] == (
        2688,
        1856,
    )  # no latent space: the whole hidden state
    assert not any("latent" in n or n.startswith("mtp.") for n in base)
    dense = names(hybrid_override_pattern="M-", num_hidden_layers=2)
    assert dense["backbone.layers.1.mixer.up_proj.weight"] == (1856, 2688)
    assert dense["backbone.layers.1.mixer.down_proj.weight"] == (2688, 1856)
    modules = names(num_nextn_predict_layers=2)
    assert {n.split(".mixer.")[0].split(".")[2] for n in modules if n.startswith("mtp.")} == {
        "0",
        "1",
        "2",
        "3",
    }
    assert "mtp.layers.2.eh_proj.weight" in modules
    assert "mtp.layers.3.final_layernorm.weight" in modules

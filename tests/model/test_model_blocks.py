"""Layers with sizes of their own: ``block_configs`` of Puzzle, and lists of sizes."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.norms import relative_error as relative
from support.puzzle import BLOCKS, LARGE, PUZZLE, SMALL
from support.small_model import fused, random_weights, small_config, source, transformers_model

from nemoquant.errors import ConfigError
from nemoquant.model import kinds
from nemoquant.model.parse import load_config, parse_config
from nemoquant.model.reference import ReferenceModel
from nemoquant.model.roles import tensor_table


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config({key: value for key, value in (PUZZLE | changes).items() if value is not ...})
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    return message.removeprefix("config.json: ")


def test_every_layer_has_its_sizes() -> None:
    config = parse_config(PUZZLE)
    own = [
        (c.n_routed_experts, c.num_experts_per_tok, c.moe_intermediate_size, c.moe_latent_size)
        for c in (config.of_layer(2), config.of_layer(5), config.of_mtp_layer(1))
    ]
    assert own == [(8, 2, 96, 32), (4, 1, 64, 64), (6, 3, 32, 32)]
    assert (config.n_routed_experts, config.moe_latent_size) == (8, 64), "the largest of the main model"
    assert config.of_layer(0).moe_intermediate_size == 96, "a layer without blocks of its kind"
    assert config.mtp_layers == ("attention", "moe")
    assert config.layers == ("mamba", "attention", "moe", "mlp", "mamba", "moe")


def test_shapes_of_the_tensor_table_are_written_by_hand() -> None:
    shapes = {spec.name: spec.shape for spec in tensor_table(parse_config(PUZZLE))}
    assert shapes["backbone.layers.2.mixer.experts.7.up_proj.weight"] == (96, 32)
    assert shapes["backbone.layers.5.mixer.experts.3.up_proj.weight"] == (64, 64)
    assert shapes["backbone.layers.5.mixer.fc1_latent_proj.weight"] == (64, 64)
    assert shapes["backbone.layers.5.mixer.shared_experts.down_proj.weight"] == (64, 128)
    assert shapes["backbone.layers.5.mixer.gate.weight"] == (4, 64)
    assert shapes["mtp.layers.1.mixer.experts.5.down_proj.weight"] == (32, 32)
    assert "backbone.layers.5.mixer.experts.4.up_proj.weight" not in shapes
    assert "mtp.layers.1.mixer.experts.6.up_proj.weight" not in shapes


def test_blocks_alone_are_a_schedule() -> None:
    """Published files have no pattern, and none of the sizes that stand in blocks."""
    lean = {
        key: value
        for key, value in PUZZLE.items()
        if key not in {"hybrid_override_pattern", "mtp_hybrid_override_pattern", "num_hidden_layers", *LARGE}
    }
    assert parse_config(lean) == parse_config(PUZZLE)
    theirs = {"mamba": "linear_attention", "attention": "full_attention"}
    spelled = [
        block | {"block_type": theirs.get(block["block_type"], block["block_type"])} for block in BLOCKS
    ]
    assert parse_config(lean | {"block_configs": spelled}) == parse_config(PUZZLE)


def test_without_blocks_of_its_own_mtp_has_the_models_sizes() -> None:
    config = parse_config({key: value for key, value in PUZZLE.items() if key != "mtp_block_configs"})
    assert config.of_mtp_layer(1).moe_intermediate_size == LARGE["moe_intermediate_size"] == 96


def test_layers_that_do_not_differ_are_no_special_case() -> None:
    plain = {key: value for key, value in PUZZLE.items() if key not in ("block_configs", "mtp_block_configs")}
    same = [{"block_type": block["block_type"]} for block in BLOCKS]
    assert parse_config(plain | {"block_configs": same, "mtp_block_configs": []}) == parse_config(plain)
    assert not parse_config(plain).layer_sizes


def test_other_sizes_of_other_kinds() -> None:
    config = parse_config(
        PUZZLE
        | {
            "block_configs": [
                {"block_type": "mamba", "ssm_state_size": 8},
                {"block_type": "attention", "num_attention_heads": 2, "sliding_window": None},
                *BLOCKS[2:],
            ]
        }
    )
    states = [state.shape for state in kinds.states(config)]
    assert states == [(4 * 16 + 2 * 2 * 8, 3), (4, 16, 8), (2, -1, 16), (2, -1, 16), (128, 3), (4, 16, 16)]
    assert kinds.ssm_state_bytes(config) == 4 * (4 * 16 * 8 + 4 * 16 * 16)
    shapes = {spec.name: spec.shape for spec in tensor_table(config)}
    assert shapes["backbone.layers.1.mixer.q_proj.weight"] == (32, 64)


def test_a_list_has_an_entry_for_each_mlp() -> None:
    raw = PUZZLE | {"hybrid_override_pattern": "-M-", "intermediate_size": [96, 32]}
    for key in ("block_configs", "mtp_block_configs", "num_nextn_predict_layers"):
        raw.pop(key)
    raw["num_hidden_layers"] = 3
    widths = [parse_config(raw).of_layer(i).intermediate_size for i in (0, 2)]
    assert widths == [96, 32]
    assert not parse_config(raw | {"intermediate_size": [96]}).layer_sizes
    with pytest.raises(
        ConfigError, match=r"`intermediate_size` is a list of 3; expected one entry, or 2, as"
    ):
        parse_config(raw | {"intermediate_size": [1, 2, 3]})


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"block_type": "moe", "window_length": 512, "no_op": True},
            "layer 5 of `block_configs` has `no_op`: True, `window_length`: 512, which nemoquant doesn't "
            "know for a layer of kind moe; expected block_type, n_routed_experts, num_experts_per_tok",
        ),
        (
            {"block_type": "moe", "num_attention_heads": 2},
            "layer 5 of `block_configs` has `num_attention_heads`: 2, which",
        ),
        (
            {"block_type": "moe", "hidden_size": 32},
            "layer 5 of `block_configs` has `hidden_size`: 32; expected the model's, 64",
        ),
        (
            {"block_type": "moe", "n_routed_experts": 0},
            "layer 5 of `block_configs`: `n_routed_experts` is 0; expected an integer of at least 1",
        ),
        (
            {"block_type": "moe", "n_routed_experts": 4, "num_local_experts": 8},
            "layer 5 of `block_configs`: {'n_routed_experts': 4, 'num_local_experts': 8} contradict",
        ),
        (
            {"block_type": "moe", "num_experts_per_tok": 9},
            "`num_experts_per_tok` is 9, more than the 8 exper",
        ),
        (
            {"attention": {"no_op": True}, "ffn": {}},
            "`block_configs` has {'attention': {'no_op': True}, 'ffn': {}} for layer 5; expected an object "
            "with `block_type`",
        ),
        ("moe", "`block_configs` has 'moe' for layer 5; expected an object with `block_type`"),
        ({"block_type": "mlp"}, "`hybrid_override_pattern` and `block_configs`'s `block_type` describe diff"),
        ({"block_type": "no_op"}, "`block_configs`'s `block_type` has the unknown layer kind ['no_op']"),
        ({"block_type": ["moe"]}, "`block_configs`'s `block_type` has the unknown layer kind [['moe']]"),
    ],
)
def test_blocks_that_are_refused(block: Any, message: str) -> None:
    found = refusal(block_configs=[*BLOCKS[:5], block])
    assert found.startswith(message) or f": {message}" in found, found


def test_blocks_of_another_shape_are_refused() -> None:
    assert refusal(block_configs=BLOCKS[:3]).startswith("`hybrid_override_pattern` and `block_configs`'s")
    assert refusal(block_configs={"0": {}}).startswith("`block_configs` is {'0': {}}; expected a list of obj")
    assert refusal(block_configs=[{}] * 5000).startswith("`block_configs` has 5,000 layers; expected at most")
    given = refusal(layers_block_type=["moe"] * 6, hybrid_override_pattern=...)
    assert given.startswith("`layers_block_type` and `block_configs` describe different layers")


def test_hostile_blocks_cost_little() -> None:
    """Each layer with other sizes and as many experts as are allowed."""
    blocks = [
        {"block_type": "moe", "n_routed_experts": 60_000 + i, "moe_intermediate_size": 1 + i}
        for i in range(4096)
    ]
    began = time.process_time()
    message = refusal(block_configs=blocks, hybrid_override_pattern=..., num_hidden_layers=...)
    assert "more than 524,288 tensors" in message
    assert time.process_time() - began < 3


def test_published_puzzle(tmp_path: Path) -> None:
    """The sizes of Nemotron-Labs-3-Puzzle-75B-A9B's kind: each MoE layer may have others, and MTP Super's."""
    shared = {"n_routed_experts": 512, "moe_latent_size": 1024, "moe_shared_expert_intermediate_size": 5376}
    moe = [
        {"block_type": "moe", "moe_intermediate_size": width, "num_experts_per_tok": top, **shared}
        for width, top in ((1280, 4), (2048, 12))
    ]
    raw = json.loads((Path(__file__).parents[1] / "configs" / "super-120b-a12b.json").read_text())
    for key in (*moe[0], "hybrid_override_pattern", "num_hidden_layers", "layers_block_type"):
        raw.pop(key, None)
    raw |= {
        "model_type": "nemotron_h_puzzle",
        "block_configs": [{"block_type": "mamba"}, moe[0], {"block_type": "attention"}, moe[1]],
        "mtp_block_configs": [{"block_type": "attention"}, moe[1] | {"moe_intermediate_size": 2688}],
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config, _ = load_config(tmp_path)
    widths = [config.of_layer(1), config.of_layer(3), config.of_mtp_layer(1)]
    assert [(c.moe_intermediate_size, c.num_experts_per_tok) for c in widths] == [
        (1280, 4),
        (2048, 12),
        (2688, 12),
    ]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@torch.no_grad()
def test_logits_against_transformers_layers_of_other_sizes() -> None:
    """Its model has one size; each of its MoE blocks is made from a config with the layer's own."""
    from transformers import NemotronHConfig as TheirConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

    uniform, raw = small_config(num_nextn_predict_layers=None)
    names = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
    blocks: list[dict[str, Any]] = [
        {"block_type": names[letter]} for letter in raw["hybrid_override_pattern"]
    ]
    place = uniform.layers.index("moe")
    blocks[place] |= SMALL
    config = parse_config(raw | {"block_configs": blocks})
    weights = random_weights(config)
    theirs = transformers_model(raw, uniform, random_weights(uniform))
    own = {
        key: value for key, value in (raw | SMALL).items() if key not in ("model_type", "num_hidden_layers")
    }
    theirs.model.layers[place].mixer = NemotronHMoE(
        TheirConfig(**own | {"time_step_min": 0.001}), place
    ).eval()
    theirs.load_state_dict(fused(config, weights), strict=True)
    ids = torch.randint(0, 96, (2, 23), generator=torch.Generator().manual_seed(1))
    ours, _ = ReferenceModel(config, source(weights)).forward(ids)
    assert relative(ours, theirs(ids, use_cache=False).logits) < 1e-5  # as for the model of one size

"""The reference model against an independent one: transformers' NemotronHForCausalLM, same weights."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.norms import relative_error as relative
from support.places import CALIB, DEMO, NANO_MODEL
from support.small_model import random_weights, small_config, source, transformers_model
from torch import Tensor

from nemoquant.model.attention import KVState
from nemoquant.model.mamba2 import MambaState
from nemoquant.model.parse import parse_config
from nemoquant.model.reference import ReferenceModel, layer_forward
from nemoquant.tokens.rows import load_rows

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)

# float32 rounds by 6e-8. Some hundred roundings in seven layers, amplified by norms and softmax, give 9e-7 at
# most, measured.
FLOAT32 = 1e-5


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def their_logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="base: every kind of layer, latent experts"),
        pytest.param({"moe_latent_size": None}, id="experts on the full hidden state"),
        pytest.param({"n_group": 4, "topk_group": 2}, id="choice limited to groups of experts"),
        pytest.param({"norm_topk_prob": False}, id="router weights not normalised"),
        pytest.param({"num_experts_per_tok": 1}, id="one expert a token"),
        pytest.param({"num_key_value_heads": 1}, id="one KV head"),
        pytest.param({"num_key_value_heads": 6}, id="as many KV heads as query heads"),
        pytest.param({"n_groups": 1}, id="one group of B and C"),
        pytest.param({"n_groups": 6}, id="a group for each Mamba head"),
        pytest.param({"use_conv_bias": False}, id="convolution without bias"),
        pytest.param({"conv_kernel": 2}, id="convolution of two positions"),
        pytest.param({"layer_norm_epsilon": 0.1}, id="an epsilon that shows"),
    ],
)
def test_logits_in_float32(changes: dict[str, Any]) -> None:
    config, raw = small_config(**changes)
    weights = random_weights(config)
    ids = tokens(2, 41)
    expected = their_logits(transformers_model(raw, config, weights), ids)
    got, _ = ReferenceModel(config, source(weights)).forward(ids)
    assert 0.3 < float(expected.std()) < 3  # O(1), otherwise the comparison proves little
    assert relative(got, expected) < FLOAT32


@pytest.mark.parametrize("folder", [DEMO, NANO_MODEL], ids=lambda folder: folder.name)
def test_logits_of_the_trained_models(folder: Path) -> None:
    """On text, with learnt routers and decays: rows of 64 tokens, which fit one chunk of either model."""
    raw = json.loads((folder / "config.json").read_text()) | {"time_step_min": 0.0}  # theirs has a floor
    config = parse_config(raw)
    weights = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights |= {name: w.float() for name, w in load_file(shard).items()}
    ids = torch.from_numpy(load_rows(CALIB / "data/evaluation.jsonl", folder, config, 4, 64).ids)
    expected = their_logits(transformers_model(raw, config, weights), ids)
    got, _ = ReferenceModel(config, source(weights)).forward(ids)
    assert relative(got, expected) < FLOAT32


def test_every_layer_matters() -> None:
    """The random model is a fair test: no layer's output is negligible in the residual."""
    config, _ = small_config()
    weights = source(random_weights(config))
    x = ReferenceModel(config, weights).embed(tokens(2, 41))
    for i, kind in enumerate(config.layers):
        y, _ = layer_forward(config, kind, weights(f"backbone.layers.{i}."), x)
        assert relative(y, x) > 0.2, f"layer {i}, {kind}"
        x = y


def test_decode_and_states() -> None:
    """A prompt, then token by token from the cache: each step's logits, both kinds of state at the end."""
    config, raw = small_config(hybrid_override_pattern="M*EM")
    weights = random_weights(config)
    ids = tokens(2, 30)
    theirs, cache = transformers_model(raw, config, weights), None
    ours, state = ReferenceModel(config, source(weights)), None
    for part in torch.split(ids, [9] + [1] * 21, 1):
        with torch.no_grad():
            out = theirs(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits, state = ours.forward(part, state)
        assert relative(logits, out.logits) < FLOAT32
    assert state is not None
    for layer, (kept, expected) in enumerate(zip(state.layers, cache.layers, strict=True)):
        if isinstance(kept, MambaState):
            assert relative(kept.ssm, expected.recurrent_states[0]) < FLOAT32, f"layer {layer}"
            assert relative(kept.conv, expected.conv_states[0][..., -3:]) < FLOAT32, f"layer {layer}"
        if isinstance(kept, KVState):
            assert relative(kept.key, expected.keys) < FLOAT32, f"layer {layer}"
            assert relative(kept.value, expected.values) < FLOAT32, f"layer {layer}"


def test_their_floor_of_dt_is_a_difference_that_we_do_not_copy() -> None:
    """transformers limits dt to at least ``time_step_min`` = 0.001: slower heads write and decay too fast.

    Our limit can be set to do the same.
    """
    config, raw = small_config(hybrid_override_pattern="M*-M")
    weights = random_weights(config)
    for name in weights:
        if name.endswith("dt_bias"):
            weights[name] = torch.full_like(weights[name], -9.0)  # softplus 1.2e-4
        if name.endswith("in_proj.weight"):
            weights[name][-config.mamba_num_heads :] *= 0.1
    ids = tokens(2, 60)
    floored = their_logits(transformers_model({**raw, "time_step_min": 0.001}, config, weights), ids)
    free = their_logits(transformers_model(raw, config, weights), ids)
    ours, _ = ReferenceModel(config, source(weights)).forward(ids)
    limited_config, _ = small_config(
        hybrid_override_pattern="M*-M", time_step_limit=[0.001, {"__float__": "Infinity"}]
    )
    limited, _ = ReferenceModel(limited_config, source(weights)).forward(ids)
    assert relative(ours, free) < FLOAT32
    assert relative(floored, free) > 0.01
    assert relative(limited, floored) < FLOAT32


@pytest.mark.parametrize("pattern", ["M*-M*-", "M*EM-E*"])
def test_bfloat16(pattern: str) -> None:
    """Both round at different places, so the truth is float32 on the same bf16 weights.

    Our error must stay below twice that of the framework in the same dtype. The error is the median over
    positions of the relative error, because a token whose eighth expert flips by a rounding is off by a tenth
    in either.
    """
    config, raw = small_config(hybrid_override_pattern=pattern)
    weights = {name: w.bfloat16() for name, w in random_weights(config).items()}
    ids = tokens(4, 64)

    def error(logits: Tensor) -> float:
        return float(((logits.double() - truth).norm(dim=-1) / truth.norm(dim=-1)).median())

    truth = ReferenceModel(config, source(weights)).forward(ids)[0].double()
    wide = {name: w.float() for name, w in weights.items()}
    theirs = their_logits(transformers_model(raw, config, wide, torch.bfloat16), ids)
    ours, _ = ReferenceModel(config, source(weights), torch.bfloat16).forward(ids)
    assert ours.dtype == torch.bfloat16
    assert error(ours) < 2 * error(theirs) < 0.1

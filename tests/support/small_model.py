"""Small random models: config, weights, and transformers' model of the same weights."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nemoquant.model.config import NemotronHConfig
from nemoquant.model.parse import parse_config
from nemoquant.model.taps import Scope

RAW: dict[str, Any] = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M*EM-E*",
    "num_hidden_layers": 7,
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "ssm_state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 64,
    "use_conv_bias": True,
    "time_step_min": 0.0,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_latent_size": 32,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
}


def small_config(**changes: Any) -> tuple[NemotronHConfig, dict[str, Any]]:
    """The base config with some keys changed (None removes one): parsed, and as in a config.json."""
    raw = {key: value for key, value in {**RAW, **changes}.items() if value is not None}
    raw["num_hidden_layers"] = len(raw["hybrid_override_pattern"])
    return parse_config(raw), raw


def mixer_weights(config: NemotronHConfig, kind: str, g: torch.Generator) -> dict[str, Tensor]:
    """Random weights of one mixer, scaled by fan-in so that its output is O(1) for an input of O(1)."""

    def matrix(out: int, inputs: int, gain: float = 1.0) -> Tensor:
        return torch.randn(out, inputs, generator=g) * (gain / math.sqrt(inputs))

    def vector(size: int, low: float, high: float) -> Tensor:
        return torch.empty(size).uniform_(low, high, generator=g)

    h = config.hidden_size
    if kind == "mamba":
        inner, channels, heads = config.mamba_inner, config.conv_channels, config.mamba_num_heads
        dt = torch.exp(vector(heads, math.log(1e-3), math.log(0.5)))
        weights = {
            "in_proj.weight": matrix(inner + channels + heads, h),
            "out_proj.weight": matrix(h, inner),
            "conv1d.weight": torch.randn(channels, 1, config.conv_kernel, generator=g) * 0.6,
            "A_log": vector(heads, 0.0, 2.7),
            "D": vector(heads, 0.5, 1.5),
            "dt_bias": dt + torch.log(-torch.expm1(-dt)),
            "norm.weight": vector(inner, 0.5, 1.5),
        }
        return weights | ({"conv1d.bias": vector(channels, -0.3, 0.3)} if config.use_conv_bias else {})
    if kind == "attention":
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return {
            "q_proj.weight": matrix(q, h, 2.0),
            "k_proj.weight": matrix(kv, h),
            "v_proj.weight": matrix(kv, h, 2.0),
            "o_proj.weight": matrix(h, q),
        }
    if kind == "mlp":
        return {
            "up_proj.weight": matrix(config.intermediate_size, h),
            "down_proj.weight": matrix(h, config.intermediate_size),
        }
    width, inputs, shared = (
        config.moe_intermediate_size,
        config.expert_input,
        config.moe_shared_expert_intermediate_size,
    )
    weights = {
        "gate.weight": matrix(config.n_routed_experts, h),
        "gate.e_score_correction_bias": vector(config.n_routed_experts, -0.1, 0.1),
        "shared_experts.up_proj.weight": matrix(shared, h),
        "shared_experts.down_proj.weight": matrix(h, shared, 0.5),
    }
    for e in range(config.n_routed_experts):
        weights |= {
            f"experts.{e}.up_proj.weight": matrix(width, inputs),
            f"experts.{e}.down_proj.weight": matrix(inputs, width),
        }
    if config.moe_latent_size:
        weights |= {"fc1_latent_proj.weight": matrix(inputs, h), "fc2_latent_proj.weight": matrix(h, inputs)}
    return weights


def random_weights(config: NemotronHConfig, seed: int = 0) -> dict[str, Tensor]:
    """All weights of a checkpoint with their published names, float32."""
    g = torch.Generator().manual_seed(seed)
    h, vocab = config.hidden_size, config.vocab_size

    def norm() -> Tensor:
        return torch.empty(h).uniform_(0.5, 1.5, generator=g)

    weights = {
        "backbone.embeddings.weight": torch.randn(vocab, h, generator=g),
        "backbone.norm_f.weight": norm(),
    }
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = torch.randn(vocab, h, generator=g) / math.sqrt(h)
    layers = [(f"backbone.layers.{i}.", k, config.of_layer(i)) for i, k in enumerate(config.layers)]
    mtp = enumerate(config.mtp_layers * config.mtp_modules)
    layers += [(f"mtp.layers.{i}.", kind, config.of_mtp_layer(i)) for i, kind in mtp]
    for prefix, kind, own in layers:
        weights[prefix + "norm.weight"] = norm()
        weights |= {f"{prefix}mixer.{name}": w for name, w in mixer_weights(own, kind, g).items()}
    count = len(config.mtp_layers)
    for m in range(config.mtp_modules):
        first, last = f"mtp.layers.{m * count}.", f"mtp.layers.{m * count + count - 1}."
        weights |= {
            first + "enorm.weight": norm(),
            first + "hnorm.weight": norm(),
            last + "final_layernorm.weight": norm(),
        }
        weights[first + "eh_proj.weight"] = torch.randn(h, 2 * h, generator=g) / math.sqrt(2 * h)
    return weights


def source(weights: Mapping[str, Tensor]) -> Callable[[str], Scope]:
    """The weights in the form that ``ReferenceModel`` asks for."""
    return lambda prefix: Scope(weights, prefix)


def fused(config: NemotronHConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names: ``model.`` for ``backbone.``, no MTP.

    All experts of a layer are one [experts, out, in] tensor.
    """
    result = {}
    for name, w in weights.items():
        if not name.startswith("mtp.") and ".experts." not in name:
            result[name.replace("backbone.", "model.")] = w
    for i, kind in enumerate(config.layers):
        if kind == "moe":
            for projection in ("up_proj", "down_proj"):
                parts = [
                    weights[f"backbone.layers.{i}.mixer.experts.{e}.{projection}.weight"]
                    for e in range(config.of_layer(i).n_routed_experts)
                ]
                result[f"model.layers.{i}.mixer.experts.{projection}"] = torch.stack(parts)
    return result


def transformers_model(
    raw: Mapping[str, Any],
    config: NemotronHConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> Any:
    """``NemotronHForCausalLM`` with these weights, in evaluation mode, on its torch path.

    Two of its faults limit the tests. Across chunks that path (5.6 to 5.14) sums over the wrong axis, so that
    sequences longer than ``chunk_size`` are wrong (its issue 47246): sequences must fit one chunk, and may
    continue only with single tokens. And its cache does not support "mlp" layers: pass ``use_cache=False`` if
    there are any.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import NemotronHConfig as TheirConfig
    from transformers import NemotronHForCausalLM

    keys = {key: value for key, value in raw.items() if key not in ("model_type", "num_hidden_layers")}
    keys["time_step_min"] = (
        0.001  # its initialisation takes the logarithm of this; the requested lower limit is set below
    )
    model = NemotronHForCausalLM(TheirConfig(**keys, use_mamba_kernels=False)).eval()
    model.load_state_dict(fused(config, weights), strict=True)
    for module in model.modules():
        if hasattr(module, "time_step_min"):
            module.time_step_min = raw["time_step_min"]
    return model.to(dtype)

"""The synthetic checkpoint: a layer of each kind and more, latent experts, MTP, two shards; token rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from nemoquant.model.parse import parse_config
from nemoquant.model.roles import tensor_table

Tensors = dict[str, torch.Tensor]
CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "dtype": "bfloat16",
    "hybrid_override_pattern": "M*E-ME",
    "num_hidden_layers": 6,
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 32,
    "use_conv_bias": True,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_latent_size": 32,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 80,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


# Sizes that blocks of 32 divide, for presets whose format has them.
WIDE = {"moe_intermediate_size": 96, "moe_shared_expert_intermediate_size": 160}


def random_tensors(raw: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights scaled by fan-in, so that activations stay O(1); bf16, the router's bias fp32."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in tensor_table(parse_config(raw)):
        if spec.role.endswith("norm"):
            value = torch.rand(spec.shape, generator=g) + 0.5
        elif spec.role.endswith("ssm.A_log"):
            value = torch.rand(spec.shape, generator=g) * 2.5
        elif spec.role.endswith("router.bias"):
            value = torch.zeros(spec.shape)  # so that every expert gets tokens
        elif spec.role.endswith("ssm.dt_bias"):
            value = torch.rand(spec.shape, generator=g) * 4 - 5
        else:
            value = torch.randn(spec.shape, generator=g) / spec.shape[-1] ** 0.5
        tensors[spec.name] = value.to(torch.float32 if spec.dtype == "F32" else torch.bfloat16)
    return tensors


def write_checkpoint(
    folder: Path, raw: dict[str, Any], tensors: dict[str, torch.Tensor], shards: int = 2
) -> Path:
    """Writes config, index and shards as published checkpoints have them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n].contiguous() for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return folder


def synthetic_checkpoint(folder: Path) -> Path:
    """The base checkpoint, unchanged."""
    return write_checkpoint(folder, CONFIG, random_tensors(CONFIG))


def random_rows(shape: tuple[int, int] = (8, 32), seed: int = 0) -> np.ndarray[Any, Any]:
    """Token ids [rows, length] of its vocabulary, without the three special ones."""
    return np.random.default_rng(seed).integers(3, CONFIG["vocab_size"], shape)


def write_rows(path: Path, shape: tuple[int, int] = (8, 32), seed: int = 0) -> Path:
    """The same as an .npy file, since the checkpoint has no tokenizer."""
    np.save(path, random_rows(shape, seed))
    return path


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    """An edit of tensors that changes one."""

    def edit(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name])

    return edit

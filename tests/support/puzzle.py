"""A small Puzzle model: two MoE layers of other sizes, and a third in multi-token prediction."""

from typing import Any

from support.synthetic import CONFIG

LARGE: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "moe_latent_size": 32,
    "moe_shared_expert_intermediate_size": 160,
}
SMALL: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 64,
    "moe_latent_size": 64,
    "moe_shared_expert_intermediate_size": 128,
}
PREDICTOR = LARGE | {"n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
BLOCKS: list[dict[str, Any]] = [
    {"block_type": "mamba"},
    {"block_type": "attention"},
    {"block_type": "moe", **LARGE},
    {"block_type": "mlp"},
    {"block_type": "mamba"},
    {"block_type": "moe", **SMALL},
]
MTP_BLOCKS: list[dict[str, Any]] = [{"block_type": "attention"}, {"block_type": "moe", **PREDICTOR}]
PUZZLE: dict[str, Any] = CONFIG | {
    "architectures": ["NemotronHPuzzleForCausalLM"],
    "model_type": "nemotron_h_puzzle",
    "block_configs": BLOCKS,
    "mtp_block_configs": MTP_BLOCKS,
    **LARGE,
}

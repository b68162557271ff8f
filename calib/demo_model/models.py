"""The models that train.py can train and measure.py can measure: a record each.

``demo`` is the model that the package ships. ``nano`` is a second one, for tests and benches alone: what
holds for both is less likely to be an accident of one model. Its sizes and its pattern are others, and its
blocks are those of Nemotron 3 Nano: routed experts work on the hidden state itself, without latent
projections, and there is no multi-token-prediction module. Every dimension of its weights that can be
quantized is a multiple of 64.
"""

from dataclasses import dataclass
from pathlib import Path

CALIB = Path(__file__).resolve().parents[1]
VOCAB = 2048
PAD, BOS, EOS = 0, 1, 2


@dataclass(frozen=True)
class Model:
    """A model's folder, its config.json, and what differs in its training.

    Attributes:
        name: of the model on the command line, and of its files in WORK_DIR.
        folder: of the checkpoint.
        what: the first words of its manifest.
        config: its config.json.
        chunk: positions that the scan of training takes at once; on a CPU small ones are faster.
        init_embedding: standard deviation of the first embeddings.
        init_down: of the first down projections of routed experts, in units of 1 / sqrt(inputs).
        revive_from: from this step on up projections take smaller steps, and dead units are made anew.
        upcycle_at: at this step the experts of layers ``upcycled`` are made from their shared expert; None:
            never.
    """

    name: str
    folder: Path
    what: str
    config: dict
    chunk: int
    init_embedding: float
    init_down: float
    revive_from: int
    upcycle_at: int | None
    upcycled: tuple[int, ...]

    @property
    def hidden(self) -> int:
        return self.config["hidden_size"]

    @property
    def inner(self) -> int:
        return self.config["mamba_num_heads"] * self.config["mamba_head_dim"]

    @property
    def scan_sizes(self) -> tuple[int, int, int, int, int]:
        """Of a Mamba mixer: inner size, groups, state size, heads, positions in a chunk."""
        names = ("n_groups", "ssm_state_size", "mamba_num_heads")
        return (self.inner, *(self.config[name] for name in names), self.chunk)

    @property
    def experts(self) -> int:
        return self.config["n_routed_experts"]

    @property
    def latent(self) -> int | None:
        """Width that routed experts work on; None: the hidden state itself."""
        return self.config.get("moe_latent_size")

    @property
    def predicts_two(self) -> bool:
        return bool(self.config.get("num_nextn_predict_layers"))


DEMO_CONFIG: dict = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "hybrid_override_pattern": "MEM*EMEM*E",
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mamba_num_heads": 6,
    "mamba_head_dim": 64,
    "ssm_state_size": 64,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 64,
    "expand": 2,
    "use_conv_bias": True,
    "use_bias": False,
    "mamba_proj_bias": False,
    "mamba_hidden_act": "silu",
    "mamba_ssm_cache_dtype": "float32",
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 0.0001,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "moe_latent_size": 96,
    "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 96,
    "moe_shared_expert_overlap": False,
    "intermediate_size": 256,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
    "norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": False,
    "rescale_prenorm_residual": True,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "use_cache": True,
    "num_logits_to_keep": 1,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}

NANO_CONFIG: dict = {
    name: value
    for name, value in DEMO_CONFIG.items()
    if name not in ("moe_latent_size", "num_nextn_predict_layers", "mtp_hybrid_override_pattern")
} | {
    "hidden_size": 128,
    "hybrid_override_pattern": "MEMEM*EM*E",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 16,
    "mamba_head_dim": 16,
    "ssm_state_size": 28,  # in_proj gives 2 * 256 + 2 * 2 * 28 + 16 = 640 = 10 * 64 rows
    "chunk_size": 128,
    "n_routed_experts": 24,
    "moe_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 64,
    "intermediate_size": 128,
}

MODELS = {
    model.name: model
    for model in (
        Model(
            name="demo",
            folder=CALIB / "demo_model",
            what="a small Nemotron-H",
            config=DEMO_CONFIG,
            chunk=64,
            init_embedding=0.05,
            init_down=0.5,
            # At step 1,000 nearly all units of two layers were dead.
            revive_from=1000,
            # The revived units of these two layers never came to matter.
            upcycle_at=3000,
            upcycled=(4, 6),
        ),
        Model(
            name="nano",
            folder=CALIB / "nano_model",
            what="a small Nemotron-H with the blocks of Nemotron 3 Nano",
            config=NANO_CONFIG,
            chunk=32,
            init_embedding=0.3,
            init_down=0.2,
            revive_from=200,
            upcycle_at=None,
            upcycled=(),
        ),
    )
}

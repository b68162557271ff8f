"""The architecture of a Nemotron-H model: its schedule of layers, sizes and constants, in canonical names."""

from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["mamba", "moe", "attention", "mlp"]


@dataclass(frozen=True)
class NemotronHConfig:
    """Sizes and constants of one Nemotron-H model. Sizes of layer kinds that are not in the schedule are 0.

    ``layers`` is the schedule of the main model, ``mtp_layers`` that of each of ``mtp_modules``
    multi-token-prediction modules (empty when there are none). ``moe_latent_size`` is 0 for models whose
    routed experts read the full hidden state. ``time_step_limit`` bounds dt after softplus; it is
    ``(0, inf)`` where the config has none, as in serving engines.
    """

    layers: tuple[LayerKind, ...]
    mtp_layers: tuple[LayerKind, ...]
    mtp_modules: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    # attention
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    # Mamba-2
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    conv_kernel: int
    use_conv_bias: bool
    chunk_size: int
    time_step_limit: tuple[float, float]
    time_step_min: float
    mamba_ssm_cache_dtype: str
    # mixture of experts
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_latent_size: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    n_group: int
    topk_group: int
    # special tokens
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def mamba_inner(self) -> int:
        """Width of the scan's input x: heads times head size."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: x, B and C."""
        return self.mamba_inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def expert_input(self) -> int:
        """Width of what a routed expert reads and writes."""
        return self.moe_latent_size or self.hidden_size

    def count(self, kind: LayerKind) -> int:
        """How many layers of ``kind`` the main model has."""
        return self.layers.count(kind)

"""The architecture of a Nemotron-H model: its schedule of layers, sizes and constants, in canonical names."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

LayerKind = Literal["mamba", "moe", "attention", "mlp"]
Sizes = tuple[tuple[str, Any], ...]  # (field of the config, its value in one layer)


@dataclass(frozen=True)
class NemotronHConfig:
    """Sizes and constants of one Nemotron-H model. Sizes of layer kinds that are not in the schedule are 0.

    ``layers`` is the schedule of the main model, ``mtp_layers`` that of each of ``mtp_modules``
    multi-token-prediction modules (empty when there are none). ``moe_latent_size`` is 0 for models whose
    routed experts read the full hidden state. ``time_step_limit`` bounds dt after softplus; it is
    ``(0, inf)`` where the config has none, as in serving engines.

    Where layers of a kind differ (Puzzle), ``layer_sizes`` has an entry for each layer of the main model, and
    the fields hold the largest size of any. What belongs to one layer is asked of :meth:`of_layer`, or
    :meth:`of_mtp_layer`. ``mtp_layer_sizes`` has an entry for each of ``mtp_layers``. Both are empty where
    all layers have the fields' sizes.
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
    # what differs from the fields above, by layer
    layer_sizes: tuple[Sizes, ...] = ()
    mtp_layer_sizes: tuple[Sizes, ...] = ()
    # before the published names of tensors and modules in files, where the model is a part of another
    prefix: str = ""

    def of_layer(self, layer: int) -> "NemotronHConfig":
        """The config with the sizes of one layer of the main model."""
        return self._by_layer[layer] if self.layer_sizes else self

    def of_mtp_layer(self, layer: int) -> "NemotronHConfig":
        """The config with the sizes of one layer of MTP, counted through all modules."""
        return self._by_mtp_layer[layer % len(self.mtp_layers)] if self.mtp_layer_sizes else self

    def variants(self, kind: LayerKind) -> list["NemotronHConfig"]:
        """The configs of the main model's layers of ``kind``, each once, in their order."""
        own = (self.of_layer(i) for i, known in enumerate(self.layers) if known == kind)
        return list(dict.fromkeys(own))

    @cached_property
    def _by_layer(self) -> tuple["NemotronHConfig", ...]:
        return tuple(self._with(sizes) for sizes in self.layer_sizes)

    @cached_property
    def _by_mtp_layer(self) -> tuple["NemotronHConfig", ...]:
        return tuple(self._with(sizes) for sizes in self.mtp_layer_sizes)

    def _with(self, sizes: Sizes) -> "NemotronHConfig":
        return replace(self, layer_sizes=(), mtp_layer_sizes=(), **dict(sizes))

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

    @property
    def routed_share(self) -> float:
        """The share of a layer's routed experts that one token uses."""
        return self.num_experts_per_tok / self.n_routed_experts

    def count(self, kind: LayerKind) -> int:
        """How many layers of ``kind`` the main model has."""
        return self.layers.count(kind)

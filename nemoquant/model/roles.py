"""The tensor table of a Nemotron-H model: every tensor that a config calls for, with its role, in file order.

Names are the published ones (``backbone.layers.3.mixer.experts.7.up_proj.weight``). Recipes select
tensors by role:

    embedding  lm_head  norm  conv1d
    ssm.A_log  ssm.D  ssm.dt_bias
    mamba.in_proj  mamba.out_proj
    attention.q_proj  attention.k_proj  attention.v_proj  attention.o_proj
    router  router.bias
    experts.up_proj  experts.down_proj  shared_experts.up_proj  shared_experts.down_proj
    latent.fc1  latent.fc2  mlp.up_proj  mlp.down_proj
    mtp.eh_proj, and ``mtp.`` before any of the above for the tensors of multi-token-prediction modules
"""

from collections.abc import Iterator
from dataclasses import dataclass

from nemoquant.model.config import LayerKind, NemotronHConfig

LINEAR_ROLES = (
    "mamba.in_proj",
    "mamba.out_proj",
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.o_proj",
    "experts.up_proj",
    "experts.down_proj",
    "shared_experts.up_proj",
    "shared_experts.down_proj",
    "latent.fc1",
    "latent.fc2",
    "mlp.up_proj",
    "mlp.down_proj",
    "lm_head",
)
OTHER_ROLES = ("embedding", "norm", "conv1d", "ssm.A_log", "ssm.D", "ssm.dt_bias", "router", "router.bias")
MTP_ROLES = tuple(f"mtp.{role}" for role in ("eh_proj", "norm", *LINEAR_ROLES[:-1], *OTHER_ROLES[2:]))
ROLES = (*LINEAR_ROLES, *OTHER_ROLES, *MTP_ROLES)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that the config calls for.

    ``dtype`` is the one in published bf16 checkpoints: BF16, or F32 for the router's bias.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    layer: int | None = None
    expert: int | None = None
    dtype: str = "BF16"

    @property
    def module(self) -> str:
        """The module's name: the tensor's without ``.weight``."""
        return self.name.removesuffix(".weight")


def tensor_table(config: NemotronHConfig) -> list[TensorSpec]:
    """Every tensor of the model, in file order: embedding, layers, final norm, head, MTP modules."""
    hidden, vocab = config.hidden_size, config.vocab_size
    table = [TensorSpec("backbone.embeddings.weight", "embedding", (vocab, hidden))]
    for i, kind in enumerate(config.layers):
        prefix = f"backbone.layers.{i}"
        table.append(TensorSpec(f"{prefix}.norm.weight", "norm", (hidden,), i))
        table += mixer_table(config, kind, f"{prefix}.mixer.", i)
    table.append(TensorSpec("backbone.norm_f.weight", "norm", (hidden,)))
    if not config.tie_word_embeddings:
        table.append(TensorSpec("lm_head.weight", "lm_head", (vocab, hidden)))
    for module in range(config.mtp_modules):
        table += mtp_table(config, module)
    return table


def mtp_table(config: NemotronHConfig, module: int) -> Iterator[TensorSpec]:
    """The tensors of one multi-token-prediction module; layer numbers continue from the module before."""
    hidden, depth = config.hidden_size, len(config.mtp_layers)
    for j, kind in enumerate(config.mtp_layers):
        layer = module * depth + j
        prefix = f"mtp.layers.{layer}"
        if j == 0:
            yield TensorSpec(f"{prefix}.enorm.weight", "mtp.norm", (hidden,), layer)
            yield TensorSpec(f"{prefix}.hnorm.weight", "mtp.norm", (hidden,), layer)
            yield TensorSpec(f"{prefix}.eh_proj.weight", "mtp.eh_proj", (hidden, 2 * hidden), layer)
        yield TensorSpec(f"{prefix}.norm.weight", "mtp.norm", (hidden,), layer)
        for spec in mixer_table(config, kind, f"{prefix}.mixer.", layer):
            yield TensorSpec(spec.name, f"mtp.{spec.role}", spec.shape, layer, spec.expert, spec.dtype)
        if j == depth - 1:
            yield TensorSpec(f"{prefix}.final_layernorm.weight", "mtp.norm", (hidden,), layer)


def mixer_table(config: NemotronHConfig, kind: LayerKind, prefix: str, layer: int) -> Iterator[TensorSpec]:
    """The tensors of one mixer; ``prefix`` ends with ``.mixer.``."""
    for name, role, shape, expert, dtype in _MIXERS[kind](config):
        yield TensorSpec(prefix + name, role, shape, layer, expert, dtype)


_Entry = tuple[str, str, tuple[int, ...], int | None, str]


def _weight(name: str, role: str, *shape: int, expert: int | None = None) -> _Entry:
    return f"{name}.weight", role, shape, expert, "BF16"


def _mamba(c: NemotronHConfig) -> Iterator[_Entry]:
    inner, heads = c.mamba_inner, c.mamba_num_heads
    yield "A_log", "ssm.A_log", (heads,), None, "BF16"
    yield "D", "ssm.D", (heads,), None, "BF16"
    yield "dt_bias", "ssm.dt_bias", (heads,), None, "BF16"
    yield _weight("conv1d", "conv1d", c.conv_channels, 1, c.conv_kernel)
    if c.use_conv_bias:
        yield "conv1d.bias", "conv1d", (c.conv_channels,), None, "BF16"
    yield _weight("norm", "norm", inner)
    yield _weight("in_proj", "mamba.in_proj", inner + c.conv_channels + heads, c.hidden_size)
    yield _weight("out_proj", "mamba.out_proj", c.hidden_size, inner)


def _attention(c: NemotronHConfig) -> Iterator[_Entry]:
    query, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    yield _weight("q_proj", "attention.q_proj", query, c.hidden_size)
    yield _weight("k_proj", "attention.k_proj", kv, c.hidden_size)
    yield _weight("v_proj", "attention.v_proj", kv, c.hidden_size)
    yield _weight("o_proj", "attention.o_proj", c.hidden_size, query)


def _moe(c: NemotronHConfig) -> Iterator[_Entry]:
    hidden, latent, width = c.hidden_size, c.expert_input, c.moe_intermediate_size
    yield _weight("gate", "router", c.n_routed_experts, hidden)
    yield "gate.e_score_correction_bias", "router.bias", (c.n_routed_experts,), None, "F32"
    if c.moe_latent_size:
        yield _weight("fc1_latent_proj", "latent.fc1", latent, hidden)
        yield _weight("fc2_latent_proj", "latent.fc2", hidden, latent)
    if c.n_shared_experts:
        shared = c.moe_shared_expert_intermediate_size  # of all shared experts together, as in transformers
        yield _weight("shared_experts.up_proj", "shared_experts.up_proj", shared, hidden)
        yield _weight("shared_experts.down_proj", "shared_experts.down_proj", hidden, shared)
    for e in range(c.n_routed_experts):
        yield _weight(f"experts.{e}.up_proj", "experts.up_proj", width, latent, expert=e)
    for e in range(c.n_routed_experts):
        yield _weight(f"experts.{e}.down_proj", "experts.down_proj", latent, width, expert=e)


def _mlp(c: NemotronHConfig) -> Iterator[_Entry]:
    yield _weight("up_proj", "mlp.up_proj", c.intermediate_size, c.hidden_size)
    yield _weight("down_proj", "mlp.down_proj", c.hidden_size, c.intermediate_size)


_MIXERS = {"mamba": _mamba, "attention": _attention, "moe": _moe, "mlp": _mlp}

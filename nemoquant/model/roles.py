"""The tensor table of a Nemotron-H model: every tensor that a config calls for, with its role, in file order.

Names are the published ones (``names.py``); the tensors of a mixer stand in the record of its layer's kind
(``kinds/``). Recipes select tensors by role:

    embedding  lm_head  norm  conv1d
    ssm.A_log  ssm.D  ssm.dt_bias
    mamba.in_proj  mamba.out_proj
    attention.q_proj  attention.k_proj  attention.v_proj  attention.o_proj
    router  router.bias
    experts.up_proj  experts.down_proj  shared_experts.up_proj  shared_experts.down_proj
    latent.fc1  latent.fc2  mlp.up_proj  mlp.down_proj
    mtp.eh_proj, and ``mtp.`` before any of the above for the tensors of multi-token-prediction modules

What stands beside the language model in a checkpoint (``nested.py``) has the role ``tower``, which no recipe
can name.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from nemoquant.model import names
from nemoquant.model.config import LayerKind, NemotronHConfig
from nemoquant.model.kinds import KINDS

_LINEAR = tuple(role for kind in KINDS.values() for role in kind.linear)
_OTHER = tuple(role for kind in KINDS.values() for role in kind.other)
LINEAR_ROLES = (*_LINEAR, "lm_head")
OTHER_ROLES = ("embedding", "norm", *_OTHER)
MTP_ROLES = tuple(f"mtp.{role}" for role in ("eh_proj", "norm", *_LINEAR, *_OTHER))
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
    table = [TensorSpec(f"{names.EMBEDDINGS}.weight", "embedding", (vocab, hidden))]
    for i, kind in enumerate(config.layers):
        prefix = names.layer(i)
        table.append(TensorSpec(f"{prefix}norm.weight", "norm", (hidden,), i))
        table += mixer_table(config.of_layer(i), kind, prefix + names.MIXER, i)
    table.append(TensorSpec(f"{names.FINAL_NORM}.weight", "norm", (hidden,)))
    if not config.tie_word_embeddings:
        table.append(TensorSpec(f"{names.HEAD}.weight", "lm_head", (vocab, hidden)))
    for module in range(config.mtp_modules):
        table += mtp_table(config, module)
    return table


def mtp_table(config: NemotronHConfig, module: int) -> Iterator[TensorSpec]:
    """The tensors of one multi-token-prediction module; layer numbers continue from the module before."""
    hidden, depth = config.hidden_size, len(config.mtp_layers)
    for j, kind in enumerate(config.mtp_layers):
        layer = module * depth + j
        prefix = names.mtp_layer(layer)
        if j == 0:
            yield TensorSpec(f"{prefix}enorm.weight", "mtp.norm", (hidden,), layer)
            yield TensorSpec(f"{prefix}hnorm.weight", "mtp.norm", (hidden,), layer)
            yield TensorSpec(f"{prefix}eh_proj.weight", "mtp.eh_proj", (hidden, 2 * hidden), layer)
        yield TensorSpec(f"{prefix}norm.weight", "mtp.norm", (hidden,), layer)
        for spec in mixer_table(config.of_mtp_layer(layer), kind, prefix + names.MIXER, layer):
            yield TensorSpec(spec.name, f"mtp.{spec.role}", spec.shape, layer, spec.expert, spec.dtype)
        if j == depth - 1:
            yield TensorSpec(f"{prefix}final_layernorm.weight", "mtp.norm", (hidden,), layer)


def mixer_table(config: NemotronHConfig, kind: LayerKind, prefix: str, layer: int) -> Iterator[TensorSpec]:
    """The tensors of one mixer; ``config`` is its layer's, ``prefix`` ends with ``.mixer.``."""
    for entry in KINDS[kind].tensors(config):
        yield TensorSpec(prefix + entry.name, entry.role, entry.shape, layer, entry.expert, entry.dtype)

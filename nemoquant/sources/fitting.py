"""A config.json held against the tensors beside it: what fine-tuning tools leave out of step is put right and
told, everything else is refused with the key of the config that it depends on.

Put right, because the tensors leave no doubt and engines would refuse the folder as it is:

- the config declares multi-token prediction, no tensor of it is there (transformers drops them when it saves)
- embeddings and head have another number of rows than ``vocab_size``
- a head that equals the embeddings although the config ties both

Told alone is an adapter of PEFT that lies beside the weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemoquant.checkpoint.header import TensorInfo
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.spellings import ADAPTER
from nemoquant.checkpoint.towers import towers
from nemoquant.errors import TensorTableError, listing
from nemoquant.model import names
from nemoquant.model.config import LayerKind, NemotronHConfig
from nemoquant.model.kinds import KINDS
from nemoquant.model.nested import sections, with_values
from nemoquant.model.parse import ADAPTER_CONFIG, layer_pattern, parse_config, without_mtp
from nemoquant.model.roles import TensorSpec, tensor_table

_EMBEDDINGS, _HEAD = f"{names.EMBEDDINGS}.weight", f"{names.HEAD}.weight"
# role -> what decides a dimension of its tensors: the dimension, the keys, their value
_SIZES: Mapping[str, Sequence[tuple[int, str, Callable[[NemotronHConfig], int]]]] = {
    "embedding": (
        (0, "`vocab_size`", lambda c: c.vocab_size),
        (1, "`hidden_size`", lambda c: c.hidden_size),
    ),
    "ssm.A_log": ((0, "`mamba_num_heads`", lambda c: c.mamba_num_heads),),
    "mamba.out_proj": ((1, "`mamba_num_heads` x `mamba_head_dim`", lambda c: c.mamba_inner),),
    "conv1d": (
        (
            0,
            "`mamba_num_heads` x `mamba_head_dim` + 2 x `n_groups` x `ssm_state_size`",
            lambda c: c.conv_channels,
        ),
        (2, "`conv_kernel`", lambda c: c.conv_kernel),
    ),
    "attention.q_proj": (
        (0, "`num_attention_heads` x `head_dim`", lambda c: c.num_attention_heads * c.head_dim),
    ),
    "attention.k_proj": (
        (0, "`num_key_value_heads` x `head_dim`", lambda c: c.num_key_value_heads * c.head_dim),
    ),
    "router": ((0, "`n_routed_experts`", lambda c: c.n_routed_experts),),
    "experts.up_proj": ((0, "`moe_intermediate_size`", lambda c: c.moe_intermediate_size),),
    "latent.fc1": ((0, "`moe_latent_size`", lambda c: c.moe_latent_size),),
    "shared_experts.up_proj": (
        (0, "`moe_shared_expert_intermediate_size`", lambda c: c.moe_shared_expert_intermediate_size),
    ),
    "mlp.up_proj": ((0, "`intermediate_size`", lambda c: c.intermediate_size),),
}
_MOST_LAYERS = 9  # that are listed for a size


@dataclass(frozen=True)
class Fitted:
    """A config that fits its tensors.

    Attributes:
        raw: config.json, with the values that were put right.
        config, table: of ``raw``; with what stands beside the language model where tensors were compared.
        warnings: what was put right or left out, a sentence each.
        unused: names of tensors of the model that its config has no use for.
    """

    raw: dict[str, Any]
    config: NemotronHConfig
    table: list[TensorSpec]
    warnings: list[str]
    unused: set[str]


def fit(path: Path, raw: dict[str, Any], checkpoint: Checkpoint) -> Fitted:
    """Hold the tensors of a checkpoint against its config.json, ``raw``, with what is put right in it.

    Raises:
        TensorTableError: lists the differences of every kind: missing, extra, misshapen.
    """
    fitted = put_right(path, raw, checkpoint)
    fitted = replace(fitted, table=fitted.table + towers(fitted.config, checkpoint.tensors))
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in fitted.unused}
    _check(path, fitted, tensors)
    return fitted


def put_right(path: Path, raw: dict[str, Any], checkpoint: Checkpoint) -> Fitted:
    """A config.json, ``raw``, with what is out of step with the tensors put right; not held against them."""
    config = parse_config(raw, str(path / "config.json"))
    tensors, warnings = checkpoint.tensors, []
    if checkpoint.left_out:
        warnings.append(
            f"{len(checkpoint.left_out):,} tensors that hold no weights are left out: "
            f"{listing(checkpoint.left_out, 3)}"
        )
    if (path / ADAPTER_CONFIG).exists():
        warnings.append(
            f"{ADAPTER_CONFIG} says that there is an adapter of PEFT: the weights are taken as they are, "
            f"without it; if it is not in them yet, call merge_and_unload(), save, and quantize that"
        )
    if config.mtp_modules and not any(names.is_mtp(name) for name in tensors):
        warnings.append(
            f"its config.json declares {config.mtp_modules} multi-token-prediction modules, and no tensor "
            f"of them is there, as transformers leaves it: `num_nextn_predict_layers` is taken as 0"
        )
        raw = without_mtp(raw)
    rows = _vocabulary(config, tensors)
    if rows is not None:
        warnings.append(
            f"its config.json says `vocab_size` {config.vocab_size:,}, and its embeddings have {rows:,} "
            f"rows: it is taken as {rows:,}"
        )
        raw = with_values(raw, vocab_size=rows)
    config = parse_config(raw, str(path / "config.json"))
    table = tensor_table(config)
    unused = _tied_head(config, checkpoint)
    if unused:
        warnings.append(
            f"{_HEAD} equals the embeddings, and `tie_word_embeddings` is true: it is left out, no engine "
            f"reads it"
        )
    return Fitted(raw, config, table, warnings, unused)


def _vocabulary(config: NemotronHConfig, tensors: Mapping[str, TensorInfo]) -> int | None:
    """Rows of embeddings and head, where both have the same number, and it is not the config's."""
    tables = [_EMBEDDINGS] if config.tie_word_embeddings else [_EMBEDDINGS, _HEAD]
    shapes = {tensors[name].shape if name in tensors else () for name in tables}
    rows = {shape[0] for shape in shapes if len(shape) == 2 and shape[1] == config.hidden_size and shape[0]}
    return rows.pop() if len(shapes) == len(rows) == 1 and rows != {config.vocab_size} else None


def _tied_head(config: NemotronHConfig, checkpoint: Checkpoint) -> set[str]:
    """The head's name, where the config ties it to the embeddings and it has their values."""
    tensors = checkpoint.tensors
    if not config.tie_word_embeddings or not {_HEAD, _EMBEDDINGS} <= tensors.keys():
        return set()
    if (tensors[_HEAD].dtype, tensors[_HEAD].shape) != (
        tensors[_EMBEDDINGS].dtype,
        tensors[_EMBEDDINGS].shape,
    ):
        return set()
    same = bool((checkpoint.raw(_HEAD) == checkpoint.raw(_EMBEDDINGS)).all())
    checkpoint.release([_HEAD, _EMBEDDINGS])
    return {_HEAD} if same else set()


def differences(table: list[TensorSpec], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """What a checkpoint lacks, has beside, or has in another shape than its config says; a phrase each."""
    wanted = {spec.name: spec for spec in table}
    shapes = [
        f"{n} is {list(tensors[n].shape)}, expected {list(spec.shape)}"
        for n, spec in wanted.items()
        if n in tensors and tensors[n].shape != spec.shape
    ]
    kinds = (
        ("missing", [n for n in wanted if n not in tensors]),
        ("extra", [n for n in tensors if n not in wanted]),
        ("misshapen", shapes),
    )
    return [f"{len(found):,} {kind}: {listing(found)}" for kind, found in kinds if found]


def _check(path: Path, fitted: Fitted, tensors: Mapping[str, TensorInfo]) -> None:
    problems = differences(fitted.table, tensors)
    if problems:
        advice = _advice(fitted.config, fitted.table, tensors)
        where = f" (keys of `{sections(fitted.raw)[0]}`)" if sections(fitted.raw) and "`" in advice else ""
        raise TensorTableError(
            f"{path}: its tensors are not those that its config.json calls for: {'; '.join(problems)}; "
            f"expected the published layout: {advice}{where}"
        )


def _advice(config: NemotronHConfig, table: list[TensorSpec], tensors: Mapping[str, TensorInfo]) -> str:
    """What to do about differences: the key to set, with its value where the tensors leave no doubt."""
    wanted = {spec.name: spec for spec in table}
    missing = [spec.name for spec in table if spec.name not in tensors]
    misshapen = [spec for spec in table if spec.name in tensors and tensors[spec.name].shape != spec.shape]
    extra = [name for name in tensors if name not in wanted]
    if any(ADAPTER.search(name) for name in extra):
        return "these are adapters of PEFT that were not merged; save the model after merge_and_unload()"
    said = []
    if misshapen and all(tensors[spec.name].shape == spec.shape[::-1] for spec in misshapen):
        return "their dimensions stand in another order; transpose them to [out, in]"
    if any(names.is_mtp(name) for name in extra) and not config.mtp_modules:
        said.append("set `num_nextn_predict_layers` to the number of multi-token-prediction modules")
    if missing and all(names.is_mtp(name) for name in missing):
        whole = _whole_modules(config, missing, tensors)
        rest = "" if whole else " and remove the rest of the multi-token prediction"
        said.append(f"set `num_nextn_predict_layers` to {whole}{rest}, or add what is missing of it")
    if missing == [_HEAD]:
        said.append("set `tie_word_embeddings` to true if the embeddings are the head, or add the head")
    if _HEAD in extra:
        said.append("set `tie_word_embeddings` to false: the head is there, and is not the embeddings")
    said += _sizes(config, tensors)
    if not said and not misshapen and missing and not extra:
        return "the checkpoint is not whole, download or convert it again"
    if not said and not misshapen and extra and not missing:
        return "no engine reads these, remove them if the model does without"
    return "; ".join(said) or "is the config the right one?"


def _whole_modules(config: NemotronHConfig, missing: Sequence[str], tensors: Iterable[str]) -> int:
    """How many multi-token-prediction modules are there whole, where nothing is of the others; else 0."""
    depth = len(config.mtp_layers)
    for whole in range(config.mtp_modules - 1, 0, -1):
        others = tuple(names.mtp_layer(i) for i in range(whole * depth, config.mtp_modules * depth))
        if all(n.startswith(others) for n in missing) and not any(n.startswith(others) for n in tensors):
            return whole
    return 0


def _sizes(config: NemotronHConfig, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Keys of the config whose value is another one in the tensors; a phrase each."""
    roles, kinds = _known(config)
    differing: dict[tuple[str, int, int], set[int]] = {}  # keys, value in the config, in the tensors: layers
    all_layers: dict[str, set[int]] = {}
    layers: dict[int, set[LayerKind]] = {}
    biases = 0
    for name, info in tensors.items():
        layer, inner = names.in_layer(name)
        role = "embedding" if name == _EMBEDDINGS else roles.get(inner, "")
        where = -1 if layer is None else layer
        own = config.of_layer(where) if 0 <= where < len(config.layers) else config
        for dimension, keys, value in _SIZES.get(role, ()):
            if dimension < len(info.shape):
                all_layers.setdefault(keys, set()).add(where)
                if (got := info.shape[dimension]) != value(own):
                    differing.setdefault((keys, value(own), got), set()).add(where)
        if layer is not None and inner in kinds:
            layers.setdefault(layer, set()).add(kinds[inner])
        biases += role == "conv1d" and len(info.shape) == 1
    for (keys, expected, got), found in differing.items():
        of = f" of layers {listing(sorted(found), _MOST_LAYERS)}" if found != all_layers[keys] else ""
        yield f"{keys} is {expected:,} in the config and {got:,} in its tensors{of}"
    if bool(biases) != config.use_conv_bias and "mamba" in config.layers:
        yield f"`use_conv_bias` is {str(config.use_conv_bias).lower()}, and {biases:,} such biases are there"
    pattern = layer_pattern([min(layers[i]) for i in sorted(layers) if len(layers[i]) == 1])
    if pattern and sorted(layers) == list(range(len(pattern))) and pattern != layer_pattern(config.layers):
        yield f"`hybrid_override_pattern` of its tensors is {pattern[:200]}"


def _known(config: NemotronHConfig) -> tuple[dict[str, str], dict[str, LayerKind]]:
    """Roles and kinds of layers by the names of tensors in a mixer, of all that there may be in one."""
    whole = replace(config, moe_latent_size=1, n_shared_experts=1, n_routed_experts=1, use_conv_bias=True)
    entries = [(kind, entry) for kind, record in KINDS.items() for entry in record.tensors(whole)]
    return (
        {entry.name: entry.role for _, entry in entries},
        {entry.name: kind for kind, entry in entries},
    )

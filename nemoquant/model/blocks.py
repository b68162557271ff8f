"""Sizes of single layers: the ``block_configs`` of a Puzzle model, and sizes that are given as a list.

Puzzle chooses each layer's sizes by search. Its config has an object for each layer, whose ``block_type`` is
the layer's kind; its other keys stand for the model's own there. ``mtp_block_configs`` is the same for
the layers of a multi-token-prediction module. Engines read them so: vLLM and SGLang through
``get_nemotron_h_config_for_layer``. A list in ``intermediate_size`` has one entry for each dense MLP, or one
for all of them, as in vLLM's ``NemotronHMLPDecoderLayer``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nemoquant.errors import ConfigError, brief, listing
from nemoquant.model.config import LayerKind, Sizes
from nemoquant.model.kinds import KINDS

BLOCKS, MTP_BLOCKS = "block_configs", "mtp_block_configs"
BLOCK_TYPE = "block_type"

Fields = dict[str, Any]
Block = Mapping[str, Any]


def blocks_of(raw: Mapping[str, Any], key: str, most: int, source: str) -> list[Block]:
    """The objects under ``key``, one a layer; none where the config has none.

    Raises:
        ConfigError: it is no list of objects with a ``block_type``, or has more than ``most``.
    """
    blocks = raw.get(key)
    if blocks is None or blocks == []:
        return []
    if not isinstance(blocks, list):
        raise ConfigError(f"{source}: `{key}` is {brief(blocks)}; expected a list of objects, one a layer")
    if len(blocks) > most:
        raise ConfigError(f"{source}: `{key}` has {len(blocks):,} layers; expected at most {most:,}")
    for i, block in enumerate(blocks):
        if not isinstance(block, dict) or block.get(BLOCK_TYPE) is None:
            raise ConfigError(
                f"{source}: `{key}` has {brief(block)} for layer {i}; expected an object with `{BLOCK_TYPE}`"
            )
    return blocks


def merged(
    raw: Mapping[str, Any], block: Block, kind: LayerKind, aliases: Mapping[str, Sequence[str]], where: str
) -> Fields:
    """The keys that decide the sizes of one layer: the block's, and the model's where the block has none.

    Args:
        aliases: a size -> its other spellings.
        where: names the layer in messages.
    Raises:
        ConfigError: names a key of the block that is not known, and so may change what the layer computes.
    """
    spellings = {size: (size, *aliases.get(size, ())) for size in (*KINDS[kind].sizes, "hidden_size")}
    own = {key: value for key, value in block.items() if key != BLOCK_TYPE and value is not None}
    known = {key for keys in spellings.values() for key in keys}
    unknown = {key: own[key] for key in own.keys() - known if own[key] not in (False, raw.get(key))}
    if unknown:
        shown = ", ".join(f"`{key}`: {brief(value)}" for key, value in sorted(unknown.items())[:9])
        raise ConfigError(
            f"{where} has {shown}, which nemoquant doesn't know for a layer of kind {kind}; expected "
            f"{listing([BLOCK_TYPE, *KINDS[kind].sizes], 12)}"
        )
    if own.get("hidden_size", raw.get("hidden_size")) != raw.get("hidden_size"):
        raise ConfigError(
            f"{where} has `hidden_size`: {brief(own['hidden_size'])}; expected the model's, "
            f"{brief(raw.get('hidden_size'))}: all layers add to one stream"
        )
    result: Fields = {}
    for keys in spellings.values():
        given = own if any(key in own for key in keys) else raw
        result |= {key: given[key] for key in keys if key in given}
    return result


def one_of_list(fields: Fields, key: str, number: int, count: int, where: str) -> Fields:
    """``fields`` with the entry of one layer where ``key`` is a list.

    Args:
        number, count: this layer among those of its kind, and how many there are.
    Raises:
        ConfigError: the list is of another length.
    """
    values = fields.get(key)
    if not isinstance(values, list):
        return fields
    if len(values) not in (1, count):
        raise ConfigError(
            f"{where}: `{key}` is a list of {len(values)}; expected one entry, or {count}, as many as there "
            f"are layers of this kind"
        )
    return fields | {key: values[0 if len(values) == 1 else number]}


def largest(layers: Sequence[tuple[LayerKind, Fields]]) -> Fields:
    """Of each size, the largest that any layer has."""
    result: Fields = {}
    for kind, fields in layers:
        for size in KINDS[kind].sizes:
            result[size] = max(result.get(size, fields[size]), fields[size])
    return result


def differing(layers: Sequence[tuple[LayerKind, Fields]], model: Fields) -> tuple[Sizes, ...]:
    """What of each layer's sizes differs from ``model``; empty where nothing does."""
    own = tuple(
        tuple((size, fields[size]) for size in KINDS[kind].sizes if fields[size] != model[size])
        for kind, fields in layers
    )
    return own if any(own) else ()

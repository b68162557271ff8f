"""A language model inside another one: Omni, VL and their kind, whose config has it in a section of its own.

    {"model_type": "NemotronH_Nano_Omni_Reasoning_V3", "llm_config": {"model_type": "nemotron_h", ...}, ...}

The section is known by its ``model_type``, whatever its key is called (published: ``llm_config``, and
``text_config`` in transformers 5). Its tensors begin with ``language_model.`` in files, which serving engines
expect. Everything beside them belongs to a tower: an encoder of images or sound, a projector.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from nemoquant.errors import ConfigError, brief, listing
from nemoquant.model import names

MODEL_TYPES = ("nemotron_h", "nemotron_h_puzzle")
PREFIX = "language_model."  # of the language model's tensors and modules, in files and in engines
TOWER = "tower"  # the role of a tensor that is not the language model's


def sections(raw: Mapping[str, Any]) -> list[str]:
    """The keys of a config under which its language model stands; none where it stands at the top."""
    if raw.get("model_type") in MODEL_TYPES:
        return []
    return [k for k, v in raw.items() if isinstance(v, dict) and v.get("model_type") in MODEL_TYPES]


def language_model(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes its language model: a section of it, or all of it."""
    return next((raw[key] for key in sections(raw)), raw)


def language_section(raw: Mapping[str, Any], source: str) -> str | None:
    """The key of the section with the language model; None where it stands at the top.

    Raises:
        ConfigError: there are two different ones, or none in a config that is known to name it elsewhere.
    """
    found = sections(raw)
    if any(raw[key] != raw[found[0]] for key in found):
        raise ConfigError(
            f"{source}: {listing([f'`{key}`' for key in found])} are different language models; expected "
            f"one, quantize each from a folder of its own"
        )
    model = raw.get("model")
    if not found and isinstance(model, dict) and isinstance(model.get("stt"), dict):
        raise ConfigError(
            f"{source}: it is NeMo's config of a speech model (`model.stt`), such as VoiceChat, which names "
            f"its language model by an id ({brief(_named(model['stt']))}) instead of describing it; expected "
            f"a Nemotron-H config at the top or in a section such as `llm_config`: quantize that language "
            f"model from its own checkpoint"
        )
    return found[0] if found else None


def _named(stt: Mapping[str, Any]) -> Any:
    inner = stt.get("model")
    return (inner if isinstance(inner, dict) else stt).get("pretrained_llm")


def with_values(raw: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """A config.json with keys of its language model set."""
    found = sections(raw)
    return {**raw, **{key: {**raw[key], **values} for key in found}} if found else {**raw, **values}


def without_key(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A config.json without a key, at the top and in its language model's section."""
    inner = {section: {k: v for k, v in raw[section].items() if k != key} for section in sections(raw)}
    return {k: v for k, v in {**raw, **inner}.items() if k != key}


def prefix_of(raw: Mapping[str, Any]) -> str:
    """What names of the language model begin with in the files beside a config.json, before the published."""
    return PREFIX if sections(raw) else ""


def tower_names(found: Iterable[str], prefix: str) -> list[str]:
    """Of a checkpoint's tensors, by published names, those that are not the language model's.

    Args:
        prefix: of the config; without one there are no towers, and what is strange is refused elsewhere.
    """
    own = (*names.BEGINNINGS, PREFIX)
    return [name for name in found if not name.startswith(own)] if prefix else []

"""Names in config files where the language model is a part of another: its prefix, and towers beside it.

``layouts/modelopt.py`` writes and reads published names; here they get the prefix that the tensors have in
such a file, and lose it. A tower is excluded as a whole, by a pattern as Model Optimizer writes it
(``vision_model*``), which vLLM reads as a part of a name, and SGLang as a part between dots too.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from nemoquant.model.names import is_mtp
from nemoquant.model.nested import TOWER
from nemoquant.planning.plan import Plan

_LISTS = ("ignore", "exclude_modules")  # of modules and patterns
_ALL = "Linear"  # a target that is no module


def in_file(name: str, role: str, prefix: str) -> str:
    """The name in a file of a tensor or module; ``role`` is that of its tensor."""
    return name if role == TOWER else prefix + name


def with_prefix(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What a config file declares by published names, by names of such a file.

    Entries for multi-token prediction stay beside their prefixed ones: a draft model is loaded without
    prefix.
    """

    def names(listed: Iterable[str]) -> list[str]:
        both = [entry for name in listed for entry in (prefix + name, *([name] if is_draft(name) else []))]
        return list(dict.fromkeys(both))

    def is_draft(name: str) -> bool:
        return is_mtp(name) or is_mtp(name.rstrip("*") + ".")

    return _changed(section, names, lambda name: prefix + name) if prefix else dict(section)


def without_prefix(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The reverse of :func:`with_prefix`; what has no prefix stays."""

    def plain(name: str) -> str:
        return name.removeprefix(prefix)

    return (
        _changed(section, lambda listed: [plain(name) for name in listed], plain) if prefix else dict(section)
    )


def _changed(section: Mapping[str, Any], names: Any, one: Any) -> dict[str, Any]:
    result = dict(section)
    for key in _LISTS:
        if isinstance(section.get(key), list):
            result[key] = names(section[key])
    layers, groups = section.get("quantized_layers"), section.get("config_groups")
    if isinstance(layers, dict):
        result["quantized_layers"] = {one(module): entry for module, entry in layers.items()}
    if isinstance(groups, dict):
        result["config_groups"] = {name: _group(group, one) for name, group in groups.items()}
    return result


def _group(group: Any, one: Any) -> Any:
    targets = group.get("targets") if isinstance(group, dict) else None
    if not isinstance(targets, list):
        return group
    return {**group, "targets": [target if target == _ALL else one(target) for target in targets]}


def tower_patterns(plan: Plan, plain_too: bool) -> list[str]:
    """Exclusions that match every module of a tower, and none that is quantized.

    vLLM matches an entry within any name: the first part of a tower's names does where no quantized module
    has it in its own, else as many parts as that takes.

    Args:
        plain_too: also without the asterisk, for engines that read no pattern.
    """
    quantized = "\n".join(in_file(row.module, row.role, plan.config.prefix) for row in plan.quantized)
    found: dict[str, None] = {}
    for row in plan.rows:
        if row.role != TOWER:
            continue
        parts = row.module.split(".")
        paths = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        path = next((path for path in paths if path in found or path not in quantized), row.module)
        found[path] = None
    return [entry for path in found for entry in ([f"{path}*", path] if plain_too else [f"{path}*"])]

"""A recipe of Model Optimizer as its loader gives it, ``$import`` resolved, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Attributes = Mapping[str, Any]  # of one quantizer; those with their default value are left out


@dataclass(frozen=True)
class Entry:
    """One entry of ``quant_cfg``.

    Attributes:
        pattern: over the names of quantizers.
        parent: class of the module that a quantizer must belong to; None is any.
        enable: on or off.
        cfg: attributes that take the place of all that a quantizer had, several for quantizers in sequence;
            None leaves them.
    """

    pattern: str
    parent: str | None
    enable: bool
    cfg: tuple[Attributes, ...] | None


@dataclass(frozen=True)
class Theirs:
    """A whole recipe.

    Attributes:
        name: as the user gave it.
        title: the name for the recipe of ours.
        description: its own; empty if it has none.
        entries: in their order; the last one that matches a quantizer wins.
        algorithms: each with ``method`` and the options that are set; none is no calibration.
    """

    name: str
    title: str
    description: str
    entries: tuple[Entry, ...]
    algorithms: tuple[Mapping[str, Any], ...]


def from_json(name: str, title: str, data: Mapping[str, Any]) -> Theirs:
    """From what ``worker.py`` answers."""
    entries = (
        Entry(e["pattern"], e["parent"], e["enable"], None if e["cfg"] is None else tuple(e["cfg"]))
        for e in data["entries"]
    )
    return Theirs(name, title, data["description"], tuple(entries), tuple(data["algorithms"]))

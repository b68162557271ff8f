"""Specifications of operators, ``plugins/<op>/spec.yaml``: names and order of inputs, outputs, attributes."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from nemoquant.shipped import plugin_folder


@dataclass(frozen=True)
class Spec:
    """One operator.

    ``inputs`` are the required ones; optional ones, which only a plugin reads, follow them and are not
    listed. ``formats`` of RoutedExperts lists the parts of a projection by format; empty for the others.
    """

    name: str
    domain: str
    version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    formats: dict[str, tuple[str, ...]]


@cache
def spec(op: str) -> Spec:
    """The specification in the folder ``op``, such as ``mamba2_scan``."""
    data = yaml.safe_load((plugin_folder() / op / "spec.yaml").read_text(encoding="utf-8"))
    return Spec(
        data["name"],
        data["domain"],
        data["version"],
        inputs=tuple(value["name"] for value in data["inputs"] if not value.get("optional")),
        outputs=tuple(value["name"] for value in data["outputs"]),
        attributes={name: attribute["default"] for name, attribute in data["attributes"].items()},
        formats={name: tuple(parts) for name, parts in data.get("formats", {}).items()},
    )

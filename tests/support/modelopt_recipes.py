"""Model Optimizer's recipes in tests: loaded in this process, which is slow once instead of each time."""

import contextlib
import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoquant.planning.modelopt import library, worker
from nemoquant.planning.modelopt.entries import Entry, Theirs


def ask(path: Path, plain: bool) -> Mapping[str, Any]:
    """In place of ``library.ask``: what the worker answers, from this process."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data: Mapping[str, Any] = json.loads(json.dumps(worker.described(path, plain), default=str))
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    return data


def made(entries: list[Any], *algorithms: Mapping[str, Any], name: str = "theirs.yaml") -> Theirs:
    """A recipe with these entries, as its loader would give it."""
    return Theirs(name, "modelopt-theirs", "", tuple(map(_entry, entries)), algorithms)


def _entry(entry: Mapping[str, Any]) -> Entry:
    cfg = entry.get("cfg")
    several = None if cfg is None else tuple(cfg) if isinstance(cfg, list) else (cfg,)
    return Entry(entry["quantizer_name"], entry.get("parent_class"), entry.get("enable", True), several)


def entries(theirs: Theirs) -> list[dict[str, Any]]:
    """The entries as Model Optimizer takes them: the reverse of what was read."""
    return [
        {"quantizer_name": entry.pattern, "enable": entry.enable}
        | ({} if entry.parent is None else {"parent_class": entry.parent})
        | ({} if entry.cfg is None else {"cfg": _cfg(entry.cfg)})
        for entry in theirs.entries
    ]


def _cfg(several: tuple[Mapping[str, Any], ...]) -> Any:
    made = [_attributes(one) for one in several]
    return made[0] if len(made) == 1 else made


def _attributes(one: Mapping[str, Any]) -> Any:
    """Attributes of which some are given: what is all default was left out."""
    return {"num_bits": 8} | _from_json(one)


def _from_json(value: Any) -> Any:
    """JSON has neither tuples nor whole numbers as keys."""
    if isinstance(value, Mapping):
        return {int(k) if k.lstrip("-").isdigit() else k: _from_json(v) for k, v in value.items()}
    return tuple(map(_from_json, value)) if isinstance(value, list) else value


def shipped() -> list[str]:
    """Names of all files in its library, in order."""
    root = library.folder()
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.yaml"))

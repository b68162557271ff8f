"""Compares folders, and edits JSON files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the content of files (folders have None)."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def changed_files(a: Path, b: Path) -> list[str]:
    """Paths below two folders whose content differs, or that one of them lacks."""
    one, two = tree(a), tree(b)
    absent = object()
    return sorted(name for name in one.keys() | two.keys() if one.get(name, absent) != two.get(name, absent))


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file in place."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2) + "\n")


def parse_strictly(text: str) -> Any:
    """Parses JSON and refuses NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in JSON")

    return json.loads(text, parse_constant=refuse)


def leaves(data: Any, path: str = "") -> dict[str, Any]:
    """All values in JSON data that are neither list nor dict, by their path ``.key.0``."""
    if isinstance(data, dict | list):
        items = data.items() if isinstance(data, dict) else enumerate(data)
        return {place: leaf for key, inner in items for place, leaf in leaves(inner, f"{path}.{key}").items()}
    return {path: data}

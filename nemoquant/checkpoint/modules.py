"""Python files of a checkpoint that its configs name for transformers' ``trust_remote_code``.

They are copied and never imported. ``auto_map`` stands in config.json, in the sections of its parts, and in
the files of tokenizer and processors; what a named file imports from beside itself belongs to it, as
transformers follows it.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemoquant.files import MOST_SETTINGS, lies_in, plain_name, read_json, read_text

MOST_BYTES = 1 << 20  # of one file
MOST_MODULES = 256
PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)
_IMPORT = re.compile(
    r"^\s*(?:from\s+\.(\w+)\s+import|from\s+\.\s+import\s+(\w+)|import\s+\.(\w+))", re.MULTILINE
)


def python_modules(source: Path, raw_config: Mapping[str, Any]) -> set[str]:
    """Names of the Python files that the configs in a folder name, and of those that they import."""
    found: set[str] = set()
    waiting = [*_named(raw_config), *(name for file in PROCESSORS for name in _of_file(source / file))]
    while waiting and len(found) < MOST_MODULES:
        name = waiting.pop()
        if name not in found and plain_name(name):
            found.add(name)
            waiting += _imported(source, name)
    return found


def _named(raw: Mapping[str, Any]) -> Iterator[str]:
    """The files that ``auto_map`` names, of a config and of the sections in it."""
    for section in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        auto_map = section.get("auto_map")
        for value in auto_map.values() if isinstance(auto_map, dict) else ():
            for entry in value if isinstance(value, list) else [value]:
                if isinstance(entry, str):
                    yield entry.split("--")[-1].split(".")[0] + ".py"


def _of_file(file: Path) -> list[str]:
    try:
        raw = read_json(file, MOST_SETTINGS)
    except (OSError, ValueError):  # what is wrong with it is said by who reads it
        return []
    return list(_named(raw)) if isinstance(raw, dict) else []


def _imported(source: Path, name: str) -> list[str]:
    try:
        text = read_text(source / name, MOST_BYTES) if lies_in(source, name) else ""
    except (OSError, ValueError, RuntimeError):
        return []
    return [f"{next(filter(None, found.groups()))}.py" for found in _IMPORT.finditer(text)]

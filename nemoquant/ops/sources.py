"""Where the plugins' sources and specifications lie, and what they are."""

import hashlib
from pathlib import Path

SUFFIXES = (".cu", ".cuh", ".cpp", ".hpp", ".h", ".map", ".txt")


def plugin_folder() -> Path:
    """``plugins/``: in the installed package, or in the source tree."""
    package = Path(__file__).resolve().parents[1]
    return next(p for p in (package / "plugins", package.parent / "plugins") if p.is_dir())


def sources_hash() -> str:
    """The sha256 of everything that is compiled, names included."""
    folder, total = plugin_folder(), hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES):
        data = path.read_bytes()
        total.update(f"{path.relative_to(folder).as_posix()}\0{len(data)}\0".encode() + data)
    return total.hexdigest()

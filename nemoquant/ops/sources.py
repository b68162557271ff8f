"""The sources of the compiled operators."""

import hashlib

from nemoquant.shipped import plugin_folder

SUFFIXES = (".cu", ".cuh", ".cpp", ".hpp", ".h", ".map", ".txt", ".cmake")


def sources_hash() -> str:
    """sha256 of all files that are compiled, names included."""
    folder, total = plugin_folder(), hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES):
        data = path.read_bytes()
        total.update(f"{path.relative_to(folder).as_posix()}\0{len(data)}\0".encode() + data)
    return total.hexdigest()

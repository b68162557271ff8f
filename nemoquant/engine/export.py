"""Engine files: built, written whole or not at all, with a JSON beside each that says what it is."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemoquant.checkpoint.manifest import replace_text
from nemoquant.engine.tensorrt_rtx import RtxOptions, build
from nemoquant.errors import OutputError


def export_rtx(path: Path, out: Path, options: RtxOptions, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Build a TensorRT-RTX engine of the checkpoint in ``path`` into the new file ``out``, and ``out.json`` with its facts.

    Returns:
        the facts.
    Raises:
        NemoquantError: ``out`` exists or can't be written; see ``tensorrt_rtx.build``.
    """
    facts_file = out.with_name(out.name + ".json")
    for file in (out, facts_file):
        if file.exists() or file.is_symlink():
            raise OutputError(f"{file} exists; expected a new file, nothing is overwritten: remove it or choose another name")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"{out}: {out.absolute().parent} is not a folder; make it, or choose another place")
    built = build(path, options, say)
    facts = {
        "schema": 1, **built.facts, "checkpoint": path.resolve().name, "file": out.name, "bytes": len(built.data),
        "sha256": hashlib.sha256(built.data).hexdigest(),
    }  # fmt: skip
    partial = out.with_name(out.name + ".partial")
    try:
        partial.write_bytes(built.data)
        partial.replace(out)
        replace_text(facts_file, json.dumps(facts, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        for file in (partial, out):
            file.unlink(missing_ok=True)
        raise OutputError(f"{out}: {error.strerror or error}; choose another place") from None
    return facts

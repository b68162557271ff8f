"""Engine files: built, and written completely or not at all, with a JSON file of facts beside each."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemoquant.checkpoint import manifest
from nemoquant.checkpoint.intact import Intact, hash_once
from nemoquant.engine.build import BuiltEngine, EngineOptions, build
from nemoquant.engine.enginefile import SCHEMA, facts_file, mtp_file
from nemoquant.engine.targets import Gpu
from nemoquant.errors import OutputError
from nemoquant.files import why_not_written, write_named
from nemoquant.progress import Progress, no_progress
from nemoquant.sources.hub import called
from nemoquant.words import as_utf8


def export_engine(
    path: Path,
    out: Path,
    options: EngineOptions,
    device: Gpu | None,
    say: Callable[[str], None] = lambda text: None,
    *,
    mtp: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Build an engine of the checkpoint in ``path``; writes ``out``, and ``out.json`` with its facts.

    Args:
        device: the GPU of this machine.
        mtp: also build the multi-token-prediction module, into a second file beside ``out``.
        progress: of hashing the shards.
    Returns:
        the facts of the main engine.
    Raises:
        NemoquantError: a file exists or can't be written; see ``build``. Nothing is left behind.
    """
    files = [out, *([mtp_file(out)] if mtp else [])]
    for place in (facts_file(files[-1]), options.timing_cache):  # the longest name; what may be replaced
        reason = None if place is None else why_not_written(place)
        if reason:
            raise OutputError(f"{place}: {reason}")
    for file in (name for engine in files for name in (engine, facts_file(engine))):
        if file.exists() or file.is_symlink():
            raise OutputError(
                f"{file} exists; expected a new file, nothing is overwritten: remove it or choose another "
                f"name"
            )
    if not out.absolute().parent.is_dir():
        raise OutputError(f"{out}: {out.absolute().parent} is not a folder; make it, or choose another place")
    intact: Intact | None = None

    def hashed() -> None:
        nonlocal intact
        signed = manifest.read_if_there(path)
        if signed is not None and intact is None:
            intact = hash_once(path, signed, say, progress)

    # first, because a checkpoint without the module is refused at once
    drafts = [build(path, options, device, say, mtp=True, ready=hashed)] if mtp else []
    built = [build(path, replace(options, with_hidden=mtp), device, say, ready=hashed), *drafts]
    facts = [_facts(path, file, engine, mtp) for file, engine in zip(files, built, strict=True)]
    if intact is not None:
        intact.check(manifest.read_manifest(path))
    try:
        for file, engine, known in zip(files, built, facts, strict=True):
            write_named(file, engine.data)
            write_named(facts_file(file), f"{json.dumps(known, indent=1, sort_keys=True)}\n".encode())
    except BaseException as error:
        for file in files:
            file.unlink(missing_ok=True)
            facts_file(file).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"{out}: {error.strerror or error}; choose another place") from None
        raise
    return facts[0]


def _facts(path: Path, file: Path, engine: BuiltEngine, mtp: bool) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        **engine.facts,
        "checkpoint": as_utf8(called(path)),
        "file": as_utf8(file.name),
        "bytes": len(engine.data),
        "sha256": hashlib.sha256(engine.data).hexdigest(),
        "mtp": as_utf8(mtp_file(file).name) if mtp and engine.facts["part"] == "main" else None,
    }

"""An engine file and the JSON beside it, checked against its checkpoint before any GPU is used."""

import json
from pathlib import Path
from typing import Any

from nemoquant.checkpoint.manifest import FILE as MANIFEST
from nemoquant.checkpoint.manifest import file_sha256, read_manifest
from nemoquant.engine import TARGETS
from nemoquant.errors import CheckpointError, UsageError

SCHEMA = 2
TYPES: dict[str, type | tuple[type, ...]] = {
    "runtime": str,
    "version": str,
    "sm": int,
    "compute": str,
    "max_seq_len": int,
    "max_batch": int,
    "part": str,
    "sha256": str,
    "config": str,
    "bytes": int,
    "last_token_only": bool,
    "with_hidden": bool,
    "strip_weights": bool,
    "weight_streaming": bool,
    "plan": (str, type(None)),
    "mtp": (str, type(None)),
    "plugins": (dict, type(None)),
}


def facts_file(engine: Path) -> Path:
    """``model.engine`` -> ``model.engine.json``."""
    return engine.with_name(engine.name + ".json")


def mtp_file(engine: Path) -> Path:
    """``model.engine`` -> ``model.mtp.engine``."""
    return engine.with_name(f"{engine.stem}.mtp{engine.suffix}")


def read_facts(engine: Path, folder: Path, target: str) -> dict[str, Any]:
    """The facts of an engine, checked to be for ``target`` and for the checkpoint in ``folder``.

    Raises:
        CheckpointError: a file is missing or was changed, or the engine is for another checkpoint or plan.
        UsageError: the engine is for the other TensorRT.
    """
    path = facts_file(engine)
    again = f"build it again with `nemoquant export trt {folder} FILE`"
    if not engine.is_file():
        raise CheckpointError(f"{engine} does not exist; {again}")
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        wrong = [name for name, kind in TYPES.items() if not isinstance(facts[name], kind)]
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; an engine can't be run without its facts, copy it there or {again}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not as `export trt` writes it ({type(error).__name__}: {error}); {again}"
        ) from None
    if wrong or facts.get("schema") != SCHEMA:
        what = ", ".join(wrong) or f"schema {facts.get('schema')}, expected {SCHEMA}"
        raise CheckpointError(f"{path} is not as this version writes it ({what}); {again}")
    if facts["runtime"] != TARGETS[target].module:
        other = next((t for t in TARGETS.values() if t.module == facts["runtime"]), None)
        raise UsageError(
            f"{engine} is for {other.title if other else facts['runtime']}, expected {TARGETS[target].title}"
            + (f"; run it with --engine {other.name}" if other else f"; {again}")
        )
    plan = read_manifest(folder)["plan"]["sha256"] if (folder / MANIFEST).exists() else None
    if facts["plan"] != plan:
        raise CheckpointError(
            f"{engine} was built for the plan {_short(facts['plan'])}, {folder} was written by "
            f"{_short(plan)}; {again}"
        )
    if facts["config"] != file_sha256(folder / "config.json"):
        raise CheckpointError(f"{engine} was built for another config.json than that of {folder}; {again}")
    if engine.stat().st_size != facts["bytes"] or file_sha256(engine) != facts["sha256"]:
        raise CheckpointError(
            f"{engine} was changed after it was built: its size or sha256 is another than in {path.name}; "
            f"{again}"
        )
    return facts


def _short(plan: str | None) -> str:
    return "(none)" if plan is None else plan[:12]

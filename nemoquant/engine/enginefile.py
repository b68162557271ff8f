"""An engine file and the JSON beside it, checked against its checkpoint before any GPU is used."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nemoquant.checkpoint.manifest import file_sha256, read_if_there
from nemoquant.engine import TARGETS
from nemoquant.errors import CheckpointError, UsageError, brief, field_problem
from nemoquant.files import MOST_SETTINGS, read_json
from nemoquant.graph import Compute

SCHEMA = 2
Size = Annotated[int, Field(ge=1, lt=1 << 63)]
Text = Annotated[str, Field(max_length=1000)]


class Facts(BaseModel):
    """The facts that are read; the file has more of them, for people."""

    model_config = ConfigDict(strict=True)

    schema_: int = Field(alias="schema")
    runtime: Text
    version: Text
    checkpoint: Text
    sm: Size
    compute: Compute
    max_seq_len: Size
    max_batch: Size
    part: Literal["main", "mtp"]
    sha256: Text
    config: Text
    bytes: Size
    last_token_only: bool
    with_hidden: bool
    strip_weights: bool
    weight_streaming: bool
    plan: Text | None
    mtp: Text | None
    plugins: dict[str, Any] | None


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
        facts = read_json(path, MOST_SETTINGS)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; an engine can't be run without its facts, copy it there or {again}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not as `export trt` writes it ({error}); {again}") from None
    got = facts.get("schema") if isinstance(facts, dict) else None
    try:
        if type(got) is int and got != SCHEMA:
            raise CheckpointError(
                f"{path} is not as this version writes it (schema {brief(got)}, expected {SCHEMA}); {again}"
            )
        Facts.model_validate(facts)
    except ValidationError as error:
        raise CheckpointError(
            f"{path} is not as `export trt` writes it ({field_problem(error)}); {again}"
        ) from None
    if facts["runtime"] != TARGETS[target].module:
        other = next((t for t in TARGETS.values() if t.module == facts["runtime"]), None)
        raise UsageError(
            f"{engine} is for {other.title if other else facts['runtime']}, expected {TARGETS[target].title}"
            + (f"; run it with --engine {other.name}" if other else f"; {again}")
        )
    signed = read_if_there(folder)
    plan = None if signed is None else signed["plan"]["sha256"]
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
    return dict(facts)


def _short(plan: str | None) -> str:
    return "(none)" if plan is None else plan[:12]

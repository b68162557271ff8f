"""``nemoquant_converted.json``: the record of a converted checkpoint, with the sha256 of every file.

It is no manifest: there is no recipe and no plan that the content could be held against. Like a manifest it
has no time, host or path, and its own sha256.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nemoquant.checkpoint.manifest import canonical
from nemoquant.checkpoint.manifest_schema import Digest, Hub, Name, Text
from nemoquant.errors import CheckpointError, schema_problem
from nemoquant.files import read_json, replace_text

FILE = "nemoquant_converted.json"
SCHEMA = 1


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class Origin(_Part):
    """The checkpoint that was converted; ``manifest_sha256`` where it had a manifest, ``hub`` where it was a
    snapshot in the hub's cache."""

    layout: Text
    config_sha256: Digest
    tensor_table_sha256: Digest
    manifest_sha256: Digest | None
    hub: Hub | None = None


class Record(_Part):
    """Types are those of JSON, nothing is converted."""

    record: Annotated[Literal[1], Field(alias="schema")]
    nemoquant: Text
    to: Text
    made_from: Origin
    notes: list[Text]
    warnings: list[Text]
    files: dict[Name, Digest]


def write_record(folder: Path, data: Mapping[str, Any]) -> None:
    """Write ``data`` with the sha256 of its canonical bytes."""
    signed = dict(data) | {"sha256": hashlib.sha256(canonical(data)).hexdigest()}
    replace_text(folder / FILE, json.dumps(signed, indent=1, sort_keys=True) + "\n")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a folder; None where it has none.

    Raises:
        CheckpointError: it can't be read, was changed, or is not as nemoquant writes it.
    """
    path = folder / FILE
    if not os.path.lexists(path):
        return None
    try:
        data: Any = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); expected JSON") from None
    wrong = schema_problem(Record.model_validate, data)
    if wrong is not None:
        raise CheckpointError(f"{path} is not as nemoquant writes it: {wrong}; convert again")
    if data.get("sha256") != hashlib.sha256(canonical(data)).hexdigest():
        raise CheckpointError(f"{path} was changed after it was written: its sha256 does not fit its content")
    found: dict[str, Any] = data
    return found

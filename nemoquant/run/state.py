"""The file of a run's state: its form, and how it is written and read.

The form is checked when the file is read, so that the run can take what is in it as it is. The file has the
sha256 of all of it: a flipped bit in a maximum would be a wrong scale.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic refuses typing's before Python 3.12

from nemoquant.arguments import MOST_THREADS
from nemoquant.calibrate.scales_schema import Content
from nemoquant.checkpoint.folder import is_inner
from nemoquant.errors import schema_problem
from nemoquant.files import MOST_JSON, plain_name, read_json, replace_text
from nemoquant.model.config import LayerKind
from nemoquant.run.options import Dtype

SCHEMA = 5
STRICT = ConfigDict(extra="forbid", strict=True)
BETWEEN_LAYERS = {"dead_rows", "collected", "hidden", "hidden_sha256"}
OPEN = ConfigDict(extra="allow", strict=True)


def _is_plain(name: str) -> str:
    if not plain_name(name):
        raise ValueError("not the name of a file")
    return name


def _is_solved(name: str) -> str:
    if not (is_inner(name) and name.startswith(("solved.", "folds.", "stream."))):
        raise ValueError("not the name of a file of solved weights, of folds, or of hidden states")
    return name


def _are_collected(data: dict[str, Any]) -> dict[str, Any]:
    """Results of the collectors by their names; see ``calibrate/observers.py``."""
    wrong = schema_problem(Content.model_validate, data.get("scales"))
    if wrong is not None:
        raise ValueError(f"not the scales so far: {wrong}")
    _SOLVED.validate_python(data.get("solved", {}))
    return data


def _is_between(name: str) -> str:
    if not (is_inner(name) and name.startswith(("before.", "gradient."))):
        raise ValueError("not the name of a file of hidden states or of gradients between layers")
    return name


Units = dict[str, Annotated[str, Field(pattern="^[0-9a-f]{32}$")]]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, AfterValidator(_is_plain)]
SolvedState = dict[Annotated[str, AfterValidator(_is_solved)], Annotated[str, Field(max_length=64)]]
_SOLVED: TypeAdapter[SolvedState] = TypeAdapter(SolvedState, config=ConfigDict(strict=True))
Count = Annotated[int, Field(ge=0)]
Rows = Annotated[int, Field(ge=1)]


@with_config(OPEN)
class IdentityState(TypedDict, total=False):
    """What decides the output's bytes, as far as a run computes with it; the rest is only compared."""

    nemoquant: str
    recipe: str
    shard_bytes: int
    scale_groups: bool
    dtype: Dtype
    row_batch: Rows | dict[LayerKind, Rows]
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)]


@with_config(STRICT)
class CalibrationState(TypedDict):
    """Layers that were calibrated.

    ``scales_sha256`` and ``solved`` (files of solved weights and folds, with their hashes) are there once the
    scales file is written, what is between two layers until then.
    """

    layers: Count
    units: Units
    scales_sha256: NotRequired[Digest]
    solved: NotRequired[SolvedState]
    dead_rows: NotRequired[list[Count]]
    collected: NotRequired[Annotated[dict[str, Any], AfterValidator(_are_collected)]]
    hidden: NotRequired[Annotated[int, Field(ge=0, le=1)]]
    hidden_sha256: NotRequired[Digest]


@with_config(STRICT)
class GradientState(TypedDict):
    """How far the rows came, forward and back, for the gradients of the loss; files with their sha256."""

    layers: Count
    units: Units
    dead_rows: list[Count]
    files: dict[Annotated[str, AfterValidator(_is_between)], Digest]


@with_config(STRICT)
class LostState(TypedDict):
    """The counts of a :class:`nemoquant.pack.outliers.Lost`."""

    floored: Count
    blocks: Count
    flushed: Count
    values: Count


def _are_shares(lost: LostState) -> LostState:
    if lost["floored"] > lost["blocks"] or not lost["flushed"] <= lost["values"] > 0:
        raise ValueError("parts are more than the whole")
    return lost


@with_config(STRICT)
class ShardState(TypedDict):
    """A shard that was written."""

    sha256: Digest
    zero_weights: list[str]
    lost: dict[str, Annotated[LostState, AfterValidator(_are_shares)]]
    units: Units


@with_config(STRICT)
class State(TypedDict):
    """All of it; see :class:`nemoquant.run.unfinished.Unfinished`."""

    identity: IdentityState
    gradients: GradientState | None
    calibration: CalibrationState | None
    calibrated: bool
    shards: dict[FileName, ShardState]


_STATE: TypeAdapter[State] = TypeAdapter(State)
_IDENTITY: TypeAdapter[IdentityState] = TypeAdapter(IdentityState)


def identity_problem(identity: Mapping[str, Any]) -> str | None:
    """What is wrong with what decides a run's bytes, in one line; None where nothing is."""
    return schema_problem(_IDENTITY.validate_python, identity)


def write_state(path: Path, state: State) -> None:
    """Write the file; a kill or a power cut leaves the new one or the one before.

    Raises:
        OSError
    """
    text = json.dumps({"schema": SCHEMA, "sha256": _sha256(state), "state": state})
    replace_text(path, text)


def read_state(path: Path) -> State:
    """Read it again.

    Raises:
        OSError: see :func:`nemoquant.files.open_regular`.
        ValueError: it is not what :func:`write_state` writes; with one line that says why.
    """
    data = read_json(path, MOST_JSON, follow=False)
    if not isinstance(data, dict) or data.keys() != {"schema", "sha256", "state"}:
        raise ValueError("not the state of a run")
    if data["schema"] != SCHEMA:
        raise ValueError("of another version of nemoquant")
    if data["sha256"] != _sha256(data["state"]):
        raise ValueError("changed after it was written: its sha256 does not fit its content")
    state: State = data["state"]  # in its own order: the sha256 is that of its text
    wrong = schema_problem(_STATE.validate_python, state)
    if wrong is not None:
        raise ValueError(wrong)
    calibration = state["calibration"]
    if calibration is not None:
        needed = {"scales_sha256", "solved"} if state["calibrated"] else BETWEEN_LAYERS
        if missing := needed - calibration.keys():
            raise ValueError(f"calibration lacks {', '.join(sorted(missing))}")
    return state


def _sha256(state: Any) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()

"""The file ``nemoquant_solved.json``: how each solved weight was found, for ``verify``, reports and people.

Weights stand by unit (a tensor, or all experts of a layer and projection); each list has an entry for each
weight of the unit, in the order of the plan.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from nemoquant.checkpoint.identity import unit_name
from nemoquant.errors import CheckpointError, brief, schema_problem
from nemoquant.files import read_json
from nemoquant.formats import Method
from nemoquant.planning.plan import Plan
from nemoquant.planning.solving import Outputs, Propagate
from nemoquant.solve.store import Record

SCHEMA = 1

Sum = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Unit(BaseModel):
    """Lists of the fields of :class:`nemoquant.solve.store.Record`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    method: list[Method]
    tokens: list[Annotated[int, Field(ge=0)]]
    objective: list[Sum]
    plain: list[Sum]
    gram: list[Digest]
    error: list[Sum]


class Content(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    schema_: int = Field(alias="schema")
    damping: Sum
    descent: Annotated[int, Field(ge=0)]
    propagate: Propagate = "source"
    outputs: Outputs = "equal"
    units: dict[str, Unit]


def dump(plan: Plan, records: Mapping[str, Record]) -> str:
    """The file's text."""
    units: dict[str, dict[str, list[Any]]] = {}
    for row in plan.quantized:
        if row.solved:
            unit = units.setdefault(unit_name(row.name), {key: [] for key in Unit.model_fields})
            for key, values in unit.items():
                values.append(getattr(records[row.name], key))
    settings = plan.recipe.solve
    content = {"schema": SCHEMA, **settings.model_dump(), "units": units}
    return json.dumps(content, indent=1) + "\n"


def read(path: Path, tensors: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Tensor -> the fields of its record.

    Args:
        tensors: of the model, in order; at least all of each unit that has a solved one.
    Raises:
        CheckpointError: it is not what :func:`dump` writes for such a model.
    """
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read ({error}); quantize again") from None
    wrong = schema_problem(Content.model_validate, data)
    units: dict[str, list[str]] = {}
    for tensor in tensors:
        units.setdefault(unit_name(tensor), []).append(tensor)
    for name, unit in data["units"].items() if wrong is None else ():
        if name not in units or {len(values) for values in unit.values()} != {len(units[name])}:
            wrong = f"{brief(name)} is no unit of this model, or has another number of weights"
    if wrong is not None:
        raise CheckpointError(f"{path} is not as nemoquant writes it: {wrong}; quantize again")
    return {
        tensor: {key: values[i] for key, values in data["units"][name].items()}
        for name in data["units"]
        for i, tensor in enumerate(units[name])
    }

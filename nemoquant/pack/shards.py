"""The place of every output tensor: units that must stay together, shards that hold whole units."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nemoquant.calibrate.scales import kv_modules
from nemoquant.checkpoint import SHARD_BYTES
from nemoquant.checkpoint.header import ITEM_SIZE
from nemoquant.layouts.beside import in_file
from nemoquant.layouts.modelopt import kv_scale_name, tensor_name
from nemoquant.planning.plan import Plan
from nemoquant.planning.row import Row


@dataclass(frozen=True)
class Entry:
    """One output tensor: a part of ``row``.

    Attributes:
        name: as a checkpoint that is read has it.
        written: its name in the file.
        kind: as in ``Row.parts``, or ``kv_scale`` (a cache scale).
    """

    name: str
    written: str
    dtype: str
    shape: tuple[int, ...]
    row: Row
    kind: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Unit:
    """Rows that are written together: one tensor, or all experts of one layer and projection.

    ``entries`` are ordered by kind, then by row: the codes of all experts lie back to back, then their block
    scales, then the scalars, so that each kind is one ``[E, ...]`` range of bytes.
    """

    rows: tuple[Row, ...]
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True)
class Shard:
    """One output file."""

    file: str
    units: tuple[Unit, ...]

    @property
    def entries(self) -> Iterator[Entry]:
        return (entry for unit in self.units for entry in unit.entries)


def units(plan: Plan) -> Iterator[Unit]:
    """The plan's rows as units, in file order; experts in numeric order, as in the tensor table."""
    cached = set(kv_modules(plan))
    run: list[Row] = []
    for row in plan.rows:
        if run and _unit_key(row) != _unit_key(run[0]):
            yield _unit(run, cached, plan.config.prefix)
            run = []
        run.append(row)
    if run:
        yield _unit(run, cached, plan.config.prefix)


def _unit_key(row: Row) -> object:
    return row.name if row.expert is None else (row.role, row.layer)


def _unit(rows: list[Row], cached: set[str], prefix: str) -> Unit:
    def entry(name: str, dtype: str, shape: tuple[int, ...], *, row: Row, kind: str) -> Entry:
        return Entry(name, in_file(name, row.role, prefix), dtype, shape, row, kind)

    kinds = [kind for kind, _, _ in rows[0].parts()]
    parts = [{kind: (dtype, shape) for kind, dtype, shape in row.parts()} for row in rows]
    entries = [
        entry(tensor_name(row, kind), *part[kind], row=row, kind=kind)
        for kind in kinds
        for row, part in zip(rows, parts, strict=True)
    ]
    entries += [
        entry(kv_scale_name(row.module), "F32", (), row=row, kind="kv_scale")
        for row in rows
        if row.module in cached
    ]
    return Unit(tuple(rows), tuple(entries))


def shards(plan: Plan, limit: int = SHARD_BYTES) -> list[Shard]:
    """Units in order, as many in a shard as fit ``limit`` bytes; a larger unit has a shard of its own."""
    groups: list[list[Unit]] = []
    used = 0
    for unit in units(plan):
        if not groups or (used and used + unit.nbytes > limit):
            groups.append([])
            used = 0
        groups[-1].append(unit)
        used += unit.nbytes
    return [
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for i, group in enumerate(groups, 1)
    ]

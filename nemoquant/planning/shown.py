"""A plan for people: a sentence on what became of the weights, and a table by role.

Both are made from the plan's rows. A recipe's summary says what it is for; a model may lack the roles.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from nemoquant.arguments import both
from nemoquant.formats import CacheFormat
from nemoquant.model.kinds import KINDS
from nemoquant.planning.layers import ranges
from nemoquant.planning.row import Row

GROUPS = {prefix: title for kind in KINDS.values() for prefix, title in kind.groups.items()} | {
    "lm_head": "lm_head"
}
"""The first part of a role that can be quantized -> what all such modules are, for people."""
LAYERS = "layers a..b are those from a to b that have the role"  # a note on the table
_HEADER = ("role", "weights", "GEMM inputs", "tensors", "bytes", "layers")


def treatment(row: Row) -> str:
    """What a quantized row gets, in words: ``FP8``, ``NVFP4 weights only``; empty where it is kept."""
    if row.number is None:
        return ""
    return row.number.short + (" weights only" if row.activation_format is None else "")


def headline(rows: Sequence[Row], cache: CacheFormat | None) -> str:
    """See :attr:`nemoquant.planning.plan.Plan.headline`; ``cache`` is None where no layer has one in it."""
    groups: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        title = GROUPS.get(row.role.split(".")[0])
        if title is not None:
            groups[title][treatment(row)] += row.elements
    sizes: Counter[str] = Counter()
    for found in groups.values():
        sizes.update(found)
    said = []
    for given, _ in sizes.most_common():
        having = sorted(
            (title for title in groups if given in groups[title]), key=lambda t: -groups[t][given]
        )
        parts = [title if len(groups[title]) == 1 else f"part of {title}" for title in having]
        said += [f"{both(parts)} {given}"] * bool(given)
    said = said or ["no weights quantized"]
    if cache is not None:
        said.append(f"KV cache {cache.name.upper()}")
    text = "; ".join([*said, "all else as the source"])
    return f"{text[0].upper()}{text[1:]}."


def formats(rows: Sequence[Row]) -> str:
    """The formats that weights get, shortly: ``NVFP4 and FP8``; empty where none is quantized."""
    sizes: Counter[str] = Counter()
    for row in rows:
        sizes[treatment(row)] += row.elements
    sizes.pop("", None)
    return both([name for name, _ in sizes.most_common()])


class RoleRow(NamedTuple):
    """The tensors of a role that get the same.

    Attributes:
        weights: the format, with the method in brackets where it is not ``max``.
        inputs: the format of GEMM inputs; "-" where they are not quantized.
        layers: in words of a recipe; empty where the whole role gets the same.
    """

    role: str
    weights: str
    inputs: str
    tensors: int
    bytes: int
    layers: str


def role_table(rows: Sequence[Row]) -> list[RoleRow]:
    """A row for each role and what its tensors get, in file order."""
    return [
        RoleRow(entry["role"], entry["weights"], entry["inputs"], entry["tensors"], entry["bytes"], words)
        for entry, words in _roles(rows)
    ]


def role_cells(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str | int, ...]]]:
    """The same as a header and cells; without layers where no role has several formats."""
    found = role_table(rows)
    width = len(_HEADER) - (not any(row.layers for row in found))
    return _HEADER[:width], [row[:width] for row in found]


def role_data(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same as JSON data: ``layers`` are numbers, of all rows that lie in layers."""
    return [entry for entry, _ in _roles(rows)]


def _roles(rows: Sequence[Row]) -> list[tuple[dict[str, Any], str]]:
    totals: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        weights = row.format if row.scale_method in (None, "max") else f"{row.format} ({row.scale_method})"
        key = (row.role, weights, row.activation_format or "-")
        entry = totals.setdefault(
            key, {**dict(zip(("role", "weights", "inputs"), key, strict=True)), "tensors": 0, "bytes": 0}
        )
        entry["tensors"] += 1
        entry["bytes"] += row.bytes_out
        layers = entry.setdefault("layers", {})
        if row.layer is not None:
            layers[row.layer] = None  # a set, in order
    having: defaultdict[str, set[int]] = defaultdict(set)
    for entry in totals.values():
        entry["layers"] = sorted(entry["layers"])
        having[entry["role"]].update(entry["layers"])
    entries = sorted(totals.values(), key=lambda entry: list(having).index(entry["role"]))  # roles together
    several = {role for role, count in Counter(role for role, _, _ in totals).items() if count > 1}
    return [
        (
            entry,
            ranges(entry["layers"], sorted(having[entry["role"]])) if entry["role"] in several else "",
        )
        for entry in entries
    ]

"""The order in which the weights of a layer are solved, where they see the quantized weights before them."""

from collections.abc import Sequence

from nemoquant.model.config import LayerKind
from nemoquant.model.kinds import KINDS
from nemoquant.planning.row import Row

WRITERS = frozenset(role for kind in KINDS.values() for role in kind.order[-1])
"""Roles of the weights that write the stream, one in each layer: they take up the errors before them."""


def stages(kind: LayerKind, rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of a layer, those together whose inputs can be seen at once."""
    parts = ([row for row in rows if row.role in roles] for roles in KINDS[kind].order)
    return [part for part in parts if part]


def passes(kind: LayerKind, rows: Sequence[Row]) -> int:
    """How often a layer is run for its stages, and to go on to the next layer.

    The inputs of the first roles are that of the layer, normalised: nothing else is computed for them.
    """
    return 1 + sum(part[0].role not in KINDS[kind].order[0] for part in stages(kind, rows))

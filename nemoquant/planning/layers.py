"""The layers of a recipe's rule: numbers, ``first`` and ``last``, ranges such as ``3..9`` or ``-4..last``.

A number is that of a layer of the schedule, from 0; a negative one counts from its end, -1 is its last layer.
``first`` and ``last`` are the first and the last layer that has a tensor which the rule matches, and a range
means those of the layers from one end to the other, both included, that have one. Multi-token-prediction
modules count their layers apart.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, WithJsonSchema

from nemoquant.errors import listing
from nemoquant.model.parse import MOST_LAYERS

Word = Literal["first", "last"]
WORDS: tuple[Word, ...] = get_args(Word)
_END = rf"(-?[0-9]{{1,{len(str(MOST_LAYERS))}}}|{'|'.join(WORDS)})"
_RANGE = re.compile(rf"{_END}\.\.{_END}")


def _checked(value: object) -> int | str:
    """One entry of ``layers`` in a recipe; raises ValueError where it is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        if -MOST_LAYERS <= value < MOST_LAYERS:
            return value
        raise ValueError(f"expected a layer from {-MOST_LAYERS:,} to {MOST_LAYERS - 1:,}")
    if isinstance(value, str) and (value in WORDS or _RANGE.fullmatch(value)):
        return value
    raise ValueError(f"expected a layer's number, {' or '.join(WORDS)}, or a range such as 3..9 or -4..last")


Layer = Annotated[
    int | str,
    BeforeValidator(_checked),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": -MOST_LAYERS, "exclusiveMaximum": MOST_LAYERS},
                {"enum": list(WORDS)},
                {"type": "string", "pattern": f"^{_RANGE.pattern}$"},
            ]
        }
    ),
]
"""An entry of ``layers`` in a rule."""


def layers_of(entry: int | str, schedule: int, having: Sequence[int]) -> Sequence[int]:
    """The layers that an entry means; empty where it means none that has a tensor of the rule.

    Args:
        schedule: number of layers.
        having: those that have a tensor which the rule matches, in order.
    """
    ends = _RANGE.fullmatch(str(entry))
    low, high = (
        _number(end, schedule, having) for end in (ends.groups() if ends is not None else (entry, entry))
    )
    if low is None or high is None or not 0 <= low <= high < schedule:
        return ()
    return having[bisect_left(having, low) : bisect_right(having, high)]


def _number(end: int | str, schedule: int, having: Sequence[int]) -> int | None:
    """The layer that a number or word means; None for a word where no layer has a tensor of the rule."""
    if end in WORDS:
        return having[-(end == WORDS[1])] if having else None
    number = int(end)
    return number + schedule if number < 0 else number


def in_words(entries: Sequence[int | str]) -> str:
    """A rule's layers for people, shortly."""
    if all(isinstance(entry, int) and entry >= 0 for entry in entries):
        return f"{len(entries)} layers"
    return f"layers {listing(list(map(str, entries)), 20)}"


def ranges(layers: Sequence[int], having: Sequence[int]) -> str:
    """Some of the layers in ``having`` as a recipe would name them: ``0..6, 11, 15..20``.

    Args:
        layers: in order.
        having: those that have a tensor of the role, in order.
    """
    place = {layer: i for i, layer in enumerate(having)}
    runs = [
        [layer for _, layer in run]
        for _, run in groupby(enumerate(layers), key=lambda entry: place[entry[1]] - entry[0])
    ]
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)

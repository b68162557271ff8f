"""Layers of a rule by words and ranges, against a plain reading of the definition in docs/recipes.md."""

import itertools
import random

import pytest

from nemoquant.planning.layers import layers_of, ranges

HAVING = [2, 5, 6, 9, 12]  # of 14 layers


@pytest.mark.parametrize(
    ("entry", "meant"),
    [
        (5, [5]),
        (0, []),  # it has no tensor of the role
        (14, []),  # there is no such layer
        (-2, [12]),
        (-1, []),  # the last layer of the schedule, not of the role
        (-15, []),
        ("first", [2]),
        ("last", [12]),
        ("3..9", [5, 6, 9]),
        ("2..2", [2]),
        ("3..4", []),
        ("9..3", []),  # backwards
        ("9..14", []),  # beyond the model
        ("-9..-2", [5, 6, 9, 12]),
        ("6..last", [6, 9, 12]),
        ("first..5", [2, 5]),
        ("first..-1", HAVING),
        ("last..first", []),
    ],
)
def test_what_an_entry_means(entry: int | str, meant: list[int]) -> None:
    assert list(layers_of(entry, 14, HAVING)) == meant


@pytest.mark.parametrize("entry", ["first", "last", "first..last", 0, "0..3"])
def test_a_model_without_the_role(entry: int | str) -> None:
    assert list(layers_of(entry, 14, [])) == []


def test_layers_as_a_recipe_would_name_them() -> None:
    """Read again, the words mean the same layers; runs are those among layers that have the role."""
    assert ranges([2, 5, 6, 12], HAVING) == "2..6, 12"
    assert ranges([2, 5, 9, 12], HAVING) == "2, 5, 9, 12"
    assert ranges([6], HAVING) == "6"
    draw = random.Random(0)
    for _ in range(200):
        some = sorted(draw.sample(HAVING, draw.randint(1, 5)))
        entries = [int(e) if e.isdecimal() else e for e in ranges(some, HAVING).split(", ")]
        read = itertools.chain.from_iterable(layers_of(entry, 14, HAVING) for entry in entries)
        assert list(read) == some

"""The faults of tests/mutants: each has its place in the sources, and tests. Running them takes minutes."""

import re

import pytest
from mutants.mutants import MUTANTS, Mutant
from support.places import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_changes_one_place(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.new != mutant.old
    tests = (ROOT / f"tests/plugins/test_{mutant.tests}.py").read_text(encoding="utf-8")
    names = re.findall(r"^def test_(\w+)", tests, re.M)
    for word in filter(None, mutant.only.split(" or ")):
        assert any(word in name for name in names), word


def test_their_names_differ() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)

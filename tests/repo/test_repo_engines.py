"""What pages say of engines is what the code has."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from consumers import results
from support.places import ROOT

from nemoquant.layouts import ENGINES
from nemoquant.layouts.checked import CHECKED, Check


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = load("make_engines")


@pytest.mark.parametrize("path", PAGES.PAGES, ids=lambda path: path.name)
def test_pages_have_the_tables(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == PAGES.page(path), "run python docs/make_engines.py"
    _, make = PAGES.PAGES[path]
    assert make() in PAGES.page(path)


def test_what_was_loaded_is_what_the_results_say() -> None:
    """Sets of algorithms of the checkpoints whose every weight was right, by engine."""
    data = results.read()
    found = set()
    for word, name in ENGINES.items():
        rows = [engines[word] for engines in data["checkpoints"].values() if word in engines]
        right = [row for row in rows if not results.problems(word, row) and not results.known_text(word, row)]
        mixtures = {frozenset(row["algorithms"]) - {"unquantized"} for row in right} - {frozenset()}
        if rows:
            found.add(Check(name, data["engines"][word]["version"], data["date"], frozenset(mixtures)))
    assert set(CHECKED) == found

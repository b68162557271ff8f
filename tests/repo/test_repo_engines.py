"""What pages say of engines is what the code has."""

import importlib.util
from types import ModuleType

from support.places import ROOT


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_the_table() -> None:
    made = load("make_engines")
    assert made.README.read_text() == made.page(), "run python docs/make_engines.py"
    assert made.block() in made.page()

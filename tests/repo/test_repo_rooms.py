"""The order of the rooms: each imports only rooms above it, and no import is circular.

This includes imports inside functions.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.places import PACKAGE

# From the top; rooms on one line may import each other.
ORDER = (
    (
        "_version",
        "words",
        "errors",
        "files",
        "arguments",
        "machine",
        "units",
        "notebook",
        "progress",
        "bars",
        "shipped",
    ),
    ("formats",),
    ("ops",),
    ("model",),
    ("checkpoint",),
    ("tokens",),
    ("planning",),
    ("layouts",),
    ("sources",),
    ("calibrate",),
    ("quantized",),
    ("solve",),
    ("pack",),
    ("converting",),
    ("run",),
    ("graph",),
    ("engine",),
    ("evaluate",),
    ("api",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(path: Path) -> set[str]:
    """Our modules that a file imports, anywhere in it: the deepest module that each name belongs to."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = set()
    for name in names:
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name:
            found.add(name)
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


IMPORTS = {module: imported(path) for module, path in MODULES.items()}


def test_every_room_has_its_place():
    assert {room(module) for module in MODULES} - {""} == set(RANK)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "nemoquant"])
def test_a_room_imports_only_rooms_above_it(module):
    below = [
        name for name in IMPORTS[module] if name != "nemoquant" and RANK[room(name)] > RANK[room(module)]
    ]
    assert not below, f"{module} imports {below}, which stand below it"


def test_nothing_imports_in_a_circle():
    graph = {m: names - {m, "nemoquant"} for m, names in IMPORTS.items() if m != "nemoquant"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_the_test_sees_lazy_imports():
    """api imports nearly everything inside its functions."""
    assert "nemoquant.run.job" in IMPORTS["nemoquant.api.quantizing"]
    assert "nemoquant.evaluate.run" in IMPORTS["nemoquant.api.compare"]

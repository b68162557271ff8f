"""Slow tests: `-m "not slow"` keeps some tests in every room."""

import ast
from pathlib import Path

import pytest
from support.places import PACKAGE, TESTS

FOLDERS = sorted({file.parent.name for file in TESTS.glob("*/test_*.py")})
ROOMS = sorted({file.parent.name for file in PACKAGE.glob("*/*.py")})


def is_slow(mark: ast.AST) -> bool:
    """Whether it is ``pytest.mark.slow`` or a list with it; a mark on one parameter leaves the others."""
    if isinstance(mark, ast.List | ast.Tuple):
        return any(is_slow(one) for one in mark.elts)
    return isinstance(mark, ast.Attribute) and mark.attr == "slow"


def slowness(file: Path) -> dict[str, bool]:
    """Name of each test -> whether it is slow, by its own mark, its class's or its file's."""
    found = {}

    def look(body: list[ast.stmt], slow: bool) -> None:
        assigned = [node for node in body if isinstance(node, ast.Assign)]
        marks = [node.value for node in assigned if ast.unparse(node.targets[0]) == "pytestmark"]
        slow = slow or any(map(is_slow, marks))
        for node in body:
            if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                look(node.body, slow or any(map(is_slow, node.decorator_list)))
            elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name] = slow or any(map(is_slow, node.decorator_list))

    look(ast.parse(file.read_text(encoding="utf-8")).body, False)
    return found


def test_every_room_has_a_folder_of_tests() -> None:
    assert set(ROOMS) <= set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_room_has_tests_that_are_not_slow(folder: str) -> None:
    found = [slow for file in (TESTS / folder).glob("test_*.py") for slow in slowness(file).values()]
    assert not all(found), (
        f"all {len(found)} tests of tests/{folder} are slow: -m 'not slow' leaves this room out"
    )


def test_how_marks_are_read(tmp_path: Path) -> None:
    file = tmp_path / "test_x.py"
    file.write_text(
        "@pytest.mark.slow\n@needs\ndef test_a():\n    pass\n\n\ndef test_b():\n    pass\n\n\n"
        "class TestC:\n    pytestmark = [pytest.mark.slow]\n\n    def test_c(self):\n        pass\n"
    )
    assert slowness(file) == {"test_a": True, "test_b": False, "test_c": True}
    file.write_text("pytestmark = [\n    pytest.mark.slow,\n    needs,\n]\n" + file.read_text())
    assert slowness(file) == {"test_a": True, "test_b": True, "test_c": True}

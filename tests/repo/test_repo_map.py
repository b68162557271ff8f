"""The file map of CONTRIBUTING.md: its paths exist; it has the top of the repository and the package."""

import re
import subprocess
from pathlib import Path

import pytest
from support.places import PACKAGE, ROOT

HEADER = re.compile(r"\| *path *\| *what *\|")


def mapped(text: str) -> list[str]:
    """The paths of the tables ``| path | what |``: in backticks in the first column, several in a cell."""
    found, inside = [], False
    for line in text.splitlines():
        inside = bool(HEADER.fullmatch(line.strip())) or (inside and line.startswith("|"))
        if inside:
            found += re.findall(r"`([^`]+)`", line.split("|")[1])
    return [path.rstrip("/") for path in found]


def tops() -> set[str]:
    """Files and folders that git tracks at the top, and modules and rooms of the package."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    listed = done.stdout.splitlines()
    of_package = {path for path in listed if path.startswith(f"{PACKAGE.name}/")}
    return {path.split("/")[0] for path in listed} | {"/".join(path.split("/")[:2]) for path in of_package}


def missing(paths: list[str], expected: set[str]) -> list[str]:
    """Expected paths that are not listed, and of which no inner path is listed."""
    inside = tuple(f"{path}/" for path in paths)
    return sorted(name for name in expected if not any(path.startswith(f"{name}/") for path in inside))


@pytest.fixture
def paths() -> list[str]:
    return mapped((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_every_path_exists(paths: list[str]) -> None:
    assert paths, "CONTRIBUTING.md has no table `| path | what |`"
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [path for path in set(paths) if paths.count(path) > 1] == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git what is tracked")
def test_nothing_at_the_top_is_missing(paths: list[str]) -> None:
    assert missing(paths, tops()) == []


def test_how_a_table_is_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "| other | table |\n|---|---|\n| `no/path` | x |\n\n"
        "| path | what |\n|---|---|\n| `a.py`, `b/` | the `c` of it |\n| `d/e/` | f |\n\n| `g` | h |\n"
    )
    found = mapped(page.read_text())
    assert found == ["a.py", "b", "d/e"]
    assert missing(found, {"a.py", "b", "d", "d/e", "d/f", "e"}) == ["d/f", "e"]

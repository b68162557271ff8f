"""What .ci/ relies on, and the versions that the package promises."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = {
    line.partition("==")[0].lower().replace("_", "-")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
}


@pytest.mark.parametrize("script", [path.name for path in sorted((ROOT / ".ci").iterdir())])
def test_scripts_are_whole(script: str) -> None:
    path = ROOT / ".ci" / script
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", path], check=True)


def test_readme_has_the_commands_that_ci_runs() -> None:
    """One line each; the second is tested in two halves, since its installation runs next to the demo."""
    found = dict(re.findall(r"^<!-- (run|test) -->\n```\n(.*)\n```$", (ROOT / "README.md").read_text(), re.M))
    assert found["run"].startswith("pip install -c constraints.txt . && nemoquant demo --out ${OUT:-")
    assert re.fullmatch(r"pip install -c constraints\.txt [^&]* && python -m pytest[^&]*", found["test"])


def test_promised_pythons_are_named() -> None:
    first, last = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    named = [
        c.rpartition(".")[2]
        for c in PROJECT["classifiers"]
        if c.startswith("Programming Language :: Python :: 3.")
    ]
    assert named == [str(minor) for minor in range(int(first), int(last))]


@pytest.mark.parametrize("extra", ["", "dev", "onnx", "ort", "rtx", "ray", "parquet", "modelopt"])
def test_versions_that_were_tested_are_pinned(extra: str) -> None:
    """The versions that CI installs."""
    wanted = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    names = {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in wanted} - {"nemoquant"}
    assert names <= PINNED

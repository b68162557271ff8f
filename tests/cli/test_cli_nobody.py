"""A container with a random user: no home folder, no name, and nothing but OUT's folder to write into."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOBODY = """
import os, pwd, sys

def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = getpwuid
from nemoquant.cli import main

main(sys.argv[1:])
"""


def run(folder: Path, *arguments: object, home: str | None = None, code: int = 0) -> str:
    """The command as that user; PATH leads to the tools that pip installed."""
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(folder / "temporary")}
    environment |= {
        key: value for key, value in os.environ.items() if key in ("PYTHONPATH", "OMP_NUM_THREADS")
    }
    done = subprocess.run(
        [sys.executable, "-c", NOBODY, *map(str, arguments)],
        env=environment | ({} if home is None else {"HOME": home}),
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests: kernels are compiled in the first."""
    folder = tmp_path_factory.mktemp("nobody")
    (folder / "temporary").mkdir()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("home", [None, "/dev/null/nonexistent"], ids=["no home", "a home that is none"])
def test_verbs_that_compute(home, folder, source, token_rows, tmp_path):
    out = tmp_path / "out"
    run(
        folder, "quantize", source, out, "--fmt", "nvfp4", "--method", "max", "--calib", token_rows, home=home
    )
    assert list((folder / "temporary").glob("nemoquant-kernels-*/*/*.nbc")), "kernels are kept there"
    run(folder, "verify", out, "--against", source, home=home)
    run(folder, "diff", source, out, "--data", token_rows, "--no-card", home=home)


@pytest.mark.parametrize("home", [None, "/dev/null/nonexistent"], ids=["no home", "a home that is none"])
def test_the_plugins_folder(home, folder):
    found = {f["name"]: f for f in json.loads(run(folder, "doctor", "--json", home=home))}
    refused = run(folder, "plugins", "build", "--host", "--kernels-only", home=home, code=2)
    if home is None:
        for text in (found["plugins"]["why"], refused):
            assert (
                "this user has no home folder, in which the plugins would be; set XDG_CACHE_HOME, or" in text
            )
    else:
        assert "none are built" in found["plugins"]["why"]
        assert "choose another folder with --out" in refused or "was not found" in refused

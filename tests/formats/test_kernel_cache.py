"""Compiled kernels on disk.

An edit of any source compiles again, equal sources share a cache, and without a writable folder everything
still works. Each run is a separate process over a copy of the package's formats, in which a helper
(``e4m3.encode_one``) is edited. Its caller (``fp8.encode``) is in another file; numba alone would watch only
that file.
"""

import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from nemoquant.formats import kernel_cache
from nemoquant.formats.kernel_cache import KEPT

PACKAGE = Path(__file__).resolve().parents[2] / "nemoquant"
RUN = """
import numpy as np
from nemoquant.formats import fp8, kernel_cache
codes = fp8.encode(np.array([[1, 2, 448, -3]], np.float32), 1.0)
print(codes.tobytes().hex(), sum(getattr(fp8._encode, "stats").cache_hits.values()), kernel_cache.folder())
"""
RIGHT, EDITED = "38407ec4", "39417fc5"


class Ran(NamedTuple):
    codes: str
    hits: int
    folder: Path


class Copy:
    """A package ``nemoquant`` that has only the formats, and the home folder of its user."""

    def __init__(self, at: Path, home: Path) -> None:
        self.at, self.home = at, home
        (at / "nemoquant").mkdir(parents=True)
        (at / "nemoquant/__init__.py").touch()
        for name in ("errors.py", "words.py"):
            shutil.copy(PACKAGE / name, at / "nemoquant")
        shutil.copytree(
            PACKAGE / "formats", at / "nemoquant/formats", ignore=shutil.ignore_patterns("__pycache__")
        )

    def edit_helper(self) -> None:
        path = self.at / "nemoquant/formats/e4m3.py"
        text = path.read_text()
        assert "return np.uint8(np.uint32(code | sign))" in text
        path.write_text(text.replace("(code | sign)", "((code ^ np.uint32(1)) | sign)"))

    def start(self, **environment: str | Path) -> subprocess.Popen[str]:
        kept = {
            k: v
            for k, v in os.environ.items()
            if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "PYTHONPATH")
        }
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", RUN],
            cwd=self.at,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**kept, "HOME": str(self.home), **{k: str(v) for k, v in environment.items()}},
        )

    def run(self, **environment: str | Path) -> Ran:
        return finished(self.start(**environment))


def finished(process: subprocess.Popen[str]) -> Ran:
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    codes, hits, folder = out.split()
    return Ran(codes, int(hits), Path(folder))


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Copy]:
    return lambda name: Copy(tmp_path / name, tmp_path / "home")


def test_an_edited_helper_of_another_file_is_compiled_anew(make: Callable[[str], Copy]) -> None:
    copy = make("one")
    first = copy.run()
    assert (first.codes, first.hits) == (RIGHT, 0)
    assert first.folder.parent == copy.home / ".cache/nemoquant/kernels"
    assert copy.run() == (RIGHT, 1, first.folder)
    copy.edit_helper()
    second = copy.run()
    assert (second.codes, second.hits) == (EDITED, 0)
    assert second.folder != first.folder


@pytest.mark.slow
def test_equal_sources_in_two_places_share_their_kernels(make: Callable[[str], Copy]) -> None:
    first = make("one").run()
    assert make("elsewhere").run() == (RIGHT, 1, first.folder)


@pytest.mark.slow
def test_processes_that_start_together_may_share_a_new_folder(make: Callable[[str], Copy]) -> None:
    copy = make("one")
    ran = [finished(process) for process in [copy.start() for _ in range(3)]]
    assert {(r.codes, r.folder) for r in ran} == {(RIGHT, ran[0].folder)}
    assert copy.run().hits == 1


@pytest.mark.slow
def test_the_folder_can_be_chosen(make: Callable[[str], Copy], tmp_path: Path) -> None:
    copy = make("one")
    assert copy.run(XDG_CACHE_HOME=tmp_path / "xdg").folder.parent == tmp_path / "xdg/nemoquant/kernels"
    assert copy.run(NUMBA_CACHE_DIR=tmp_path / "numba").folder.parent == tmp_path / "numba/nemoquant-kernels"
    assert not copy.home.exists()


@pytest.mark.slow
def test_where_it_cannot_be_written_a_private_temporary_folder_serves(
    make: Callable[[str], Copy], tmp_path: Path
) -> None:
    copy, temporary = make("one"), tmp_path / "temporary"
    temporary.mkdir()
    first = copy.run(XDG_CACHE_HOME="/dev/null", TMPDIR=temporary)
    assert (first.codes, first.folder.parent) == (RIGHT, temporary / f"nemoquant-kernels-{os.getuid()}")
    assert first.folder.parent.stat().st_mode & 0o777 == 0o700
    assert copy.run(XDG_CACHE_HOME="/dev/null", TMPDIR=temporary).hits == 1


NOBODY = """
import pwd

def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = getpwuid
"""


def test_a_user_without_a_home(make: Callable[[str], Copy], tmp_path: Path) -> None:
    """As in a container with a random user: no HOME, and no line in /etc/passwd."""
    copy, temporary = make("one"), tmp_path / "temporary"
    temporary.mkdir()
    (copy.at / "nobody.py").write_text(NOBODY + RUN)
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import nobody"],
        cwd=copy.at,
        env={"TMPDIR": str(temporary), "PYTHONPATH": str(copy.at)},
        capture_output=True,
        text=True,
        check=True,
    )
    codes, _, folder = ran.stdout.split()
    assert (codes, Path(folder).parent) == (RIGHT, temporary / f"nemoquant-kernels-{os.getuid()}")


@pytest.mark.parametrize("home", [None, "/dev/null", "."])
def test_triton_gets_a_folder_where_the_home_serves_nothing(
    home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    monkeypatch.setenv("HOME", home or "")
    if home is None:
        monkeypatch.delenv("HOME")
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    kernel_cache.place_triton()
    found = os.environ.get("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_CACHE_DIR", "restored")  # monkeypatch removes it after the test
    assert found == (None if home == "." else str(kernel_cache.folder()) + "/triton")
    kernel_cache.place_triton()
    assert os.environ["TRITON_CACHE_DIR"] == "restored", "what the user named stays"


@pytest.mark.slow
def test_where_others_can_write_nothing_is_kept(make: Callable[[str], Copy], tmp_path: Path) -> None:
    """Any file in such a folder would be executed."""
    copy, theirs = make("one"), tmp_path / "temporary" / f"nemoquant-kernels-{os.getuid()}"
    theirs.mkdir(parents=True)
    theirs.chmod(0o777)
    for _ in range(2):
        assert copy.run(XDG_CACHE_HOME="/dev/null", TMPDIR=theirs.parent) == (RIGHT, 0, Path("None"))
    assert not list(theirs.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["fp8._encode*.nbc", "fp8._encode*.nbi"])
def test_damaged_files_are_compiled_again(make: Callable[[str], Copy], pattern: str) -> None:
    copy = make("one")
    folder = copy.run().folder
    (damaged,) = folder.glob(pattern)
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert copy.run() == (RIGHT, 0, folder)
    assert copy.run() == (RIGHT, 1, folder)


@pytest.mark.slow
def test_a_new_folder_takes_the_place_of_the_oldest(make: Callable[[str], Copy], tmp_path: Path) -> None:
    copy = make("one")
    parent = copy.home / ".cache/nemoquant/kernels"
    old = [parent / f"{i:016x}-cpython-311" for i in range(KEPT + 2)]
    others = [parent / "mine", parent / "0123-cpython-311", parent.parent / "plugins"]
    for path in (*old, *others, tmp_path / "linked"):
        path.mkdir(parents=True)
        (path / "a file").touch()
    link = parent / f"{99:016x}-cpython-311"
    link.symlink_to(tmp_path / "linked")
    for i, path in enumerate(old):
        os.utime(path, (1000 + i, 1000 + i))
    new = copy.run().folder
    assert set(parent.iterdir()) == {new, link, *others[:2], *old[-(KEPT - 1) :]}
    assert all((path / "a file").is_file() for path in (*others, link))


@pytest.mark.slow
def test_kernels_can_be_run_without_being_compiled(make: Callable[[str], Copy]) -> None:
    """A debugger can then step through them."""
    process = make("one").start(NUMBA_DISABLE_JIT="1")
    _, err = process.communicate()
    assert "'function' object has no attribute 'stats'" in err  # of RUN's last line, after encoding


def test_every_kernel_stands_in_the_folder_that_is_hashed() -> None:
    using = [
        p.relative_to(PACKAGE).parts[0]
        for p in PACKAGE.rglob("*.py")
        if re.search(r"^(import|from) numba\b", p.read_text(), re.M)
    ]
    assert set(using) == {"formats"}
    assert not [p for p in (PACKAGE / "formats").iterdir() if p.is_dir() and p.name != "__pycache__"]

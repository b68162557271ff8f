"""Folders that are made once in a session of tests, also where several processes run them."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path


class Once:
    """``once(name, build)``: the folder ``name``, made by ``build(folder)`` unless a test, here or elsewhere,
    did it."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def __call__(self, name: str, build: Callable[[Path], object]) -> Path:
        folder = self.base / name / Path(name).name  # what is made has the last name; the lock lies beside it
        folder.parent.mkdir(parents=True, exist_ok=True)
        done = folder.parent / "done"
        with (folder.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a build that failed
                build(folder)
                done.touch()
        return folder

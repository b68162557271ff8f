"""Folders that are made once in a session of tests, even if several processes run them."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path


class Once:
    """``once(name, build)``: the folder ``name``, made by ``build(folder)`` unless another test made it.

    That test may run in another process.
    """

    def __init__(self, base: Path) -> None:
        self.base = base

    def __call__(self, name: str, build: Callable[[Path], object]) -> Path:
        folder = self.base / name / Path(name).name  # named by the last part; the lock is next to it
        folder.parent.mkdir(parents=True, exist_ok=True)
        done = folder.parent / "done"
        with (folder.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # left by a failed build
                build(folder)
                done.touch()
        return folder

"""Compiled kernels on disk: one folder for each state of the sources of ``nemoquant/formats``.

numba's own cache watches only the file that defines a kernel. But a kernel contains the machine code of
helpers from other files, so after an edit of a helper that cache still had stale kernels. Here the folder's
name is the hash of every source file of this package (and numba's version): after any edit, even of a
comment, kernels are compiled again. All virtual environments and clones of a user that have the same sources
share a folder:

    $NUMBA_CACHE_DIR/nemoquant-kernels, else ($XDG_CACHE_HOME or ~/.cache)/nemoquant/kernels, else a private
    folder for temporary files

If none of them can be written, kernels are compiled in every process. Nothing here raises or prints.
"""

import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

KEPT = 8
"""Number of folders kept, also for other sources and other Pythons: those that were used last."""

_CONFIG: Any = numba.config  # from NUMBA_... in the environment
_NAME = re.compile(r"[0-9a-f]{16}-[a-z]+-\d+")


@cache
def sources_hash() -> str:
    """sha256 of numba's version and of the kernels' sources, as they were when this process imported them."""
    total = hashlib.sha256(f"numba {numba.__version__}\0".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        data = path.read_bytes()
        total.update(f"{path.name}\0{len(data)}\0".encode() + data)
    return total.hexdigest()


@cache
def folder() -> Path | None:
    """Where this process keeps its kernels; None if no folder can be used."""
    if not Path(__file__).with_suffix(".py").is_file():
        return None  # the package is installed without sources
    for parent in (_user_folder, _temporary_folder):
        with suppress(OSError, RuntimeError):  # RuntimeError: the user has no home folder
            return _open_folder(parent())
    return None


def keep(dispatcher: Any) -> Any:
    """Make a kernel of ``numba.njit``, which has no cache yet, use this cache."""
    at = folder()
    if at is not None and not _CONFIG.DISABLE_JIT:
        dispatcher._cache = _Cache(dispatcher.py_func)
    return dispatcher


def place_triton() -> None:
    """Let Triton keep its kernels here too, for a user whose home folder can't be written.

    It would fail, or write into a folder named ``~``. Without a folder here, that is left to it.
    """
    if os.environ.get("TRITON_CACHE_DIR") or os.environ.get("TRITON_HOME"):
        return
    with suppress(RuntimeError):  # the user has no home folder
        if os.access(Path.home(), os.W_OK | os.X_OK):
            return
    at = folder()
    if at is not None:
        os.environ["TRITON_CACHE_DIR"] = str(at / "triton")


def _user_folder() -> Path:
    if _CONFIG.CACHE_DIR:
        parent = Path(_CONFIG.CACHE_DIR) / "nemoquant-kernels"
    else:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemoquant/kernels"
    parent.mkdir(parents=True, exist_ok=True)
    return parent.absolute()


def _temporary_folder() -> Path:
    """A private folder for temporary files.

    Its place is open to others, and code loaded from it is executed: it must belong to this user alone.
    """
    parent = Path(tempfile.gettempdir()) / f"nemoquant-kernels-{os.getuid()}"
    with suppress(FileExistsError):
        parent.mkdir(mode=0o700)
    status = parent.lstat()
    if (status.st_uid, status.st_mode) != (os.getuid(), 0o40700):
        raise PermissionError(parent)
    return parent


def _open_folder(parent: Path) -> Path:
    """The folder for these sources, after a test that it can be written.

    A new folder replaces the one whose last use is longest ago, once there are more than ``KEPT``.
    """
    at = parent / f"{sources_hash()[:16]}-{sys.implementation.cache_tag}"
    try:
        at.mkdir()
    except FileExistsError:
        os.utime(at)  # the time of its last use is now
    else:
        for _, old in sorted(_cache_folders(parent), reverse=True)[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
    tempfile.TemporaryFile(dir=at).close()
    return at


def _cache_folders(parent: Path) -> Iterator[tuple[int, Path]]:
    """The folders of this cache with the time of their last use; other processes may be removing some."""
    for path in parent.iterdir():
        with suppress(OSError):
            if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                yield path.stat().st_mtime_ns, path


class _Locator(_CacheLocator):
    """Gives numba the folder of a kernel, and the state of its source."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._py_file, self._line = function.__code__.co_filename, function.__code__.co_firstlineno

    def get_cache_path(self) -> str:
        return str(folder())

    def get_source_stamp(self) -> str:
        return sources_hash()

    def get_disambiguator(self) -> str:
        return str(self._line)


class _Implementation(CompileResultCacheImpl):
    def __init__(self, function: Callable[..., Any]) -> None:
        """Replaces numba's own, which searches its list of locators."""
        self._lineno, self._locator = function.__code__.co_firstlineno, _Locator(function)
        name = f"{Path(function.__code__.co_filename).stem}.{function.__qualname__}"
        self._filename_base = self.get_filename_base(name, sys.abiflags)


class _Cache(FunctionCache):
    _impl_class = _Implementation

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled kernel; None also where a file is damaged.

        Unpickling a damaged file can raise anything. The index is then emptied.
        """
        try:
            return super().load_overload(sig, target_context)
        except Exception:
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save a compiled kernel, one process at a time.

        numba numbers data files by what its index lists, so two processes could take the same number. Nothing
        is saved if the disk is full, or if the folder was removed meanwhile.
        """
        with suppress(OSError), (Path(self.cache_path) / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            super().save_overload(sig, data)

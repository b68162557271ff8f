"""Compiled kernels on disk: a folder for each state of the sources of ``nemoquant/formats``.

numba's own cache watches the one file that a kernel stands in. A kernel calls helpers of other files and has
their machine code inside, so an edited helper left stale kernels there. Here the folder's name is the hash of
every source file of this package (and numba's version): an edit of any of them, a comment too, compiles anew.
All virtual environments and clones of a user that have the same sources share a folder:

    $NUMBA_CACHE_DIR/nemoquant-kernels, else ($XDG_CACHE_HOME or ~/.cache)/nemoquant/kernels, else a private
    folder for temporary files

Where none of them can be written, kernels are compiled in every process. Nothing here raises or prints.
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
"""Folders, of other sources or Pythons too; those that were used last."""

_CONFIG: Any = numba.config  # from NUMBA_... in the environment
_NAME = re.compile(r"[0-9a-f]{16}-[a-z]+-\d+")


@cache
def sources_hash() -> str:
    """The sha256 of what the kernels are compiled from and by, when this process imported it."""
    total = hashlib.sha256(f"numba {numba.__version__}\0".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        data = path.read_bytes()
        total.update(f"{path.name}\0{len(data)}\0".encode() + data)
    return total.hexdigest()


@cache
def folder() -> Path | None:
    """Where this process keeps its kernels; None where it can't."""
    if not Path(__file__).with_suffix(".py").is_file():
        return None  # installed without sources
    for opened in (_named_by_the_user, _temporary):
        with suppress(OSError, RuntimeError):  # RuntimeError: there is no home
            return _opened(opened())
    return None


def keep(dispatcher: Any) -> Any:
    """Give a kernel of ``numba.njit`` this cache, in place of none."""
    at = folder()
    if at is not None and not _CONFIG.DISABLE_JIT:
        dispatcher._cache = _Cache(dispatcher.py_func)
    return dispatcher


def _named_by_the_user() -> Path:
    if _CONFIG.CACHE_DIR:
        parent = Path(_CONFIG.CACHE_DIR) / "nemoquant-kernels"
    else:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemoquant/kernels"
    parent.mkdir(parents=True, exist_ok=True)
    return parent.absolute()


def _temporary() -> Path:
    """Others can write beside it, and what is loaded from it is run: it must be this user's own."""
    parent = Path(tempfile.gettempdir()) / f"nemoquant-kernels-{os.getuid()}"
    with suppress(FileExistsError):
        parent.mkdir(mode=0o700)
    found = parent.lstat()
    if (found.st_uid, found.st_mode) != (os.getuid(), 0o40700):
        raise PermissionError(parent)
    return parent


def _opened(parent: Path) -> Path:
    """The folder for these sources, after a try to write there. A new one takes the place of the oldest."""
    at = parent / f"{sources_hash()[:16]}-{sys.implementation.cache_tag}"
    try:
        at.mkdir()
    except FileExistsError:
        os.utime(at)  # used now
    else:
        for old in sorted(_folders(parent), reverse=True)[KEPT:]:
            shutil.rmtree(old[1], ignore_errors=True)
    tempfile.TemporaryFile(dir=at).close()
    return at


def _folders(parent: Path) -> Iterator[tuple[int, Path]]:
    """Those of this cache, and when each was last used. Another process may be removing the same."""
    for path in parent.iterdir():
        with suppress(OSError):
            if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                yield path.stat().st_mtime_ns, path


class _Locator(_CacheLocator):
    """What numba asks for the place of a kernel, and for the state of its source."""

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
        """Without numba's own, which looks through its list of locators."""
        self._lineno, self._locator = function.__code__.co_firstlineno, _Locator(function)
        name = f"{Path(function.__code__.co_filename).stem}.{function.__qualname__}"
        self._filename_base = self.get_filename_base(name, sys.abiflags)


class _Cache(FunctionCache):
    _impl_class = _Implementation

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """None too where a file is damaged: unpickled, that can raise anything. The index is begun anew
        then."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """One process at a time: numba numbers data files by what it finds in the index, so that two could
        take one number.

        Nothing is kept where the disk is full, or where the folder was removed meanwhile.
        """
        with suppress(OSError), (Path(self.cache_path) / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            super().save_overload(sig, data)

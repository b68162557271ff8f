"""``watch.c`` from Python: compiling it, aiming it, and reading its log."""

import ctypes
import errno
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

SOURCE = Path(__file__).with_name("watch.c")
RECORD = struct.Struct("=IIIiQqq")


class Action(IntEnum):
    """What happens at the chosen point; the names of ``watch.c``, in its order."""

    RECORD = 0  # nothing
    KILL = 1  # SIGKILL; a write is half done at its second point
    FAIL_FROM = 2  # this and all later calls fail that take room on the disk, and fsync
    FAIL_ONCE = 3
    STOP = 4  # SIGSTOP: ``child`` then does something meanwhile, and lets it go on


class Kind(IntEnum):
    """The events; the names of ``watch.c``, in its order."""

    CREATE = 0
    OPEN = 1
    WRITE = 2
    TRUNCATE = 3
    FSYNC = 4
    RENAME = 5
    UNLINK = 6
    RMDIR = 7
    MKDIR = 8
    LINK = 9
    SYMLINK = 10
    CONNECT = 11


@dataclass(frozen=True)
class Aim:
    """What to do at which point.

    Attributes:
        point: number of the point, from 1. A write of two bytes or more has two, any other event one.
        error: errno of a call that fails.
    """

    action: Action = Action.RECORD
    point: int = 0
    error: int = errno.ENOSPC


@dataclass(frozen=True)
class Event:
    """One event of the log.

    Attributes:
        path: absolute. ``other`` is the new name of a rename, the content of a link.
        error: errno, 0 where the call went well.
        inode: of the file or folder.
        offset, data: what was written, and where. ``size``: its length, or that of a truncated file.
    """

    kind: Kind
    path: str
    other: str
    error: int
    inode: int
    offset: int
    size: int
    data: bytes

    @property
    def points(self) -> int:
        """How many points it has; a failed call tells nothing about that."""
        return 2 if self.kind is Kind.WRITE and self.size > 1 else self.kind is not Kind.CONNECT


def compiler() -> str | None:
    """A C compiler on the path, if there is one."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def compiled(folder: Path) -> Path:
    """The library, compiled into ``folder``."""
    library = folder / "watch.so"
    tool = compiler()
    assert tool is not None, "no C compiler: the faults can't be watched"
    subprocess.run([tool, "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)
    return library


def loaded() -> bool:
    """Whether this process runs under the library."""
    return hasattr(ctypes.CDLL(None), "watch_arm")


def arm(root: Path, aim: Aim, log: int) -> None:
    """Watch this process below ``root`` from now on; ``log`` is a file's handle, -1 for none."""
    library = ctypes.CDLL(None)
    library.watch_arm(os.fsencode(root), log, int(aim.action), ctypes.c_long(aim.point), aim.error)


def count() -> int:
    """Points that this process has passed since ``arm``."""
    function = ctypes.CDLL(None).watch_count
    function.restype = ctypes.c_long
    result: int = function()
    return result


def disarm() -> None:
    """Watch nothing any more."""
    ctypes.CDLL(None).watch_disarm()


def events(log: bytes) -> Iterator[Event]:
    """The events of a log, in the order in which they were done."""
    at = 0
    while at < len(log):
        kind, path, other, error, inode, offset, size = RECORD.unpack_from(log, at)
        at += RECORD.size
        texts = [os.fsdecode(log[at : at + path]), os.fsdecode(log[at + path : at + path + other])]
        at += path + other
        data = log[at : at + size] if kind == Kind.WRITE else b""
        at += len(data)
        yield Event(Kind(kind), texts[0], texts[1], error, inode, offset, size, data)

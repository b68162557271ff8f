"""What this process may use of the machine, and what it uses."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def usable_threads() -> int:
    """Threads that this process may use."""
    return len(os.sched_getaffinity(0))


class _Host:
    """The number of torch's threads that the process had when the first of our blocks began."""

    def __init__(self) -> None:
        self.lock, self.blocks, self.threads = threading.Lock(), 0, 0
        self.mine = threading.local()  # depth: blocks that this thread is in


_host = _Host()


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Gives torch ``count`` threads for a block, and after it the number that the process had before.

    That number belongs to the whole process, which is not ours where it calls the Python API. A thread that
    is new to torch starts with the number that was set last, by whatever thread: so where blocks of several
    threads overlap, each goes back to what the process had before the first of them. None changes nothing.
    """
    if count is None:
        yield
        return
    import torch

    with _host.lock:
        depth = getattr(_host.mine, "depth", 0)
        here = (
            torch.get_num_threads()
        )  # asked in any case: a new thread would take over another's number later
        if not _host.blocks:
            _host.threads = here
        before = here if depth else _host.threads
        _host.blocks += 1
        _host.mine.depth = depth + 1
        torch.set_num_threads(count)
    try:
        yield
    finally:
        with _host.lock:
            torch.set_num_threads(before)
            _host.blocks -= 1
            _host.mine.depth = depth


def resident(field: str = "VmRSS") -> int:
    """Resident memory of this process in bytes: now (``VmRSS``), or at its peak (``VmHWM``)."""
    with Path("/proc/self/status").open(encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def trim_heap() -> None:
    """Returns freed memory to the system, where the C library can: glibc keeps it, in a heap for each thread.

    What was freed on one thread is no use to another, so that a peak follows what all have ever held.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

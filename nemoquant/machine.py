"""What this process may use of the machine, and what it uses."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def usable_threads() -> int:
    """Threads that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Gives torch ``count`` threads for a block, and after it the number that the process had before.

    That number belongs to the whole process, which is not ours where it calls the Python API. None changes
    nothing.
    """
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resident(field: str = "VmRSS") -> int:
    """Resident memory of this process in bytes: now (``VmRSS``), or at its peak (``VmHWM``)."""
    with Path("/proc/self/status").open(encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))

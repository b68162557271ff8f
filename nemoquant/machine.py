"""What this process may use of the machine, and what it uses."""

import os
from pathlib import Path


def usable_threads() -> int:
    """Threads that this process may use."""
    return len(os.sched_getaffinity(0))


def resident(field: str = "VmRSS") -> int:
    """Resident memory of this process in bytes: now (``VmRSS``), or at its peak (``VmHWM``)."""
    with Path("/proc/self/status").open(encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))

"""Duration of a piece of work."""

import time
from collections.abc import Callable


def seconds(work: Callable[[], object]) -> float:
    """Duration of ``work`` in seconds."""
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-7)

"""How long a piece of work takes."""

import time
from collections.abc import Callable


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` took."""
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-7)

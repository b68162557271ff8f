"""How this room's kernels are compiled: as those of the formats, and kept in the same folder.

That folder's name stands for the sources of ``nemoquant/formats`` alone. So here a kernel's own name has the
hash of the sources that have kernels, and after an edit of any of them kernels are compiled again.
"""

import hashlib
from functools import cache
from pathlib import Path

from nemoquant.formats import rounding
from nemoquant.formats.rounding import F

FILES = ("coupled.py", "descent.py", "gptq.py", "hess.py", "kernels.py", "lanes.py")  # all that have kernels


@cache
def _sources() -> str:
    total = hashlib.sha256()
    for name in FILES:
        data = Path(__file__).with_name(name).read_bytes()
        total.update(f"{name}\0{len(data)}\0".encode() + data)
    return total.hexdigest()[:16]


def kernel(function: F) -> F:
    """See :func:`nemoquant.formats.rounding.kernel`."""
    return rounding.kernel(_named(function))


def contracted_kernel(function: F) -> F:
    """See :func:`nemoquant.formats.rounding.contracted_kernel`."""
    return rounding.contracted_kernel(_named(function))


def _named(function: F) -> F:
    function.__qualname__ += f"_{_sources()}"
    return function

"""How this room's kernels are compiled: as those of the formats, and kept in the same folder.

That folder's name stands for the sources of ``nemoquant/formats`` alone. So here a kernel's own name has the
hash of this room's sources, and after an edit of any of them kernels are compiled again.
"""

import hashlib
from functools import cache
from pathlib import Path

from nemoquant.formats import rounding
from nemoquant.formats.rounding import F


@cache
def _sources() -> str:
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        data = path.read_bytes()
        total.update(f"{path.name}\0{len(data)}\0".encode() + data)
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

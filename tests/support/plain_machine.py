"""``forbid()``: this process finds no package but torch, Triton, NumPy, pytest and what these need.

So is a GPU machine on which a checkout lies and nothing was installed.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

THERE = ("torch", "triton", "numpy", "pytest")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(name: str, found: set[str]) -> set[str]:
    """The distribution and all that it requires without an extra, added to ``found``."""
    if plain(name) not in found:
        try:
            lines = requires(name) or []
        except PackageNotFoundError:  # of another platform
            return found
        found.add(plain(name))
        for line in lines:
            if "extra ==" not in line:
                needed(re.split(r"[^\w.-]", line, maxsplit=1)[0], found)
    return found


def forbid() -> list[str]:
    """Returns the modules that cannot be imported any more, by their first names."""
    there = set().union(*(needed(name, set()) for name in THERE))
    installed = packages_distributions()
    hidden = sorted(
        module
        for module, owners in installed.items()
        if module != "nemoquant" and not there & set(map(plain, owners))
    )
    for module in hidden:
        sys.modules[module] = None  # type: ignore[assignment] # to Python this is a module that is not there
    return hidden

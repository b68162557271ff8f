"""The stage between checkpoint and calibration: recipes, and the tables that they resolve to.

``nemoquant.plan`` is this package and the API's function :func:`nemoquant.api.plan` at once: Python binds a package to its name
in the parent as soon as anything imports it, so the package itself can be called.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemoquant.plan.plan import Plan


class _CallablePackage(ModuleType):
    def __call__(self, source: Path, recipe: str, *, scale_groups: bool = True) -> "Plan":
        from nemoquant import api

        return api.plan(source, recipe, scale_groups=scale_groups)


sys.modules[__name__].__class__ = _CallablePackage

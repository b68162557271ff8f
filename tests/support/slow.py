"""Parameters of tests that are quick one by one, but take minutes together."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """All values as parameters (a tuple: of several names), marked slow except ``quick``."""
    values = list(values)
    assert set(quick) <= set(values)

    def slow(value: Any) -> Any:
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)

    return [value if value in quick else slow(value) for value in values]

"""Files that engines loaded by their own code, every weight compared.

``python -m tests.consumers`` runs them; a test holds this page to its ``results.json``.
"""

from typing import NamedTuple


class Check(NamedTuple):
    """An engine, its version, the day, and the sets of algorithms of the files that it loaded rightly."""

    engine: str
    version: str
    date: str
    mixtures: frozenset[frozenset[str]]


CHECKED: tuple[Check, ...] = ()

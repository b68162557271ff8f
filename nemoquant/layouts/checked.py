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


_MIXTURES = frozenset(
    map(
        frozenset,
        [
            {"FP8"},
            {"MXFP8"},
            {"NVFP4"},
            {"W4A16_NVFP4"},
            {"FP8", "NVFP4"},
            {"FP8", "W4A16_NVFP4"},
        ],
    )
)
CHECKED: tuple[Check, ...] = (
    Check(
        "vLLM",
        "0.33.0",
        "2026-11-28",
        _MIXTURES | {frozenset({"NVFP4", "W4A16_NVFP4"}), frozenset({"FP8", "W8A16_FP8"})},
    ),
    Check("SGLang", "0.5.23", "2026-11-28", _MIXTURES),
)

"""How stages report their progress: all call the same kind of function."""

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""Called with stage, done, total and the name of the current piece of work; at the end with done == total."""

Count = Callable[[int], None]
"""Called with the amount done since the last call, such as bytes."""


def no_progress(stage: str, done: int, total: int, what: str) -> None:
    """A Progress that reports nothing."""

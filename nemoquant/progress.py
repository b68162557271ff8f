"""How a stage reports its progress: to one kind of callback, whoever listens."""

from collections.abc import Callable

Progress = Callable[
    [str, int, int, str], None
]  # stage, done, total, what is in work; called with done == total at the end
Count = Callable[[int], None]  # how much more is done since the last call, such as bytes


def no_progress(stage: str, done: int, total: int, what: str) -> None:
    """Progress that nobody looks at."""

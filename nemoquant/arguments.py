"""Checks of the arguments that a user gives to the Python API.

Each raises UsageError with the argument's name, what was got and what was expected. The command line has the
same words from the same places, and checks them itself.
"""

import math
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemoquant.errors import UsageError

MOST_THREADS = 1024
MOST_PATH = 4096  # characters: Linux takes no longer one
PathLike = str | os.PathLike[str]


def refuse(name: str, got: object, expected: str) -> UsageError:
    """The error to raise; what was got is cut to a readable length."""
    shown = repr(got)
    return UsageError(f"{name} is {shown if len(shown) <= 200 else shown[:200] + '...'}; expected {expected}")


def either(words: Sequence[object]) -> str:
    """``a, b or c``."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


def check_word(name: str, got: object, known: Sequence[str]) -> None:
    """``got`` is one of the known words."""
    if not isinstance(got, str) or got not in known:
        raise refuse(name, got, either(known))


def check_text(name: str, got: object, what: str = "text") -> None:
    """``got`` is a str."""
    if not isinstance(got, str):
        raise refuse(name, got, what)
    try:
        got.encode()
    except UnicodeEncodeError:
        raise refuse(name, got, f"{what} without lone surrogates, which are no characters") from None


def check_flags(**flags: object) -> None:
    """Each is True or False: any other value would pass for one of them."""
    for name, got in flags.items():
        if not isinstance(got, bool):
            raise refuse(name, got, "True or False")


def check_functions(**functions: object) -> None:
    """Each can be called, or is None."""
    for name, got in functions.items():
        if got is not None and not callable(got):
            raise refuse(name, got, "a function")


def whole(name: str, got: Any, least: int) -> int:
    """``got`` as an int of at least ``least``; integers of numpy are accepted, bool and float are not."""
    try:
        value = None if isinstance(got, bool) else operator.index(got)
    except TypeError:
        value = None
    if value is None:
        raise refuse(name, got, f"a whole number of at least {least}")
    if value < least:
        raise UsageError(f"{name} is {value}; expected at least {least}")
    return value


def threads(got: Any) -> int | None:
    """A number of threads, or None; a hundred thousand would exhaust the memory of the process."""
    if got is None:
        return None
    count = whole("threads", got, 1)
    if count > MOST_THREADS:
        raise UsageError(f"threads is {count}; expected at most {MOST_THREADS}")
    return count


def number(name: str, got: Any, expected: str) -> float:
    """``got`` as a finite float of at least 0."""
    try:
        value = math.nan if isinstance(got, bool | str) else float(got)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise refuse(name, got, expected)
    return value


def path(name: str, got: Any) -> Path:
    """``got``, a str or a path object, as a Path; an empty str would be the folder of the process."""
    if got == "" or (isinstance(got, str) and ("\0" in got or len(got) > MOST_PATH)):
        raise refuse(name, got, "a path")
    try:
        return Path(got)
    except TypeError:
        raise refuse(name, got, "a path, as str or Path") from None


def optional_path(name: str, got: Any) -> Path | None:
    """The same; None stays None."""
    return None if got is None else path(name, got)


def paths(name: str, got: Any) -> list[Path]:
    """One path, or several in a sequence, as a list."""
    if isinstance(got, str | os.PathLike):
        return [path(name, got)]
    try:
        several = None if isinstance(got, bytes) else list(got)
    except TypeError:
        several = None
    if several is None:
        raise refuse(name, got, "a path, or a list of paths") from None
    return [path(name, one) for one in several]

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

from nemoquant.errors import UsageError, brief
from nemoquant.files import MOST_NAME, plain_name

MOST_THREADS = 1024
MOST_WHOLE = (1 << 31) - 1  # of rows, tokens, sequences
MOST_BYTES = (1 << 63) - 1  # no file and no memory has more
MOST_SEED = (1 << 64) - 1
COLDEST, HOTTEST = 1e-6, 1e6  # temperatures; with others, logits overflow or vanish
MOST_PATH = 4096  # bytes: Linux takes no longer path
PathLike = str | os.PathLike[str]


def refuse(name: str, got: object, expected: str) -> UsageError:
    """The error to raise; what was got is cut to a readable length."""
    return UsageError(f"{name} is {brief(got)}; expected {expected}")


def either(words: Sequence[object]) -> str:
    """``a, b or c``."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


def both(words: Sequence[object]) -> str:
    """``a, b and c``; empty where there are none."""
    *first, last = map(str, words or [""])
    return f"{', '.join(first)} and {last}" if first else last


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


def whole(name: str, got: Any, least: int, most: int = MOST_WHOLE) -> int:
    """``got`` as an int in a range; integers of numpy are accepted, bool and float are not."""
    try:
        value = None if isinstance(got, bool) else operator.index(got)
    except TypeError:
        value = None
    if value is None:
        raise refuse(name, got, f"a whole number of at least {least}")
    if value < least:
        raise refuse(name, value, f"at least {least}")
    if value > most:
        raise refuse(name, value, f"at most {most}")
    return value


def number(name: str, got: Any, least: float, most: float) -> float:
    """``got`` as a float in a range; numbers of numpy are accepted, bool and text are not."""
    value = _real(got)
    if least <= value <= most:
        return value
    raise refuse(name, got, f"a number from {least:g} to {most:g}")


def _real(got: Any) -> float:
    """``got`` as a float; NaN, which is in no range, where it is no number."""
    try:
        return math.nan if isinstance(got, bool | str) else float(got)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def threads(got: Any) -> int | None:
    """A number of threads, or None; a hundred thousand would exhaust the memory of the process."""
    if got is None:
        return None
    return whole("threads", got, 1, MOST_THREADS)


def temperature(got: Any) -> float:
    """A temperature of the choice of tokens: 0, or a number that neither loses nor overflows logits."""
    value = _real(got)
    if value == 0 or COLDEST <= value <= HOTTEST:
        return value
    raise refuse("temperature", got, f"0 (greedy), or a number from {COLDEST:f} to {HOTTEST:,.0f}")


def home_expanded(got: str) -> str:
    """A path with ``~`` or ``~user`` at its beginning replaced; shells don't do it in quotes or after ``=``.

    Where there is no such home it is left as it is.
    """
    try:
        return os.path.expanduser(got)  # noqa: PTH111  Path's raises where there is no home
    except ValueError:  # no user has such a name: it has a NUL, or half of a surrogate pair
        return got


def path(name: str, got: Any) -> Path:
    """``got``, a str or a path object, as a Path; an empty str would be the folder of the process."""
    try:
        text = os.fspath(got)
        if not isinstance(text, str):
            raise TypeError
    except TypeError:
        raise refuse(name, got, "a path, as str or Path") from None
    text = home_expanded(text)
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        raise refuse(name, got, "a path") from None
    if not raw or b"\0" in raw or len(raw) > MOST_PATH or max(map(len, raw.split(b"/"))) > MOST_NAME:
        raise refuse(name, got, "a path")
    return Path(text)


def file_names(name: str, got: Any) -> tuple[str, ...]:
    """One name of a file in a folder, or several in a sequence, each once."""
    several = [got] if isinstance(got, str) else got
    if not isinstance(several, Sequence) or isinstance(several, bytes):
        raise refuse(name, got, "names of files")
    for each in several:
        if not isinstance(each, str) or not plain_name(each):
            raise refuse(name, each, "the name of a file in the source's folder, without a path")
    return tuple(dict.fromkeys(several))


def column_names(name: str, got: Any) -> tuple[str, ...]:
    """One name of a column, or several in a sequence, in their order."""
    several = [got] if isinstance(got, str) else got
    if not isinstance(several, Sequence) or isinstance(several, bytes):
        raise refuse(name, got, "names of columns")
    for each in several:
        if not each:
            raise refuse(name, each, "the name of a column")
        check_text(name, each, "the name of a column")
    return tuple(several)


def optional_path(name: str, got: Any) -> Path | None:
    """The same; None stays None."""
    return None if got is None else path(name, got)


def several_paths(name: str, got: Any) -> list[Any]:
    """One path, or several in a sequence, as a list of what was given; each is still to be checked."""
    if isinstance(got, str | os.PathLike):
        return [got]
    try:
        several = None if isinstance(got, bytes) else list(got)
    except TypeError:
        several = None
    if several is None:
        raise refuse(name, got, "a path, or a list of paths") from None
    return several


def paths(name: str, got: Any) -> list[Path]:
    """One path, or several in a sequence, as a list."""
    return [path(name, one) for one in several_paths(name, got)]

"""Every exception that nemoquant raises on purpose, and the exit code each one gives.

    NemoquantError                  exit 2
        UsageError                  exit 2   options that contradict each other or do not fit the input
        CheckpointError             exit 2   the source (or a checkpoint to verify) is not what it should be
            ConfigError                      config.json: unknown model, missing or contradictory keys
            HeaderError                      a safetensors file whose header cannot be trusted
            TensorTableError                 tensors missing, extra or misshapen, all in one error
            WeightError                      NaN or Inf in weights
            SourceChangedError               a file that changed while it was read
            UncomputableError                a quantized checkpoint decodes to, or computes, NaN or Inf
            HubError                         a model of the hub that is not in its cache, or can't be fetched
        RecipeError                 exit 2   a recipe that cannot be read, or that does not fit the checkpoint
        CalibrationError            exit 2   calibration text or calibration results that cannot be used
        OutputError                 exit 2   the output folder exists, overlaps the source, or has no room
        EngineError                 exit 2   a runtime refused a graph, or can't run here
        BuildError                  exit 2   the plugins can't be built or loaded: tools, headers, a compiler
        MissingExtraError           exit 3   a feature whose optional packages are not installed
        VerificationError           exit 1   a written checkpoint that does not match its plan
    KeyboardInterrupt               exit 130 Ctrl-C; Python's own, the command line gives it this exit code
        Interrupted                 exit 130 the same, and says what is left of the run and how to resume it
                                             SIGTERM and SIGHUP end a command alike, with 143 and 129
    OSError                         exit 2   of the disk or the system, where nothing better is said
    any other exception             exit 70  an error of nemoquant's own or of a library: a traceback

A message names the thing, what was got, what was expected, and what to do, in that order. It may repeat text
from files, whatever that is: as a str it is one printable line, not too long (``words.py``).
"""

from collections.abc import Callable, Sequence
from reprlib import Repr
from typing import Any

from nemoquant.words import MOST_NAME, message, plain

UNFORESEEN = 70  # exit code; EX_SOFTWARE of sysexits.h


class NemoquantError(Exception):
    """Base of all errors that carry a message for the user.

    Attributes:
        kept: what is left of the run that the error ended; part of the message.
    """

    exit_code = 2
    kept = ""

    def __str__(self) -> str:
        return message("; ".join(filter(None, (super().__str__(), self.kept))))


class UsageError(NemoquantError):
    pass


class CheckpointError(NemoquantError):
    pass


class ConfigError(CheckpointError):
    pass


class HeaderError(CheckpointError):
    pass


class TensorTableError(CheckpointError):
    pass


class WeightError(CheckpointError):
    pass


class SourceChangedError(CheckpointError):
    pass


class UncomputableError(CheckpointError):
    pass


class HubError(CheckpointError):
    pass


class RecipeError(NemoquantError):
    pass


class CalibrationError(NemoquantError):
    pass


class OutputError(NemoquantError):
    pass


class EngineError(NemoquantError):
    pass


class BuildError(NemoquantError):
    pass


class MissingExtraError(NemoquantError):
    exit_code = 3


class VerificationError(NemoquantError):
    exit_code = 1


class Interrupted(KeyboardInterrupt):
    kept = "nothing was kept"

    def __str__(self) -> str:
        return message(self.kept)


def listing(names: Sequence[object], limit: int = 5) -> str:
    """``a, b, c and 7 more``: the first ``limit`` names, because there may be thousands."""
    shown = ", ".join(plain(n, MOST_NAME) for n in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


class _Brief(Repr):
    """``repr`` in bounded time and length, whatever the value: long, deep, or with too many digits."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlong, self.maxstring, self.maxother = 3, 60, 100, 100

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out more than 4,300 digits
        return super().repr_int(x, level) if x.bit_length() < 14_000 else f"<{x.bit_length():,} bits>"


def brief(value: object) -> str:
    """A value that a file or a user gave, for a message: ``repr`` cut to a readable length."""
    text = _Brief().repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


MOST_PROBLEMS = 10_000  # of one file, of which the first is shown


def schema_problem(validate: Callable[[Any], object], data: object) -> str | None:
    """What a schema of pydantic finds wrong with ``data``, in one line; None where nothing is."""
    from pydantic import ValidationError  # slow to import

    try:
        validate(data)
    except ValidationError as error:
        return field_problem(error)
    return None


def field_problem(error: Any) -> str:
    """The first problem in pydantic's ValidationError, in one line: the key, what it held, and why."""
    if error.error_count() > MOST_PROBLEMS:  # each would be made, in order to show one
        return f"{error.error_count():,} of its values are not of the kind that they should be"
    first, more = error.errors(include_url=False)[0], error.error_count() - 1
    key = ".".join(str(part)[:80] for part in first["loc"] if part != "[key]") or "the whole"
    got = "" if first["type"] == "missing" else f" is {brief(first['input'])}"
    message = first["msg"].removeprefix("Value error, ")
    message = message.partition(" or instance of ")[0]  # a class of ours
    return f"`{key}`{got}: {message[:1].lower()}{message[1:]}" + (f", and {more:,} more" if more else "")

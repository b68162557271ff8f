"""Every exception that nemoquant raises on purpose, and the exit code each one gives.

    NemoquantError                  exit 2
        UsageError                  exit 2   options that contradict each other or do not fit the input
        CheckpointError             exit 2   the source (or a checkpoint to verify) is not what it should be
            ConfigError                      config.json: unknown model, missing or contradictory keys
            HeaderError                      a safetensors file whose header cannot be trusted
            TensorTableError                 tensors missing, extra or misshapen, all in one error
            WeightError                      NaN or Inf in weights
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

A message names the thing, what was got, what was expected, and what to do, in that order.
"""

from collections.abc import Sequence


class NemoquantError(Exception):
    """Base of all errors that carry a message for the user.

    Attributes:
        kept: what is left of the run that the error ended; part of the message.
    """

    exit_code = 2
    kept = ""

    def __str__(self) -> str:
        return "; ".join(filter(None, (super().__str__(), self.kept)))


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
        return self.kept


def listing(names: Sequence[object], limit: int = 5) -> str:
    """``a, b, c and 7 more``: the first ``limit`` names, because there may be thousands."""
    shown = ", ".join(str(n) for n in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"

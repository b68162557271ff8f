"""Where the data shipped with the code are: in the installed package, or in the source tree."""

import os
from pathlib import Path

MIX = "mix"  # in place of a path: prose, code, mathematics and conversations, interleaved
_PACKAGE = Path(__file__).resolve().parent


def _shipped(name: str) -> Path:
    return next(path for path in (_PACKAGE / name, _PACKAGE.parent / name) if path.is_dir())


def recipe_folder() -> Path:
    """The folder of the shipped recipes."""
    return _shipped("calib/recipes")


def calibration_data(given: Path | None = None) -> Path:
    """The file with the text for calibration: ``given``, or a shipped one where that is None or ``MIX``."""
    return _text(given, "calibration.jsonl", "mix.jsonl")


def evaluation_data(given: Path | None = None) -> Path:
    """The same for evaluation; the shipped ones share no work and no package with those for calibration."""
    return _text(given, "evaluation.jsonl", "mix_evaluation.jsonl")


def _text(given: Path | None, default: str, mix: str) -> Path:
    """What is on the disk under ``given`` comes first, so that the word never hides a file."""
    if given is not None and (str(given) != MIX or os.path.lexists(given)):
        return given
    return _shipped("calib/data") / (default if given is None else mix)


def demo_model() -> Path:
    """The folder of the trained demo model."""
    return _shipped("calib/demo_model")


def plugin_folder() -> Path:
    """``plugins/``: sources and specifications of the compiled operators."""
    return _shipped("plugins")

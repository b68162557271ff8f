"""Where the data shipped with the code are: in the installed package, or in the source tree."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _shipped(name: str) -> Path:
    return next(path for path in (_PACKAGE / name, _PACKAGE.parent / name) if path.is_dir())


def recipe_folder() -> Path:
    """The folder of the shipped recipes."""
    return _shipped("calib/recipes")


def calibration_data() -> Path:
    """The file with the text for calibration."""
    return _shipped("calib/data") / "calibration.jsonl"


def evaluation_data() -> Path:
    """The file with the text for evaluation; its works are not those of the calibration text."""
    return _shipped("calib/data") / "evaluation.jsonl"


def demo_model() -> Path:
    """The folder of the trained demo model."""
    return _shipped("calib/demo_model")


def plugin_folder() -> Path:
    """``plugins/``: sources and specifications of the compiled operators."""
    return _shipped("plugins")

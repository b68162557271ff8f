"""The report's files: checked before the work starts, written completely or not at all after it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemoquant.errors import OutputError, UsageError
from nemoquant.evaluate.report.markdown import markdown
from nemoquant.evaluate.schema import Report
from nemoquant.files import replace_text


def check_files(files: Mapping[str, Path | None], checkpoints: Sequence[Path] = ()) -> None:
    """Make sure that the files (kind -> path, None is not wanted) can be written.

    Args:
        checkpoints: folders that no report may be written into.
    Raises:
        OutputError: a folder is missing, not writable or a checkpoint, or a path is a folder; UsageError for
            the same name twice.
    """
    wanted = [path for path in files.values() if path is not None]
    for i, path in enumerate(wanted):
        folder = path.absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(
                f"{path}: {folder} is not a folder that can be written; make it, or choose another place"
            )
        if folder.resolve() in [checkpoint.resolve() for checkpoint in checkpoints]:
            raise OutputError(
                f"{path}: {folder} is a checkpoint, whose files are listed in its manifest; choose another "
                f"place"
            )
        if path.is_dir():
            raise OutputError(f"{path} is a folder; expected a file name")
        if path.absolute() in [other.absolute() for other in wanted[:i]]:
            raise UsageError(f"{path} is given for two reports; expected a file for each")


def write_files(report: Report, files: Mapping[str, Path | None]) -> None:
    """Write those of ``html``, ``json`` and ``markdown`` that are wanted; existing files are replaced.

    Raises:
        OutputError: one can't be written.
    """
    for kind, path in files.items():
        if path is None:
            continue
        try:
            replace_text(path, _text(kind, report))
        except OSError as error:
            raise OutputError(
                f"{path}: {error.strerror or error}; the report can't be written there"
            ) from None


def _text(kind: str, report: Report) -> str:
    if kind == "html":
        from nemoquant.evaluate.report.html import render

        return render(report)
    return report.dump() if kind == "json" else markdown(report)

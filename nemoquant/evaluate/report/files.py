"""The report's files: checked before the work starts, written completely or not at all after it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemoquant.errors import OutputError, UsageError
from nemoquant.evaluate.report.markdown import markdown
from nemoquant.evaluate.schema import Report
from nemoquant.files import is_stream, why_not_written, write_named

CACHE = "reference cache"  # a kind of file that a diff writes


def check_files(files: Mapping[str, Path | None], checkpoints: Sequence[Path] = ()) -> None:
    """Make sure that the files (kind -> path, None is not wanted) can be written.

    Args:
        checkpoints: folders that no report may be written into.
    Raises:
        OutputError: a folder is missing, not writable or a checkpoint, or a path is a folder or what must not
            be replaced; UsageError for the same name twice.
    """
    wanted: list[Path] = []
    for kind, path in files.items():
        if path is None:
            continue
        if path.is_dir():
            raise OutputError(f"{path} is a folder; expected a file name")
        # a cache that is there is only read, through a link too
        reason = None if kind == CACHE and path.exists() else why_not_written(path)
        if reason:
            raise OutputError(f"{path}: {reason}")
        if is_stream(path):
            continue
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
        if path.absolute() in [other.absolute() for other in wanted]:
            raise UsageError(f"{path} is given for two reports; expected a file for each")
        wanted.append(path)


def write_files(report: Report, files: Mapping[str, Path | None]) -> None:
    """Write those of ``html``, ``json`` and ``markdown`` that are wanted.

    Existing files are replaced; pipes and devices are written to.

    Raises:
        OutputError: one can't be written.
    """
    for kind, path in files.items():
        if path is None:
            continue
        try:
            write_named(path, _text(kind, report).encode())
        except OSError as error:
            raise OutputError(
                f"{path}: {error.strerror or error}; the report can't be written there"
            ) from None


def _text(kind: str, report: Report) -> str:
    if kind == "html":
        from nemoquant.evaluate.report.html import render

        return render(report)
    return report.dump() if kind == "json" else markdown(report)

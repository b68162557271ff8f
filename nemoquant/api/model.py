"""The model that a caller of the Python API names: a path, or a name on the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from nemoquant import arguments
from nemoquant.arguments import PathLike
from nemoquant.bars import shown
from nemoquant.progress import Progress
from nemoquant.sources.hub import ALL, Wanted
from nemoquant.sources.located import located


def found(
    argument: str,
    given: PathLike,
    wanted: Wanted = ALL,
    *,
    download: bool,
    say: Callable[[str], None] | None,
    progress: Progress | Literal[False] | None = None,
) -> Path:
    """See :func:`nemoquant.sources.located.located`; a download shows its progress as the call does."""
    arguments.check_flags(download=download)
    arguments.check_functions(say=say)
    with shown(progress) as report:
        return located(
            argument, given, wanted, download=download, say=say or (lambda text: None), progress=report
        )

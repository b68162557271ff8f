"""Who shows progress: bars in a terminal or a notebook, plain lines elsewhere.

The command line and the Python API show the same bars.
"""

import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

from nemoquant.arguments import refuse
from nemoquant.notebook import in_notebook
from nemoquant.progress import Progress, no_progress
from nemoquant.units import duration
from nemoquant.words import MOST_NAME, plain

SHOW_AFTER = 2.0  # seconds: shorter work shows no bar
PLAIN_EVERY = 60.0  # seconds between lines where there is no terminal


def shown(progress: Progress | Literal[False] | None) -> AbstractContextManager[Progress]:
    """The Progress for a call of the Python API, as a context manager.

    Args:
        progress: None shows bars in a terminal or a notebook, and nothing elsewhere; False shows nothing; a
            function is called.
    Raises:
        UsageError: it is something else.
    """
    if progress is None:
        return _automatic()
    if progress is not False and not callable(progress):
        raise refuse("progress", progress, "None (shown in a terminal or notebook), False or a function")
    return nullcontext(no_progress if progress is False else progress)


@contextmanager
def _automatic() -> Iterator[Progress]:
    if in_notebook():
        if importlib.util.find_spec("ipywidgets"):  # what rich draws its bars in
            with _bars(notebook=True) as report:
                yield report
        else:
            yield _plain()
    elif _terminal():
        with _bars() as report:
            yield report
    else:
        yield no_progress


def _terminal() -> bool:
    """Whether standard error is a terminal; a process may have none at all (``2>&-``, a service)."""
    return sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Progress]:
    """Yields the Progress of a command.

    On a terminal it draws bars; elsewhere it prints a plain line a stage when that is over, and one a minute
    before.
    """
    if quiet or sys.stderr is None:
        yield no_progress
    elif not _terminal():
        yield _plain()
    else:
        with _bars() as report:
            yield report


@contextmanager
def _bars(notebook: bool = False) -> Iterator[Progress]:
    """One rich bar a stage, once the work has lasted ``SHOW_AFTER`` seconds; on standard error, or in the
    cell."""
    import rich.progress
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    began = time.monotonic()
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.percentage:>4.0f}%"),
        TimeElapsedColumn(),
    )
    bars = rich.progress.Progress(
        *columns,
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}", markup=False),
        console=Console(force_jupyter=True) if notebook else Console(stderr=True),
        transient=True,
    )
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int, what: str) -> None:
        what = plain(what, MOST_NAME)
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, what=what)
        elif done < total and bars.tasks[tasks[stage]].finished:
            bars.reset(tasks[stage])  # the demo has each stage once for every preset
        bars.update(tasks[stage], completed=done, total=total, what=what)
        if not bars.live.is_started and time.monotonic() - began > SHOW_AFTER:
            bars.start()

    try:
        yield report
    finally:
        if bars.live.is_started:
            bars.stop()


def _plain() -> Progress:
    """Prints a line each ``PLAIN_EVERY`` seconds, and one at the end of a stage."""
    began: dict[str, tuple[float, int]] = {}  # when, and what was done by then: a resumed run begins late
    finished: set[str] = set()
    last_line = time.monotonic()

    def report(stage: str, done: int, total: int, what: str) -> None:
        nonlocal last_line
        now = time.monotonic()
        if done < total and stage in finished:  # once more: the demo has each stage for every preset
            finished.discard(stage)
            del began[stage]
        start, before = began.setdefault(stage, (now, done))
        if done >= total and stage not in finished:
            finished.add(stage)
            print(f"{stage}: done in {duration(now - start)}", file=sys.stderr, flush=True)
        elif done < total and now - last_line > PLAIN_EVERY:
            last_line = now
            text = f"{stage}: {done / total:.0%}" + (f", {plain(what, MOST_NAME)}" if what else "")
            if done > before:
                text += f", about {duration((now - start) * (total - done) / (done - before))} left"
            print(text, file=sys.stderr, flush=True)

    return report

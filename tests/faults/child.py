"""Runs a command of nemoquant in a forked child, which may be killed or meet a full disk.

The parent has loaded all modules by then, and no thread runs in it: a child takes a fraction of a second.
"""

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.commands import invoke

from nemoquant.errors import UNFORESEEN

from . import watch
from .watch import Aim

LONGEST = 120  # seconds of a child


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit code; minus the signal that killed it.
        points: that it passed; 0 where it was killed.
        log: of its events, where one was wanted.
    """

    code: int
    out: str
    err: str
    points: int = 0
    log: bytes = b""

    @property
    def errors(self) -> list[str]:
        """The lines of standard error that are errors."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    def refusal(self, code: int = 2) -> list[str]:
        """What is not as in a refusal: this exit code, and one line that says why."""
        if self.code != code or len(self.errors) != 1 or "Traceback" in self.err:
            return [f"expected exit {code} and one line of error, got {self.code}: {tail(self.err)}"]
        return []

    def success(self) -> list[str]:
        """What is not as in a success."""
        return [] if self.code == 0 and not self.errors else [f"exit {self.code}: {tail(self.err)}"]


def tail(text: str) -> str:
    """The last of a text, in one line."""
    return " / ".join(text.split("\n"))[-600:]


def here(*arguments: object) -> None:
    """Run ``nemoquant ARGUMENTS`` in this process; it must succeed, and leave no thread behind."""
    result = invoke(*arguments)
    assert result.exit_code == 0, (arguments, result.output, result.exception)
    until = time.monotonic() + 5  # a thread that was waited for takes a moment until the system has ended it
    while (threads := len(list(Path("/proc/self/task").iterdir()))) > 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert threads == 1, f"{threads} threads: forks are not safe with more than one"


def nemoquant(*arguments: object, **how: Any) -> Ended:
    """Run ``nemoquant ARGUMENTS`` in a child; for the rest see :func:`call`."""
    return call(main_of(arguments), **how)


def main_of(arguments: Sequence[object]) -> Callable[[], None]:
    """``nemoquant ARGUMENTS`` as a function for a child."""

    def main() -> None:
        from nemoquant.cli import main

        main([str(argument) for argument in arguments], prog_name="nemoquant")

    return main


def call(
    function: Callable[[], object],
    *,
    root: Path | None = None,
    aim: Aim = Aim(),  # noqa: B008  frozen
    log: bool = False,
    before: Callable[[], object] = lambda: None,
    meanwhile: Callable[[], object] = lambda: None,
) -> Ended:
    """Run a function in a child, watched below ``root`` if there is one.

    Args:
        log: keep its events.
        before: called in the child first.
        meanwhile: called here while the child is stopped at its point.
    """
    assert threading.active_count() == 1, "a fork with threads is not safe"
    streams = [os.memfd_create(name) for name in ("out", "err", "log", "points")]
    pid = os.fork()
    if pid == 0:
        _child(function, streams, root, aim, log, before)
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        meanwhile()
        os.kill(pid, signal.SIGCONT)
        _, status = os.waitpid(pid, 0)
    texts = []
    for stream in streams:
        with os.fdopen(stream, "rb") as f:
            f.seek(0)
            texts.append(f.read())
    out, err, events, points = texts
    return Ended(
        os.waitstatus_to_exitcode(status),
        out.decode(errors="replace"),
        err.decode(errors="replace"),
        json.loads(points or "0"),
        events,
    )


def start(function: Callable[[], object], root: Path, out: int, err: int) -> int:
    """Begin a child that is watched below ``root``, and do not wait for it; returns its process id."""
    pid = os.fork()
    if pid == 0:
        _child(function, [out, err, -1, os.memfd_create("points")], root, Aim(), False, lambda: None)
    return pid


def _child(
    function: Callable[[], object],
    streams: Sequence[int],
    root: Path | None,
    aim: Aim,
    log: bool,
    before: Callable[[], object],
) -> None:
    out, err, events, points = streams
    code = UNFORESEEN
    try:
        signal.alarm(LONGEST)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), write_through=True)
        before()
        if root is not None:
            watch.arm(root, aim, events if log else -1)
        function()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            if root is not None:
                passed = watch.count()
                watch.disarm()
                os.write(points, str(passed).encode())
        os._exit(code)

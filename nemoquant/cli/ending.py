"""How a command ends: after Ctrl-C and other signals, and when who reads its output has gone."""

import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

import click

from nemoquant import words
from nemoquant.errors import UNFORESEEN

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 5.0  # seconds after a signal in which another one changes nothing: it would hit the cleaning up


def open_streams() -> None:
    """Standard streams that are closed (``2>&-``) lead to /dev/null from now on.

    Else the next file that is opened has their descriptor, and in it stands what a library has to say.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Never closed; it gets the lowest number that is free, which is that of the stream.
            stream = Path(os.devnull).open(mode)  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


class Ending:
    """Signals become a KeyboardInterrupt, so that all clean up as after Ctrl-C; a context manager.

    A signal that is ignored, as under nohup, stays ignored. Signals after the first one are raised again only
    when cleaning up takes long. If a write found that nobody reads standard output or standard error any
    more, the process ends by SIGPIPE, silently, as other tools do: ``nemoquant ... | head``.
    """

    def __init__(self, *, program: bool) -> None:
        """``program``: whether the process ends with the command; its exit is then kept from signals too."""
        self._program, self._cut_off = program, False
        self._at = -GRACE
        self._before: dict[int, signal._HANDLER] = {}
        self._streams: list[int] = []
        self.signal: signal.Signals | None = None  # the one that ended the command

    def __enter__(self) -> "Ending":
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._stop)
            self._before[signal.SIGPIPE] = signal.signal(signal.SIGPIPE, self._broken)
            for stream in (1, 2):  # rich puts another file in the place of one that nobody reads
                with suppress(OSError):
                    self._streams.append(os.dup(stream))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, or none at all
                stream.flush()
        if self.unread:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGPIPE)
        for descriptor in self._streams:
            os.close(descriptor)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._program else handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        now = time.monotonic()
        if now - self._at < GRACE:
            return
        self.signal, self._at = self.signal or signal.Signals(number), now
        raise KeyboardInterrupt

    def _broken(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._cut_off = True

    @property
    def unread(self) -> bool:
        """Whether a write found a pipe without a reader, and standard output or error is one."""
        poll = select.poll()
        for descriptor in self._streams:
            poll.register(descriptor, 0)
        return self._cut_off and any(event & select.POLLERR for _, event in poll.poll(0))

    def interrupted(self, error: BaseException, *, makes: bool) -> NoReturn:
        """End after a signal, with the exit code that shells give it.

        Args:
            makes: whether the command makes something; then the line says what is left of it.
        """
        name = "" if self.signal in (None, signal.SIGINT) else f" by {self.signal.name}"
        kept = [found for e in _chain(error) if (found := getattr(e, "kept", ""))]
        left = f"; {kept[0] if kept else 'nothing was kept'}" if makes else ""
        self.failed(f"interrupted{name}{left}", 128 + (self.signal or signal.SIGINT))

    def unforeseen(self, error: Exception) -> NoReturn:
        """End after an error that nobody expected, with its traceback; not with 1, a check that failed."""
        if not self.unread:
            with suppress(OSError):
                click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
        what = f"{type(error).__name__}, which nemoquant did not expect"
        self.failed(f"{what}; please report it with the lines above", UNFORESEEN)

    def failed(self, message: str, code: int) -> NoReturn:
        """End with a line on standard error; with SIGHUP its terminal may be gone."""
        if not self.unread:
            with suppress(OSError):
                click.echo(f"error: {words.message(message)}", err=True)
        sys.exit(code)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, then those that it was raised from or after."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

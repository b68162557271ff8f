"""Runs Python programs in separate processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Collection

Done = subprocess.CompletedProcess[str]


def run_python(program: str, *arguments: object, code: int = 0, **environment: str) -> Done:
    """Runs a program's text with ``sys.argv[1:]`` and these variables; it must end with ``code``."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-4000:]
    return done


def listening(ignored: Collection[signal.Signals] = ()) -> None:
    """For a new process, before it starts: signals act as from a terminal, but for those to be ignored.

    What runs in the background or under nohup inherits ignored ones, and so may this test run.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

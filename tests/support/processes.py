"""Runs Python programs in separate processes."""

import os
import subprocess
import sys

Done = subprocess.CompletedProcess[str]


def run_python(program: str, *arguments: object, code: int = 0, **environment: str) -> Done:
    """Runs a program's text with ``sys.argv[1:]`` and these variables; it must end with ``code``."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-4000:]
    return done

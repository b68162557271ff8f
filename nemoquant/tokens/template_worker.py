"""Renders a chat template in a process of its own: a template is a stranger's program.

A script, not a module of the package: it imports nothing of it, so that it starts in 0.1 s and 20 MB.
``tokens/template.py`` starts it, and has the reasons.

One object of JSON a line on standard input: first the template's source, the variables and the limits, then
messages as often as wanted. One object a line on standard output for each: ``text``, or ``refused`` with
jinja's reason, or ``beyond`` with the limit that was reached. A time that is over ends the process, even in
the middle of a multiplication: the timers' signals are left to the system.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_REASON = 2000  # characters of an error's text


def _limit_memory(more: int) -> None:
    """Leave this process ``more`` bytes of address space beyond what it has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _answer(make: Callable[[], str], most: int) -> bytes:
    try:
        text = make()
        data = {"text": text} if len(text) <= most else {"beyond": "characters"}
        return json.dumps(data).encode("ascii")
    except MemoryError:
        return b'{"beyond": "memory"}'
    except Exception as error:  # a template is a program, it or jinja can raise anything
        return json.dumps({"refused": str(error)[:MOST_REASON]}).encode("ascii")


def main() -> None:
    asked, answers = sys.stdin.buffer, sys.stdout.buffer
    first = json.loads(asked.readline())
    sys.path += first["path"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then closes the pipe
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    # As in transformers: `break` and `continue` exist, and JSON is not escaped for HTML.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    variables: dict[str, Any] = first["variables"] | {"raise_exception": refuse}
    template: Any = None

    def compiled() -> str:
        nonlocal template
        template = environment.from_string(first["template"])
        return ""

    def reply(make: Callable[[], str]) -> None:
        signal.setitimer(signal.ITIMER_PROF, first["processor_seconds"])
        signal.setitimer(signal.ITIMER_REAL, first["seconds"])
        answers.write(_answer(make, first["characters"]) + b"\n")
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.flush()

    _limit_memory(first["memory"])
    reply(compiled)
    for line in asked:
        reply(lambda: template.render(messages=json.loads(line), **variables))  # noqa: B023  called at once


if __name__ == "__main__":
    main()

"""Renders a chat template in a process of its own: a template is a stranger's program.

A script, not a module of the package: it imports nothing of it, so that it starts in 0.1 s and 20 MB.
``tokens/template.py`` starts it, and has the reasons.

One object of JSON a line on standard input: first the template's source, the variables and the limits, then
messages as often as wanted. One object a line on standard output for each: ``text``, or ``refused`` with
jinja's reason, or ``beyond`` with the limit that was reached. A time that is over ends the process, even in
the middle of a multiplication: the timers' signals are left to the system. The text is UTF-8, of at most six
bytes a character (``\\u0000``).
"""

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

MOST_REASON = 2000  # characters of an error's text


def _limit_memory(more: int) -> None:
    """Leave this process ``more`` bytes of address space beyond what it has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + more)


def _limit(kind: int, most: int) -> None:
    """Set a limit of this process, or leave a lower one that it has."""
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, hard))


def _answer(make: Callable[[], str], most: int) -> bytes:
    try:
        text = make()
        data = {"text": text} if len(text) <= most else {"beyond": "characters"}
        return json.dumps(data, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except MemoryError:
        return b'{"beyond": "memory"}'
    except Exception as error:  # a template is a program, it or jinja can raise anything
        return json.dumps({"refused": str(error)[:MOST_REASON]}).encode("ascii")


def main() -> None:
    asked, answers = sys.stdin.buffer, sys.stdout.buffer
    first = json.loads(asked.readline())
    sys.path += first["path"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then closes the pipe
    for limit in (signal.SIGPROF, signal.SIGALRM, signal.SIGXCPU):  # they are inherited ignored, or blocked
        signal.signal(limit, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what the model says; the text is the same."""

        tags = {"generation"}  # noqa: RUF012  as jinja declares it

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller: Callable[[], str]) -> str:
            return caller()

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    # As in transformers: `break` and `continue` exist, and JSON is not escaped for HTML.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    variables: dict[str, Any] = first["variables"] | {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
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
    _limit(resource.RLIMIT_CPU, first["all_processor_seconds"])
    reply(compiled)
    for line in asked:
        reply(lambda: template.render(messages=json.loads(line), **variables))  # noqa: B023  called at once


if __name__ == "__main__":
    main()

"""Renders a chat template in a process of its own: a template is a stranger's program.

A script, not a module of the package: it imports nothing of it, so that it starts in 0.1 s and 20 MB.
``tokens/template.py`` starts it, and has the reasons.

One object of JSON a line on standard input: first the limits, then as often as wanted a template's
``source`` under a ``name``, or ``variables`` for the template of a ``name``. One object a line on standard
output for each of the latter: ``text``, or ``refused`` with jinja's reason, or ``beyond`` with the limit that
was reached; the text for a source says whether the template takes lists as content (``parts``). A time that
is over ends the process, even in the middle of a multiplication: the timers' signals are left to the system.
The text is UTF-8, of at most six bytes a character (``\\u0000``).
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


def takes_parts(tree: Any, nodes: Any) -> bool:
    """Whether a template goes through the parts of a content that is a list, as vLLM finds it out.

    It has a loop over ``content``, or over a name that was given it.
    """
    names = {"content"}

    def is_content(node: Any) -> bool:
        if isinstance(node, nodes.Filter | nodes.Test):
            return node.node is not None and is_content(node.node)
        if isinstance(node, nodes.Getattr):
            return bool(node.attr in names)
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value in names
        if isinstance(node, nodes.CondExpr):
            return is_content(node.expr1) or (node.expr2 is not None and is_content(node.expr2))
        return isinstance(node, nodes.Name) and node.name in names

    for assigned in tree.find_all(nodes.Assign):
        if is_content(assigned.node):
            if isinstance(assigned.target, nodes.Name):
                names.add(assigned.target.name)
            elif isinstance(assigned.target, nodes.NSRef):
                names.add(assigned.target.attr)
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For))


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
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    templates: dict[str, Any] = {}

    def answer(asked: dict[str, Any]) -> str:
        if "source" in asked:
            templates[asked["name"]] = environment.from_string(asked["source"])
            return "parts" if takes_parts(environment.parse(asked["source"]), nodes) else ""
        text: str = templates[asked["name"]].render(**asked["variables"])
        return text

    _limit_memory(first["memory"])
    _limit(resource.RLIMIT_CPU, first["all_processor_seconds"])
    for line in asked:
        signal.setitimer(signal.ITIMER_PROF, first["processor_seconds"])
        signal.setitimer(signal.ITIMER_REAL, first["seconds"])
        text = _answer(lambda: answer(json.loads(line)), first["characters"])  # noqa: B023  called at once
        answers.write(text + b"\n")
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.flush()


if __name__ == "__main__":
    main()

"""Makes docs/api.md from the docstrings: ``python docs/make_api.py``. A test holds the page equal to it."""

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any, get_args

import nemoquant
from nemoquant.converting import Target
from nemoquant.engine import EngineName, TargetName
from nemoquant.formats import Device
from nemoquant.graph import Compute, DialectName
from nemoquant.run.options import Dtype, Where

PAGE = Path(__file__).with_name("api.md")
INTRO = """\
# Python API

Made from the docstrings by `python docs/make_api.py`.

Every path may be a str or a Path. A wrong word or an impossible number is a `UsageError` that says what was
got and what is known; all errors are in the [list below](#errors). Nothing is printed but, in a terminal or a
notebook, progress (`progress=False` is quiet); warnings are in the results. Results have a short `repr`;
plans, results, estimates and reports are tables in a notebook. No call leaves torch's number of threads or
the environment of its process changed.

```python
{example}
```
"""
PROGRESS = """\
## Progress

A function that is called with a stage, what is done of it, its total, and the name of the current piece of
work; at the end with done equal to total. `no_progress` is one that does nothing.
"""
NOTES = {"Report": "How to read it: [diff.md](diff.md); each figure: [diff.schema.json](diff.schema.json).\n"}
WORDS = {
    "Target": Target,
    "EngineName": EngineName,
    "TargetName": TargetName,
    "DialectName": DialectName,
    "Compute": Compute,
    "Device": Device,
    "Dtype": Dtype,
    "Where": Where,
}
WIDTH = 100  # of a signature in one line


def page() -> str:
    """The whole page."""
    public = {name: getattr(nemoquant, name) for name in nemoquant.__all__ if name != "__version__"}
    functions = {n: f for n, f in public.items() if inspect.isfunction(f) and n != "no_progress"}
    classes = {n: c for n, c in public.items() if inspect.isclass(c) and not issubclass(c, BaseException)}
    errors = inspect.getdoc(inspect.getmodule(nemoquant.NemoquantError)) or ""
    parts = [INTRO.format(example=example(inspect.getdoc(nemoquant) or ""))]
    parts += ["## Functions\n", *(function_part(name, function) for name, function in functions.items())]
    parts += ["## Options and results\n", *(class_part(name, kind) for name, kind in classes.items())]
    parts += ["## Words\n", "| type | words |\n|---|---|"]
    parts += [
        f"| `{name}` | {', '.join(f'`{word}`' for word in get_args(kind))} |" for name, kind in WORDS.items()
    ]
    parts += ["", PROGRESS]
    parts += [f"## Errors\n\n{marked(errors.split(chr(10) * 2)[0])}\n\n{block(tree(errors))}"]
    parts += [marked(errors.split("\n\n")[-1]) + "\n"]
    return "\n".join(parts)


def example(doc: str) -> str:
    """The lines of a docstring that begin with >>>."""
    lines = [line.strip()[4:] for line in doc.splitlines() if line.strip().startswith(">>> ")]
    return "\n".join([lines[0], "", *lines[1:]])  # a blank line after the import


def tree(doc: str) -> str:
    """The indented part of a docstring."""
    return textwrap.dedent("\n".join(line for line in doc.splitlines() if line.startswith("    ")))


def block(code: str) -> str:
    return f"```\n{code}\n```\n"


def function_part(name: str, function: Any) -> str:
    return f"### {name}\n\n```python\n{signature(function)}\n```\n\n{text(inspect.getdoc(function) or '')}\n"


def definition(thing: Any) -> Any:
    """The definition of a function or class as it is written."""
    return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]


def signature(function: Any) -> str:
    """A function's signature as it is written, an argument a line where it is long."""
    node = definition(function)
    arguments, result = node.args, written(node.returns)
    items, plain = [], [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    items += [argument(a, d) for a, d in zip(plain, defaults, strict=True)]
    if arguments.kwonlyargs:
        items.append("*")
    items += [argument(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg is not None:
        items.append(f"**{argument(arguments.kwarg, None)}")
    line = f"{node.name}({', '.join(items)}) -> {result}"
    if len(line) <= WIDTH:
        return line
    return f"{node.name}(\n" + "".join(f"    {item},\n" for item in items) + f") -> {result}"


def argument(node: ast.arg, default: ast.expr | None) -> str:
    shown = f"{node.arg}: {written(node.annotation)}"
    return shown if default is None else f"{shown} = {code(default)}"


def code(node: ast.expr) -> str:
    """An expression with the quotes that this repository has."""
    return ast.unparse(node).replace("'", '"')


def written(annotation: ast.expr | None) -> str:
    """An annotation without the quotes of a name that is not loaded yet."""
    return "" if annotation is None else re.sub(r'"(\w+)"(?=[\],]|$)', unquoted, code(annotation))


def unquoted(match: re.Match[str]) -> str:
    return match[1] if match[1][0].isupper() else match[0]  # words of a Literal keep theirs


def class_part(name: str, kind: Any) -> str:
    """A class: its docstring, its fields, and what else of it is public."""
    node = definition(kind)
    fields = [
        f"{n.target.id}: {written(n.annotation)}" + (f" = {code(n.value)}" if n.value else "")
        for n in node.body
        if isinstance(n, ast.AnnAssign) and "InitVar" not in ast.unparse(n.annotation)
    ]
    parts = [
        f"### {name}\n",
        f"```python\n{chr(10).join(fields)}\n```\n",
        text(inspect.getdoc(kind) or "") + "\n",
    ]
    parts += [NOTES[name]] if name in NOTES else []
    members = [
        f"- `{n.name}{'' if is_property(n) else '()'}`: {marked(first_line(n))}"
        for n in node.body
        if isinstance(n, ast.FunctionDef) and not n.name.startswith("_") and ast.get_docstring(n)
    ]
    return "\n".join(parts + (["**Methods and properties**\n", *members, ""] if members else []))


def first_line(node: ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").splitlines()[0]


def is_property(node: ast.FunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def text(doc: str) -> str:
    """A docstring as Markdown: sections in bold, their entries as a list."""
    lines, section = [], ""
    for line in doc.splitlines():
        header = re.fullmatch(r"(Args|Attributes|Raises|Returns):", line)
        if header:
            section = header[1]
            lines += ["", f"**{section}**", ""]
        elif not section or not line.startswith("    "):
            section = "" if line else section
            lines.append(marked(line))
        elif section in ("Args", "Attributes"):
            entry = re.fullmatch(r"    (\w[\w, ]*): (.*)", line)
            lines.append(f"- `{entry[1]}`: {marked(entry[2])}" if entry else "  " + marked(line.strip()))
        else:
            lines.append(marked(line.strip()))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def marked(line: str) -> str:
    """reStructuredText's code and references as Markdown's."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", line).replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""Text out of files: source code, docstrings, pages of documentation; about ``PIECE`` characters a piece."""

import ast
import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser

from clean import tidy

PIECE = 2_200  # characters: two or three rows of 512 tokens with a small vocabulary, one with a large one
LEAST = 400  # of a piece
FORMULAS = re.compile(r":math:|\.\. math::|\\(?:frac|sum|int|sqrt|alpha|beta|lambda|pi|left)\b|\*\*|\^")
DIRECTIVE = re.compile(  # with what is indented below it
    r"^ *\.\. (?:_|\||\[|[a-z-]*(?:auto|module|contents|only|index|highlight|current|toctree|plot|image|"
    r"figure|version|deprecated|testsetup|doctest|include|raw|seealso))"
    r"[^\n]*(?:\n[ \t]+[^\n]*|\n(?=\n[ \t]))*",
    re.MULTILINE,
)
REFERENCES = re.compile(r"\n(References|See Also)\n[-=]+\n.*?(?=\n[^\n]+\n[-=]{4,}\n|\Z)", re.DOTALL)
HEADING = re.compile(r"^(?P<title>\S[^\n]*)\n(?P<line>([=\-~^\"'`#*+])\3{3,})[ \t]*$", re.MULTILINE)


def joined(blocks: Iterable[str]) -> Iterator[str]:
    """Blocks put together to pieces; a block that is far too long is left out, as are remnants."""
    piece = ""
    for block in [*blocks, ""]:
        if piece and (not block or len(piece) + len(block) > PIECE):
            if LEAST <= len(piece) <= 1.5 * PIECE:
                yield piece
            piece = ""
        if block:
            piece += ("\n\n" if piece else "") + block


def code(text: str) -> Iterator[str]:
    """Source code in whole top-level blocks: a cut is before a line that is not indented."""
    yield from joined(re.split(r"\n\n+(?=[^\s)}\]])", tidy(text)))


def docstrings(text: str) -> Iterator[str]:
    """Docstrings of a Python file that speak in formulas, without their lists of references."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            doc = tidy(ast.get_docstring(node) or "")
            doc = REFERENCES.sub("", doc)
            if len(FORMULAS.findall(doc)) >= 4:
                yield from (piece for piece in joined(doc.split("\n\n")) if FORMULAS.search(piece))


def mathematics(text: str) -> Iterator[str]:
    """Pages of documentation, the parts with formulas."""
    yield from (piece for piece in joined(page(text).split("\n\n")) if len(FORMULAS.findall(piece)) >= 3)


def prose(text: str) -> Iterator[str]:
    """Pages of documentation whose lines are mostly sentences."""
    for piece in joined(page(text).split("\n\n")):
        lines = [line for line in piece.splitlines() if line]
        if sum(len(line) > 50 and not line.startswith((" ", "*", ":", "..")) for line in lines) > 0.6 * len(
            lines
        ):
            yield piece


def page(text: str) -> str:
    """reStructuredText or Markdown as people read it: no directives without content, no roles, no targets."""
    text = DIRECTIVE.sub("", text)
    text = re.sub(r"^:[A-Za-z -]+:(?: .*)?$", "", text, flags=re.MULTILINE)
    text = re.sub(r":(?!math)[a-z:+]+:`[~!.]?(?:_\w+\.)?([^`<]+?)(?: *<[^`]*>)?`", r"`\1`", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]+>`_+", r"\1", text)
    text = re.sub(
        r"`([^`]+)`_+|(?<!\w)([A-Za-z]\w*[A-Za-z0-9])_(?!\w)", lambda found: found[1] or found[2], text
    )
    return tidy(text)


class _Text(HTMLParser):
    """The text of an HTML page from its first heading on, blocks apart by empty lines."""

    BLOCKS = frozenset(
        ["p", "h1", "h2", "h3", "h4", "li", "ol", "ul", "table", "tr", "blockquote", "pre", "div"]
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.heading, self.hidden, self.literal = False, 0, False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self.heading = self.heading or tag == "h1"
        self.hidden += tag in ("script", "style", "svg")
        self.literal = self.literal or tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style", "svg")
        self.literal = self.literal and tag != "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if self.heading and not self.hidden:
            self.parts.append(data if self.literal else re.sub(r"\s+", " ", data))


def html(text: str) -> str:
    """The text of an HTML page."""
    parser = _Text()
    parser.feed(text)
    return tidy(re.sub(r"^ +", "", "".join(parser.parts), flags=re.MULTILINE))

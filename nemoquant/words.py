"""Text from elsewhere, made safe to show: a name, a value or a message may hold anything.

A terminal obeys escape sequences, an editor and a browser the marks that turn the direction of writing, a
line of a log ends where the text says so, and Markdown makes headings and HTML of it. Here such characters
become visible: a newline is shown as ``\\n``, an escape as ``\\x1b``, half of a surrogate pair as
``\\ud800``.
"""

import re

MOST_NAME = 300  # characters of one name in a list, or of one value
MOST_WORD = 1000  # of what has no space in it, such as a path
MOST_MESSAGE = 4000

_LONG_WORD = re.compile(rf"\S{{{MOST_WORD + 1},}}")
# Not the underscores inside of names, which emphasize nothing.
_MARKUP = re.compile(r"[\\`*\[\]<>|~$]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])")
_BLOCK = re.compile(r"^(?:[#+=-]|\d+(?=[.)]))")  # a heading, a list, a line: only at the beginning
_DANGEROUS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: object, most: int = MOST_MESSAGE) -> str:
    """``text`` in one line of at most ``most`` printable characters; of a long one the middle is left out."""
    kept = _shortened(str(text), most)
    if kept.isprintable():
        return kept
    return _shortened("".join(c if c.isprintable() else _visible(c) for c in kept), most)


def message(text: str) -> str:
    """The same for a message, of which no single word may be longer than ``MOST_WORD`` either."""
    return plain(_LONG_WORD.sub(lambda word: _shortened(word[0], MOST_NAME), text))


def passage(text: str) -> str:
    """Text of several lines, such as a model's: what a terminal or a viewer would obey becomes visible.

    Line breaks and tabs stay, and what scripts need in order to be written: joiners, marks of direction,
    no-break spaces.
    """
    return "\r\n".join(_DANGEROUS.sub(lambda c: _visible(c[0]), line) for line in text.split("\r\n"))


def in_markdown(text: object) -> str:
    """Text for Markdown, in one line: nothing in it is markup.

    A bare address stays one, which some viewers make a link.
    """
    escaped = _MARKUP.sub(r"\\\g<0>", plain(" ".join(str(text).split())))
    return _BLOCK.sub(lambda begin: begin[0] + "\\" if begin[0].isdigit() else "\\" + begin[0], escaped)


def markdown_code(text: object) -> str:
    """Text as Markdown code, in one line and safe in a table's cell."""
    line = plain(" ".join(str(text).split()), MOST_WORD)
    return f"`{line.replace('`', chr(39)).replace('|', '/')}`"


def as_utf8(name: object) -> str:
    """A file's name as it is, but that bytes that are no UTF-8 become visible: JSON and reports are UTF-8."""
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    half = (most - 50) // 2
    return f"{text[:half]} ... [{len(text) - 2 * half:,} characters left out] ... {text[-half:]}"


def _visible(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")

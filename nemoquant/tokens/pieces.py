"""A text in pieces that can be tokenized one by one: no more of it is in memory or tokenized than is used."""

import re
from collections.abc import Iterable, Iterator

PIECE_CHARS = 1 << 16  # at least, of a text that goes on
MOST_PIECE = 1 << 18  # a tokenizer takes some 100 bytes for each
LINE_END = re.compile(r"(?<=\S)\n(?=[^\s/])")
WORD_END = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """A text, which comes in chunks, in pieces that can be tokenized one by one.

    A cut is after a single line break between two other characters, the first after ``PIECE_CHARS``: no
    tokenizer of this family joins tokens across one, but where a slash follows (some take ``;\n//`` as one).
    Where there is none before ``MOST_PIECE``, it is between
    two words, before a space between two letters: there tokens of this family begin as well. Where there is
    no such place either, it is at ``MOST_PIECE``, and the tokens around the cut may differ from those of the
    whole text.
    """
    coming, text, more = iter(chunks), "", True
    while True:
        while more and len(text) <= MOST_PIECE:  # one character more than a piece: a cut looks at it
            chunk = next(coming, None)
            more = chunk is not None
            text += chunk or ""
        if len(text) <= PIECE_CHARS:
            break
        end = _end(LINE_END, text)
        if end is None and len(text) <= MOST_PIECE:
            break
        end = end or _end(WORD_END, text) or MOST_PIECE
        yield text[:end]
        text = text[end:]
    yield text


def _end(place: re.Pattern[str], text: str) -> int | None:
    """Where the first such place is that a piece may end at."""
    found = place.search(text, PIECE_CHARS, MOST_PIECE + 1)
    return found and found.end()


def sliced(text: str) -> Iterator[str]:
    """A text that is there as a whole, as chunks for :func:`pieces`."""
    return (text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS))

"""A text in pieces that can be tokenized one by one: where it is cut, and that its tokens stay."""

import json
import random
from collections.abc import Iterator

import pytest
from support.places import DEMO
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from nemoquant.shipped import calibration_data
from nemoquant.tokens import pieces as module
from nemoquant.tokens.pieces import LINE_END, MOST_PIECE, PIECE_CHARS, pieces
from nemoquant.tokens.tokenizer import load_tokenizer


def chunked(text: str, size: int) -> Iterator[str]:
    return (text[at : at + size] for at in range(0, len(text), size))


def at_lines(text: str, least: int) -> Iterator[str]:
    """The cut at line breaks alone, over a text that is there as a whole."""
    start = 0
    while len(text) - start > least:
        place = LINE_END.search(text, start + least)
        if place is None:
            break
        yield text[start : place.end()]
        start = place.end()
    yield text[start:]


def test_pieces_are_those_of_line_breaks_wherever_they_are_near(monkeypatch):
    """Whatever the size of the chunks that a text comes in; it is there again, and no piece is long."""
    monkeypatch.setattr(module, "PIECE_CHARS", 8)
    monkeypatch.setattr(module, "MOST_PIECE", 40)
    draw, compared = random.Random(0), 0
    for _ in range(3000):
        text = "".join(draw.choice("ab c\n") for _ in range(draw.randrange(200)))
        found = [list(pieces(chunked(text, size))) for size in (1, 3, 8, 41, 1000)]
        assert all(one == found[0] for one in found)
        assert "".join(found[0]) == text
        assert max(map(len, found[0])) <= 40
        expected = list(at_lines(text, 8))
        if max(map(len, expected)) <= 40:
            assert found[0] == expected
            compared += 1
    assert compared > 1000


@pytest.mark.parametrize("between", ["\n", "\n\n", " "])
def test_pieces_give_the_tokens_of_the_whole_text(between):
    """With line breaks, with paragraphs alone, and in one line: cuts are where tokens begin in any case."""
    lines = calibration_data().read_text(encoding="utf-8").splitlines()
    text = between.join(" ".join(json.loads(line)["text"].split()) for line in lines)
    text = text + between + text
    assert len(text) > 2 * MOST_PIECE
    tokenizer = load_tokenizer(DEMO)
    cut = list(pieces(chunked(text, PIECE_CHARS)))
    assert len(cut) > 2
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert [i for piece in cut for i in tokenizer.encode(piece, add_special_tokens=False).ids] == whole


# As in tokenizers that keep `;\n//` together.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def test_pieces_of_code_end_where_its_words_do(monkeypatch):
    monkeypatch.setattr(module, "PIECE_CHARS", 8)
    split = Split(Regex(WORDS), "isolated")
    text = "x = f(1);\n// why\n/* or */\ny = 2;\n" * 100
    cut = list(pieces([text]))
    assert len(cut) > 100

    def words(text):
        return [word for word, _ in split.pre_tokenize_str(text)]

    assert ");\n//" in words(text)
    assert [word for piece in cut for word in words(piece)] == words(text)

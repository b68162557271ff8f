"""tokenizer.json of a stranger: panics of the library, and texts that grow, are errors of one line."""

import json
import os
import shutil

import pytest
from support.places import DEMO
from support.processes import run_python

from nemoquant.errors import CalibrationError
from nemoquant.tokens.codec import TextCodec
from nemoquant.tokens.tokenizer import MOST_CHARS, load_tokenizer

TEXT = "It is a truth universally acknowledged. "
PAD = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>", "pad_to_multiple_of": 0}
CUT = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}


@pytest.fixture
def codec(tmp_path):
    """The demo's codec with changes of its tokenizer.json, or another text in the file."""

    def make(text=None, **changes):
        shutil.copy(DEMO / "tokenizer_config.json", tmp_path)
        data = json.loads((DEMO / "tokenizer.json").read_text()) | changes
        (tmp_path / "tokenizer.json").write_text(
            json.dumps(data) if text is None else text, encoding="latin-1"
        )
        return TextCodec(tmp_path)

    return make


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
            "has a `Precompiled` normalizer",
        ),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [replace({"String": "e"}, "ee")] * 7}},
            "its replacements make up to 128 characters of one; expected at most 64",
        ),
        (
            {"decoder": {"type": "Sequence", "decoders": [replace({"String": "e"}, "e" * 65)]}},
            "its replacements make up to 65 characters of one",
        ),
        (
            {"normalizer": {"type": "Prepend", "prepend": "x" * 5000}},
            "has 5,000 characters; expected at most 4,096",
        ),
        (
            {"model": {"type": "WordLevel", "vocab": {"x" * 5000: 0}, "unk_token": "a"}},
            "has 5,000 characters",
        ),
        ({"added_tokens": [{"id": 1, "content": "x" * 5000}]}, "has 5,000 characters"),
        ({"model": None}, "cannot be read as a tokenizer ("),
        ({"added_tokens": 3}, "cannot be read as a tokenizer ("),
        ({"text": "[]"}, "it holds a JSON list, not an object"),
        ({"text": "["}, "Expecting value"),
        ({"text": "\xff"}, "'utf-8' codec"),
        ({"text": "[" * 100_000}, "it is nested too deeply"),
        ({"text": '{"model": "\\ud800"}'}, "half of a surrogate pair"),
    ],
)
def test_files_that_are_refused(changes, message, codec, capfd):
    with pytest.raises(CalibrationError) as error:
        codec(**changes)
    assert "tokenizer.json cannot be read as a tokenizer (" in str(error.value)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": replace({"String": ""}, "ee")}, "index out of bounds"),
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "(a+|[a-z ]+)+$x"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
            "retry-limit-in-match over",
        ),
    ],
    ids=["a pattern of nothing", "a pattern that backtracks"],
)
def test_panics_of_the_library(changes, message, codec, capfd):
    """A panic is no Exception, and prints its backtrace: neither gets out."""
    made = codec(**changes)
    with pytest.raises(CalibrationError, match=message) as error:
        made.encode(TEXT * 3)
    assert str(error.value).startswith("the tokenizer can't split a text (")
    assert capfd.readouterr().err == ""


def test_a_panic_while_the_file_is_read(codec, monkeypatch, capfd):
    from nemoquant.tokens import tokenizer

    monkeypatch.setattr(tokenizer, "_check", lambda data: None)
    with pytest.raises(CalibrationError, match="Cannot parse precompiled_charsmap"):
        codec(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    assert capfd.readouterr().err == ""


def test_texts_are_neither_cut_nor_padded(codec):
    """The file's settings are for training: one made ten million tokens of a word, one panicked."""
    plain = codec().encode(TEXT)
    assert codec(padding=PAD | {"strategy": {"Fixed": 10_000_000}}).encode(TEXT) == plain
    assert codec(truncation=CUT).encode(TEXT) == plain
    assert len(plain) > CUT["max_length"]


def test_real_tokenizers_are_within_the_bounds():
    vocabulary = load_tokenizer(DEMO).get_vocab()
    assert max(map(len, vocabulary)) * 20 < MOST_CHARS


def test_what_others_write_to_standard_error_is_kept(capfd, monkeypatch):
    tokenizer = load_tokenizer(DEMO)

    class Chatty:
        def encode(self, *arguments, **options):
            os.write(2, b"progress\n")
            return tokenizer.encode(*arguments, **options)

    codec = TextCodec(DEMO)
    monkeypatch.setattr(codec, "tokenizer", Chatty())
    assert codec.encode(TEXT) == tokenizer.encode(TEXT).ids
    assert capfd.readouterr().err == "progress\n"
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(Chatty, "encode", lambda *a, **o: (_ for _ in ()).throw(KeyboardInterrupt))
        codec.encode(TEXT)
    os.write(2, b"still here\n")
    assert capfd.readouterr().err == "still here\n"


def test_without_standard_error():
    """A service may have closed it."""
    code = (
        "import os, pathlib; os.close(2)\n"
        "from nemoquant.tokens.codec import TextCodec\n"
        f"print(len(TextCodec(pathlib.Path({str(DEMO)!r})).encode({TEXT!r})))"
    )
    assert int(run_python(code).stdout) == len(load_tokenizer(DEMO).encode(TEXT).ids)

"""tokenizer.json of a stranger: panics of the library, and texts that grow, are errors of one line."""

import contextlib
import json
import os
import shutil
import threading

import pytest
from support.places import DEMO
from support.processes import run_python

from nemoquant.errors import CalibrationError
from nemoquant.tokens.codec import TextCodec
from nemoquant.tokens.tokenizer import MOST_CHARS, encode, load_tokenizer

TEXT = "It is a truth universally acknowledged. "
PAD = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>", "pad_to_multiple_of": 0}
CUT = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}


@pytest.fixture
def codec(tmp_path):
    """The demo's codec with changes of its tokenizer.json, or another text in the file."""

    def make(text=None, **changes):
        for name in ("config.json", "tokenizer_config.json"):
            shutil.copy(DEMO / name, tmp_path)
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
            {"normalizer": {"type": "Sequence", "normalizers": [replace({"String": "e"}, "ee")] * 5}},
            "its replacements make up to 32 bytes of one; expected at most 16",
        ),
        (
            {"decoder": {"type": "Sequence", "decoders": [replace({"String": "e"}, "e" * 17)]}},
            "its replacements make up to 17 bytes of one",
        ),
        (  # what matches between any two characters doubles the text with one character
            {"normalizer": {"type": "Sequence", "normalizers": [replace({"String": ""}, "x")] * 21}},
            "its replacements make up to 2097152 bytes of one",
        ),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [replace({"Regex": "(?=.)"}, "x")] * 5}},
            "its replacements make up to 32 bytes of one",
        ),
        (  # 18 letters once it is decomposed
            {"normalizer": {"type": "Sequence", "normalizers": [replace({"String": "e"}, "\ufdfa")]}},
            "its replacements make up to 33 bytes of one",
        ),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 64}},
            " steps; expected at most 64",
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


def test_replacements_of_real_tokenizers_are_within_the_bounds(codec):
    steps = [
        replace({"String": "``"}, '"'),
        replace({"String": "''"}, '"'),
        replace({"Regex": " {2,}"}, " "),
        replace({"String": " "}, "\u2581"),
    ]
    back = {"type": "Sequence", "decoders": [replace({"String": "\u2581"}, " "), {"type": "Fuse"}]}
    codec(normalizer={"type": "Sequence", "normalizers": steps}, decoder=back)


def test_standard_error_is_there_after_threads_have_used_it_at_once():
    """The second took the first one's file for it, and left that in its place."""
    started, ended = threading.Event(), threading.Event()

    class Slow:
        def encode(self, text, add_special_tokens):  # noqa: ARG002
            if text == "first":
                started.set()
                ended.wait(0.3)
            else:
                started.wait()
            raise ValueError("x")

    def use(text):
        with contextlib.suppress(CalibrationError):
            encode(Slow(), text)
        if text == "first":
            ended.set()

    before = os.fstat(2)
    threads = [threading.Thread(target=use, args=[text]) for text in ("first", "second")]
    threads[0].start()
    started.wait()
    threads[1].start()
    for thread in threads:
        thread.join()
    assert os.path.samestat(os.fstat(2), before)


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

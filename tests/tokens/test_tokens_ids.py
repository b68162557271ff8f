"""Token ids are those of transformers' AutoTokenizer: ``<s>`` of a post-processor, tokens of its settings."""

import importlib.util
import json
import shutil

import pytest
from support.places import CALIB, DEMO

from nemoquant.errors import CalibrationError
from nemoquant.model.parse import load_config
from nemoquant.tokens import pieces
from nemoquant.tokens.codec import TextCodec
from nemoquant.tokens.documents import documents
from nemoquant.tokens.named import given
from nemoquant.tokens.rows import load_rows
from nemoquant.tokens.tokenizer import ends, load_tokenizer

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
TEXT = "It is a <s> truth </s> universally <|im_start|>acknowledged<|im_end|>, <think>hm</think>. "
BOS, EOS, A, B = (
    {"SpecialToken": {"id": "<s>", "type_id": 0}},
    {"SpecialToken": {"id": "</s>", "type_id": 0}},
    {"Sequence": {"id": "A", "type_id": 0}},
    {"Sequence": {"id": "B", "type_id": 1}},
)
TOKENS = {
    "<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]},
    "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]},
}


def around(*single):
    pair = [*single, B]
    return {"type": "TemplateProcessing", "single": list(single), "pair": pair, "special_tokens": TOKENS}


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
PROCESSORS = {
    "none": (None, [], []),
    "bytes": (BYTES, [], []),
    "<s>": (around(BOS, A), [1], []),
    "</s>": (around(A, EOS), [], [2]),
    "both": (around(BOS, A, EOS), [1], [2]),
    "after bytes": ({"type": "Sequence", "processors": [BYTES, around(BOS, A)]}, [1], []),
    "as of BERT": ({"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}, [1], [2]),
}


def model(folder, processor=None, template="{{ bos_token }}{{ messages[0].content }}", **settings):
    data = json.loads((DEMO / "tokenizer.json").read_text()) | {"post_processor": processor}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    data = json.loads((DEMO / "tokenizer_config.json").read_text())
    data.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(data | settings))
    shutil.copy(DEMO / "config.json", folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def read(path, folder):
    return [[i for ids in document for i in ids] for document in documents(given(path), folder)]


def written(folder, *rows):
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@needs_transformers
@pytest.mark.parametrize(
    "flags", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}]
)
@pytest.mark.parametrize(("processor", "before", "after"), PROCESSORS.values(), ids=PROCESSORS.keys())
def test_ids_are_those_of_transformers(processor, before, after, flags, tmp_path):
    """Of a text, of a chat, of a prompt. A file's flags count for nothing beside tokenizer.json there."""
    folder = model(tmp_path, processor, **flags)
    tokenizer = theirs(folder)
    assert ends(load_tokenizer(folder)) == (before, after)
    chat = [{"role": "user", "content": TEXT}]
    expected = [
        tokenizer(TEXT)["input_ids"],
        tokenizer.apply_chat_template(chat, return_dict=False),
        tokenizer(f"{TEXT}\n{TEXT}")["input_ids"],
    ]
    path = written(tmp_path, {"text": TEXT}, {"messages": chat}, {"text": f"{TEXT}\n{TEXT}"}, {"text": ""})
    assert read(path, folder) == [*expected, []]
    (tmp_path / "x.txt").write_text(TEXT)
    assert read(tmp_path / "x.txt", folder) == expected[:1]
    codec = TextCodec(folder)
    assert codec.encode(TEXT) == expected[0]
    assert codec.chat(TEXT) == expected[1]
    assert expected[0][: len(before)] == before and expected[0][len(expected[0]) - len(after) :] == after


@needs_transformers
def test_a_text_in_pieces_has_them_at_its_ends_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_CHARS", 50)
    folder, text = model(tmp_path, around(BOS, A, EOS)), f"{TEXT.strip()}\n" * 20
    expected = theirs(folder)(text)["input_ids"]
    for name, content in (("x.txt", text), ("x.jsonl", json.dumps({"text": text}))):
        (tmp_path / name).write_text(content)
        found = list(documents(given(tmp_path / name), folder))
        (document,) = [list(pieces) for pieces in found]
        assert len(document) > 10
        assert [i for ids in document for i in ids] == expected


@needs_transformers
@pytest.mark.parametrize(
    "settings",
    [
        {"additional_special_tokens": ["<think>", "</think>"]},
        {"extra_special_tokens": {"think_token": "<think>"}},
        {"added_tokens_decoder": {"2048": {"content": "<think>", "special": False, "normalized": True}}},
        {"added_tokens_decoder": {"2": {"content": "</s>", "lstrip": True, "rstrip": True, "special": True,
                                        "normalized": False, "single_word": False}}},
        {"sep_token": "<think>"},
        {"split_special_tokens": True},
    ],
    ids=["list", "names", "added", "added otherwise", "one with a name", "split"],
)  # fmt: skip
def test_tokens_that_the_settings_declare(settings, tmp_path):
    folder = model(tmp_path, around(BOS, A), **settings)
    expected = theirs(folder)(TEXT)["input_ids"]
    assert read(written(tmp_path, {"text": TEXT}), folder) == [expected]
    assert expected != theirs(model(tmp_path, around(BOS, A)))(TEXT)["input_ids"]


@pytest.mark.parametrize("name", ["demo_model", "nano_model"])
def test_the_trained_models_get_what_they_got(name):
    """Their figures are measured on these ids: nothing is added, and no token is known otherwise."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(CALIB / name / "tokenizer.json"))
    assert ends(load_tokenizer(CALIB / name)) == ([], [])
    assert TextCodec(CALIB / name).encode(TEXT) == plain.encode(TEXT, add_special_tokens=False).ids


def test_rows_begin_and_end_documents_as_the_tokenizer_does(tmp_path):
    folder = model(tmp_path, around(BOS, A))
    config, _ = load_config(folder)
    words = TextCodec(folder).encode("It is")
    found = load_rows(
        written(tmp_path, {"text": "It is"}, {"text": "It is"}), folder, config, 1, 2 * len(words) + 2
    )
    assert found.ids.tolist() == [[*words, 2, *words, 2]]
    assert words[0] == 1


HOSTILE = {
    "many tokens": around(*[BOS] * 100, A),
    "the text twice": around(A, A),
}


@pytest.mark.parametrize("processor", HOSTILE.values(), ids=HOSTILE.keys())
def test_processors_that_do_something_else(processor, tmp_path):
    with pytest.raises(CalibrationError, match=r"tokenizer\.json (makes|cannot be read)") as error:
        TextCodec(model(tmp_path, processor))
    assert "\n" not in str(error.value)


def test_settings_that_cannot_be_read(tmp_path):
    folder = model(tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CalibrationError, match=r"tokenizer_config\.json cannot be read .* expected JSON"):
        TextCodec(folder)
    model(folder, extra_special_tokens=["x" * 5000])
    with pytest.raises(CalibrationError, match="has 5,000 characters; expected at most 4,096"):
        TextCodec(folder)

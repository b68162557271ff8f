"""Calibration rows from every kind of file, counted by hand: a b c d e are the tokens 3 4 5 6 7, eos is 2."""

import json
import os
import sys

import numpy as np
import pytest
from support.files import edit_json

from nemoquant.errors import CalibrationError, MissingExtraError
from nemoquant.model.parse import load_config
from nemoquant.shipped import calibration_data
from nemoquant.tokens.codec import TextCodec
from nemoquant.tokens.rows import load_rows

CHAT = [{"role": "user", "content": "x"}]


def rows(path, model, count=32, length=4):
    config, _ = load_config(model)
    return load_rows(path, model, config, count, length)


def write(folder, name, content):
    path = folder / name
    if name.endswith(".jsonl") and not isinstance(content, str):
        content = "".join(json.dumps(document) + "\n" for document in content)
    path.write_text(content)
    return path


def test_documents_are_joined_by_eos_and_cut_without_overlap(model, tmp_path):
    documents = [{"text": "a b c"}, {"text": "d"}, {"text": "e e e e e"}]
    found = rows(write(tmp_path, "x.jsonl", documents), model)
    # 3 4 5 2 | 6 2 7 7 | 7 7 7 2
    assert found.ids.tolist() == [[3, 4, 5, 2], [6, 2, 7, 7], [7, 7, 7, 2]]
    assert found.ids.dtype == np.int64
    assert (found.dropped, found.source) == (0, "x.jsonl")


@pytest.mark.parametrize(
    ("words", "length", "kept", "dropped"),
    [(7, 4, 2, 0), (8, 4, 2, 1), (10, 4, 2, 3), (7, 8, 1, 0), (12, 8, 1, 5)],
)
def test_the_remainder_is_dropped_and_counted(words, length, kept, dropped, model, tmp_path):
    found = rows(write(tmp_path, "x.txt", "a " * words), model, length=length)  # followed by an eos
    assert (len(found.ids), found.dropped) == (kept, dropped)


def test_no_more_rows_than_asked_for(model, tmp_path):
    found = rows(write(tmp_path, "x.jsonl", [{"text": "a b c d e"}] * 10), model, count=2)
    assert found.ids.tolist() == [[3, 4, 5, 6], [7, 2, 3, 4]]
    assert found.dropped == 0, "what was not asked for is not lost"


def test_later_documents_are_not_even_read(model, tmp_path):
    text = json.dumps({"text": "a b c d e"}) + "\n" + "this is no JSON\n"
    assert len(rows(write(tmp_path, "x.jsonl", text), model, count=1).ids) == 1


def test_a_prompt_beyond_the_vocabulary(model):
    edit_json(model / "config.json", lambda config: config.update(vocab_size=6))
    codec = TextCodec(model)
    assert codec.encode("a b c") == [3, 4, 5]
    for ask in (lambda: codec.encode("b c d"), lambda: codec.chat("a")):
        with pytest.raises(
            CalibrationError, match=r"the prompt: token ids from .*, expected 0 to 5; is the tok"
        ):
            ask()


def test_txt_is_one_document(model, tmp_path):
    assert rows(write(tmp_path, "x.txt", "a b\n\nc"), model).ids.tolist() == [[3, 4, 5, 2]]


def test_messages_go_through_the_chat_template(model, tmp_path):
    chat = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    assert rows(write(tmp_path, "x.jsonl", [{"messages": chat}]), model, length=6).ids.tolist() == [
        [8, 3, 4, 9, 5, 2]
    ]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }} a {{ eos_token }}", [1, 3, 2, 2]),
        ("{% for m in messages %}\n  {% if true %}\na b c\n  {% endif %}\n{% endfor %}", [3, 4, 5, 2]),
        ("a{% if add_generation_prompt %} b{% endif %} b c", [3, 4, 5, 2]),
        ("{% for i in [1, 2, 3, 4] %}{% if i == 4 %}{% break %}{% endif %}a {% endfor %}", [3, 3, 3, 2]),
        ("{{ ['<'] | tojson }} a b", [0, 3, 4, 2]),
    ],
    ids=["special tokens", "blocks are trimmed", "no prompt for an answer", "break", "tojson"],
)
def test_templates_render_as_in_transformers(template, expected, model, tmp_path):
    (model / "chat_template.jinja").write_text(template)
    assert rows(
        write(tmp_path, "x.jsonl", [{"messages": [{"role": "user", "content": "x"}]}]), model
    ).ids.tolist() == [expected]


def test_tojson_is_not_escaped_for_html(model, tmp_path):
    (model / "chat_template.jinja").write_text(
        "{% if messages[0].content | tojson == '\"<é>\"' %}a b c{% endif %}"
    )
    chat = [{"role": "user", "content": "<é>"}]
    assert rows(write(tmp_path, "x.jsonl", [{"messages": chat}]), model).ids.tolist() == [[3, 4, 5, 2]]


def test_the_template_of_tokenizer_config(model, tmp_path):
    (model / "chat_template.jinja").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "a b c"}))
    assert rows(write(tmp_path, "x.jsonl", [{"messages": CHAT}]), model).ids.tolist() == [[3, 4, 5, 2]]


def test_ids_need_no_tokenizer(source, tmp_path):
    path = write(
        tmp_path, "x.jsonl", [{"input_ids": [90, 91, 92]}, {"input_ids": []}, {"input_ids": [93, 94]}]
    )
    assert rows(path, source).ids.tolist() == [[90, 91, 92, 2]]
    assert rows(path, source).dropped == 3  # 93, 94 and its eos: the empty document adds none


def test_parquet(model, tmp_path):
    import pyarrow
    from pyarrow import parquet

    columns = {"text": ["a b c", None], "input_ids": [None, [90, 91, 92]]}
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    assert rows(path, model).ids.tolist() == [[3, 4, 5, 2], [90, 91, 92, 2]]
    chats = pyarrow.table({"messages": [[{"role": "user", "content": "a b"}]]})
    parquet.write_table(chats, path)
    assert rows(path, model).ids.tolist() == [[8, 3, 4, 2]]


def test_npy_is_taken_as_it_is(source, tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(15, dtype=np.uint8).reshape(3, 5))
    found = rows(path, source, count=1, length=2)  # the array sets count and length
    assert found.ids.tolist() == np.arange(15).reshape(3, 5).tolist()
    assert found.dropped == 0


def test_identity_is_the_tokens_not_the_file(model, tmp_path):
    a = rows(write(tmp_path, "a.txt", "a b c"), model)
    b = rows(write(tmp_path, "b.jsonl", [{"input_ids": [3, 4, 5]}]), model)
    other = rows(write(tmp_path, "c.txt", "a b d"), model)
    assert a.sha256 == b.sha256 != other.sha256


def test_the_shipped_text_is_there():
    documents = [json.loads(line) for line in calibration_data().read_text(encoding="utf-8").splitlines()]
    assert all(document["text"] for document in documents)


ESCAPES = {
    "mro": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "os": "{{ raise_exception.__globals__['os'].system('touch ' ~ messages[0].content) }}",
    "os through cycler": "{{ cycler.__init__.__globals__.os.system('touch ' ~ messages[0].content) }}",
    "os through self": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch ' ~ "
    "messages[0].content) }}",
    "builtins": "{{ raise_exception.__builtins__.open(messages[0].content, 'w') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "change the messages": "{{ messages.append('a b c') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('true') }}",
    "endless": "{% for i in range(10**9) %}a{% endfor %}",
}


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES.keys())
def test_templates_run_in_a_sandbox(template, model, tmp_path):
    (model / "chat_template.jinja").write_text(template)
    trace = tmp_path / "trace"
    path = write(tmp_path, "x.jsonl", [{"messages": [{"role": "user", "content": str(trace)}]}])
    with pytest.raises(
        CalibrationError, match=r"x\.jsonl, document 1: the chat template refuses its messages \(."
    ):
        rows(path, model)
    assert not trace.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ raise_exception('no system role') }}",
        "{% if %}",
        "{{ 3 + 'a' }}",
    ],
)
def test_templates_that_fail(template, model, tmp_path):
    (model / "chat_template.jinja").write_text(template)
    path = write(tmp_path, "x.jsonl", [{"text": "a"}, {"messages": [{"role": "user", "content": "a"}]}])
    message = r"x\.jsonl, document 2: the chat template refuses its messages \(."
    if template == "{% if %}":
        message = r"its chat template cannot be read \(Expected an expression"
    with pytest.raises(CalibrationError, match=message) as error:
        rows(path, model)
    if "raise_exception" in template:
        assert "no system role" in str(error.value)


BAD = {
    "empty text": ("x.txt", "", "holds no text; expected at least one row of 4 tokens"),
    "empty jsonl": ("x.jsonl", "", "holds no text"),
    "blank lines": ("x.jsonl", "\n  \n", "holds no text"),
    "empty documents": ("x.jsonl", [{"text": ""}, {"input_ids": []}], "holds no text"),
    "shorter than a row": (
        "x.txt",
        "a b",
        "holds 3 tokens, less than one row of 4; give more text or a smaller --seq-len",
    ),
    "unknown kind": (
        "x.doc",
        "a b c",
        "unknown kind '.doc'; expected .txt, .jsonl, .ndjson, .json, .csv, .t",
    ),
    "a pickle": ("x.pt", "a b c", "unknown kind '.pt', it is a pickle, which can run code and is not opened"),
    "a packed file": ("x.jsonl.zst", "a b c", "unknown kind '.zst', it is packed; unpack it, or pack it as"),
    "no suffix": ("x", "a b c", "unknown kind ''"),
    "not JSON": (
        "x.jsonl",
        '{"text": "a"}\nhello\n',
        "x.jsonl, line 2: not JSON (Expecting value, at character 1); expected one JSON object a line",
    ),
    "a number": ("x.jsonl", '{"text": "a"}\n1\n', "x.jsonl, document 2: a JSON int, expected an object"),
    "other keys": (
        "x.jsonl",
        [{"text": "a"}, {"body": "a"}],
        "x.jsonl, document 2: has body (str); expected `text` (str), `messages` (list), `input_ids` (list)",
    ),
    "text is no string": ("x.jsonl", [{"text": 5}], "x.jsonl, document 1: has text (int)"),
    "messages are no list": (
        "x.jsonl",
        [{"messages": "a"}],
        "x.jsonl, document 1: `messages` is text that is not",
    ),
    "ids that are none": (
        "x.jsonl",
        [{"input_ids": [3, "a"]}],
        "x.jsonl, document 1: `input_ids` holds 'a'; expected token ids",
    ),
    "ids with a part": ("x.jsonl", [{"input_ids": [3, 1.5]}], "`input_ids` holds 1.5"),
    "ids below zero": ("x.jsonl", [{"input_ids": [3, -1]}], "`input_ids` holds -1"),
    "huge ids": ("x.jsonl", [{"input_ids": [3, 10**30]}], "`input_ids` holds 1000"),
    "ids outside the vocabulary": (
        "x.jsonl",
        [{"input_ids": [3, 4, 96, 5]}],
        "token ids from 3 to 96, expected 0 to 95",
    ),
    "no parquet": ("x.parquet", "not parquet", "cannot be read as parquet"),
    "no npy": ("x.npy", "a b c", "cannot be read as a numpy array"),
    "empty npy": ("x.npy", "", "cannot be read as a numpy array"),
    "zip": ("x.npy", "PK\x03\x04 and no more", "cannot be read as a numpy array"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD.keys())
def test_bad_data(name, content, message, model, tmp_path):
    path = write(tmp_path, name, content)
    with pytest.raises(CalibrationError) as error:
        rows(path, model)
    assert message in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.npy", "x.parquet"])
def test_a_missing_file(name, model, tmp_path):
    with pytest.raises(CalibrationError, match=r"does not exist"):
        rows(tmp_path / name, model)


def test_text_that_is_not_utf8(model, tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"a b \xff c")
    with pytest.raises(CalibrationError, match=r"x\.txt cannot be read .*expected UTF-8 text"):
        rows(path, model)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3)),
        np.zeros((0, 4), np.int64),
        np.zeros((1, 2, 2), np.int64),
        np.array([["a"]]),
    ],
    ids=["floats", "empty", "3-D", "strings"],
)
def test_arrays_that_are_no_rows(array, source, tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, array)
    with pytest.raises(CalibrationError, match=r"expected integers \[rows, length\]"):
        rows(path, source)


@pytest.mark.parametrize("ids", [[[0, 96]], [[-1, 5]]])
def test_arrays_outside_the_vocabulary(ids, source, tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.array(ids))
    with pytest.raises(CalibrationError, match=r"expected 0 to 95; is the tokenizer this model's\?"):
        rows(path, source)


def test_a_pickle_is_not_opened(source, tmp_path):
    path = tmp_path / "x.npy"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    np.save(path, np.array([[Trap()]], dtype=object), allow_pickle=True)
    with pytest.raises(CalibrationError, match="cannot be read as a numpy array"):
        rows(path, source)
    assert not (tmp_path / "trap").exists()


def test_no_tokenizer(source, tmp_path):
    with pytest.raises(
        CalibrationError, match=r"tokenizer\.json does not exist; text needs the model's tokenizer"
    ):
        rows(write(tmp_path, "x.txt", "a b c"), source)


def test_a_damaged_tokenizer(model, tmp_path):
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(CalibrationError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        rows(write(tmp_path, "x.txt", "a b c"), model)


@pytest.mark.parametrize("settings", ["{}", '{"chat_template": [{"name": "default"}]}', "{"])
def test_no_chat_template(settings, model, tmp_path):
    (model / "chat_template.jinja").unlink()
    (model / "tokenizer_config.json").write_text(settings)
    with pytest.raises(CalibrationError, match=r"has no chat template|expected JSON"):
        rows(write(tmp_path, "x.jsonl", [{"messages": CHAT}]), model)


def test_parquet_without_its_extra(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path, "x.parquet", "")
    with pytest.raises(
        MissingExtraError, match=r"x\.parquet needs the extra `parquet`: pip install 'nemoquant\[parquet\]'"
    ) as error:
        rows(path, model)
    assert error.value.exit_code == 3

"""The shapes in which people keep text: each becomes rows, or one line that says what to do.

A table of files, each in small form; a b c d e are the tokens 3 4 5 6 7, eos is 2.
"""

import bz2
import gzip
import io
import json
import os
import pickle

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from nemoquant.errors import CalibrationError, MissingExtraError
from nemoquant.model.parse import load_config
from nemoquant.tokens import opened
from nemoquant.tokens.array import are_rows
from nemoquant.tokens.rows import load_rows
from tests.tokens.conftest import TEMPLATE

AB, CD = {"text": "a b"}, {"text": "c d"}
TWO = [3, 4, 2, 5, 6, 2]  # of these two, whatever they are in
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CHAT = [8, 3, 9, 4]  # of these two


def lines(*rows, end="\n"):
    return "".join(json.dumps(row) + end for row in rows).encode()


def pretty(*rows):
    return "\n".join(json.dumps(row, indent=2) for row in rows).encode()


def table(rows, **options):
    out = io.BytesIO()
    parquet.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), out, **options)
    return out.getvalue()


def arrow(rows, new=pa.ipc.new_stream):
    data, out = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), io.BytesIO()
    with new(out, data.schema) as writer:
        writer.write_table(data, max_chunksize=1)
    return out.getvalue()


def array(ids, **arrays):
    out = io.BytesIO()
    if arrays:
        np.savez(out, **arrays)
    else:
        np.save(out, ids)
    return out.getvalue()


TEXTS = {  # name, content: two documents, a b and c d
    "lines": ("x.jsonl", lines(AB, CD)),
    "lines without an end": ("x.jsonl", lines(AB, CD).strip()),
    "lines of Windows": ("x.jsonl", lines(AB, CD, end="\r\n")),
    "blank lines": ("x.jsonl", b"\n \n" + lines(AB, CD, end="\n\n\t\n")),
    "other end": ("x.ndjson", lines(AB, CD)),
    "capitals": ("X.JSONL", lines(AB, CD)),
    "lines as .json": ("x.json", lines(AB, CD)),
    "UTF-8 with a mark": ("x.jsonl", b"\xef\xbb\xbf" + lines(AB, CD)),
    "UTF-16": ("x.jsonl", lines(AB, CD).decode().encode("utf-16")),
    "UTF-16, big": ("x.jsonl", b"\xfe\xff" + lines(AB, CD).decode().encode("utf-16-be")),
    "UTF-32": ("x.jsonl", lines(AB, CD).decode().encode("utf-32")),
    "packed": ("x.jsonl.gz", gzip.compress(lines(AB, CD))),
    "packed array": ("x.JSON.GZ", gzip.compress(json.dumps([AB, CD]).encode())),
    "packed twice, one after the other": ("x.jsonl.gz", gzip.compress(lines(AB)) + gzip.compress(lines(CD))),
    "an array": ("x.json", json.dumps([AB, CD]).encode()),
    "an array over lines": ("x.json", json.dumps([AB, CD], indent=4).encode()),
    "an array in .jsonl": ("x.jsonl", json.dumps([AB, CD]).encode() + b"\n"),
    "an array a line": ("x.jsonl", lines([AB], [CD])),
    "an array of texts": ("x.json", b'["a b",\n "c d"]'),
    "values over lines": ("x.jsonl", pretty(AB, CD)),
    "an object around": ("x.json", json.dumps({"version": 1, "data": [AB, CD]}).encode()),
    "an object around, over lines": (
        "x.json",
        json.dumps({"train": [AB, CD], "test": [AB]}, indent=1).encode(),
    ),
    "an object around texts": ("x.json", json.dumps({"lang": "en", "poems": ["a b", "c d"]}).encode()),
    "texts": ("x.jsonl", lines("a b", "c d")),
    "with commas": ("x.csv", b"id,text\n1,a b\n2,c d\n"),
    "with quotes, of Windows": ("x.csv", b'\xef\xbb\xbf"text","id"\r\n"a\r\nb","1"\r\n"c d",2\r\n'),
    "with semicolons": ("x.csv", b"id;text\n1;a b\n2;c d\n"),
    "with spaces": ("x.csv", b'id, text\n1, "a b"\n2, c d\n'),
    "a header over lines": ("x.csv", b'"i\nd",text\n1,a b\n2,c d\n'),
    "with tabs": ("x.tsv", b"text\tid\na b\t1\nc d\t\n"),
    "packed tabs": ("x.tsv.gz", gzip.compress(b"text\tid\na b\t1\nc d\t\n")),
    "Parquet": ("x.parquet", table([AB, CD])),
    "categories": ("x.parquet", table(pa.table({"text": pa.array(["a b", "c d"]).dictionary_encode()}))),
    "large texts": ("x.parquet", table(pa.table({"text": pa.array(["a b", "c d"], pa.large_string())}))),
    "Arrow": ("x.arrow", arrow([AB, CD])),
    "Arrow with a footer": ("x.arrow", arrow([AB, CD], pa.ipc.new_file)),
    "ids": ("x.jsonl", lines({"input_ids": [3, 4]}, {"input_ids": [5, 6]})),
    "ids in a list": ("x.jsonl", lines({"input_ids": [[3, 4]]}, {"input_ids": [[5, 6]]})),
    "ids of several": ("x.json", json.dumps({"input_ids": [[3, 4], [5, 6]]}).encode()),
    "lists of ids": ("x.jsonl", lines([3, 4], [5, 6])),
    "ids as text": ("x.csv", b'input_ids\n"[3, 4]"\n"[5, 6]"\n'),
    "ids in Parquet": ("x.parquet", table([{"input_ids": [3, 4]}, {"input_ids": [5, 6]}])),
    "masked rows": (
        "x.jsonl",
        lines(
            {"input_ids": [0, 3, 4], "attention_mask": [0, 1, 1]},
            {"input_ids": [[5, 0, 6, 0]], "attention_mask": [[True, False, True, False]]},
        ),
    ),
    "masked rows in one": (
        "x.json",
        json.dumps({"input_ids": [[3, 4, 0], [5, 6, 0]], "attention_mask": [[1, 1, 0]] * 2}).encode(),
    ),
    "masked Parquet": (
        "x.parquet",
        table([{"input_ids": [0, 3, 4], "attention_mask": [0, 1, 1]}, {"input_ids": [5, 6]}]),
    ),
    "masked arrays": (
        "x.npz",
        array(0, input_ids=np.array([[9, 3, 4], [5, 6, 9]]), attention_mask=np.array([[0, 1, 1], [1, 1, 0]])),
    ),
    "article": ("x.jsonl", lines({"article": "a b", "highlights": "e"}, {"article": "c d", "id": "1"})),
    "content": ("x.parquet", table([{"content": "a b", "size": 3}, {"content": "c d", "size": 3}])),
    "nothing in one": ("x.jsonl", lines({"text": ""}, AB, CD)),
}


def rows(path, model, count=2, length=4, **options):
    return load_rows(path, model, load_config(model)[0], count, length, **options)


def tokens(path, model, **options):
    """All tokens of a file, and what is said about it."""
    found = rows(path, model, 10**6, 1, **options)
    return found.ids.ravel().tolist(), found.warnings[1:]


@pytest.mark.parametrize(("name", "content"), TEXTS.values(), ids=TEXTS.keys())
def test_two_documents(name, content, model, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    ids, said = tokens(path, model)
    assert ids == TWO
    assert [text for text in said if "attention_mask" not in text] == []
    assert bool(said) == ("mask" in content.decode("latin-1") and name != "x.csv")


ONE_CHAT = {
    "messages": {"messages": [USER, ANSWER]},
    "conversations": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "roles": {"conversations": [USER, ANSWER]},
    "prompt + completion": {"prompt": "a", "completion": "b"},
    "messages of both": {"prompt": [USER], "completion": [ANSWER]},
    "prompt + response": {"prompt": "a", "response": "b"},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "input + output": {"input": "a", "output": "b"},
    "post-training": {"input": [USER], "output": "b", "category": "math"},
    "question + answer": {"question": "a", "answer": "b"},
    "a list of messages": [USER, ANSWER],
    "messages as text": {"messages": json.dumps([USER, ANSWER])},
}


@pytest.mark.parametrize("row", ONE_CHAT.values(), ids=ONE_CHAT.keys())
def test_a_conversation_in_any_kind_of_file(row, model, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines(row, row))
    (tmp_path / "x.json").write_text(json.dumps([row, row], indent=1))
    names = ["x.jsonl", "x.json"]
    if isinstance(row, dict):
        (tmp_path / "x.parquet").write_bytes(table([row, row]))
        (tmp_path / "x.arrow").write_bytes(arrow([row, row]))
        names += ["x.parquet", "x.arrow"]
    for name in names:
        assert tokens(tmp_path / name, model) == ([*CHAT, 2] * 2, ())


def test_one_conversation_over_lines(model, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([USER, ANSWER, USER], indent=2))
    assert tokens(tmp_path / "x.json", model)[0] == [*CHAT, 8, 3, 2]


def test_a_question_without_a_chat_template_is_text(model, tmp_path):
    (model / "chat_template.jinja").unlink()
    (tmp_path / "x.jsonl").write_bytes(lines({"prompt": "a", "completion": "b c", "system": "d"}))
    assert tokens(tmp_path / "x.jsonl", model)[0] == [6, 3, 4, 5, 2]
    (tmp_path / "x.jsonl").write_bytes(lines({"messages": [USER]}))
    with pytest.raises(CalibrationError, match=r"has no chat template; `messages` need chat_template\.jinja"):
        tokens(tmp_path / "x.jsonl", model)


def test_a_folder_is_its_files_in_their_order(model, tmp_path):
    for name, content in {
        "b.jsonl": lines(CD),
        "a/z.txt": b"a b",
        "README.md": b"e",
        ".hidden.jsonl": lines("e"),
        "_cache/x.jsonl": lines("e"),
        "c.npy": array(np.array([[7, 7], [3, 3]])),
        "d.csv.gz": gzip.compress(b"text\ne\n"),
    }.items():
        (tmp_path / "x" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "x" / name).write_bytes(content)
    ids, said = tokens(tmp_path / "x", model)
    assert ids == [3, 4, 2, 5, 6, 2, 7, 7, 2, 3, 3, 2, 7, 2]
    assert said == ("x: files of other kinds were left out, 1 of them",)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CalibrationError, match=r"empty is a folder without a file that is read; expected \.txt"
    ):
        tokens(tmp_path / "empty", model)


@pytest.mark.filterwarnings("ignore")
def test_what_datasets_saves(model, tmp_path):
    datasets = pytest.importorskip("datasets")
    some, other = datasets.Dataset.from_list([AB, CD]), datasets.Dataset.from_list([{"text": "e"}])
    some.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert tokens(tmp_path / "one", model) == (TWO, ())
    datasets.DatasetDict({"test": other, "train": some}).save_to_disk(str(tmp_path / "several"))
    assert tokens(tmp_path / "several", model) == (TWO, ())
    datasets.DatasetDict({"test": other, "dev": some}).save_to_disk(str(tmp_path / "no train"))
    with pytest.raises(CalibrationError, match=r"holds the splits test, dev; name the folder of one"):
        tokens(tmp_path / "no train", model)
    assert tokens(tmp_path / "no train" / "test", model) == ([7, 2], ())
    some.to_csv(str(tmp_path / "x.csv"))
    some.to_json(str(tmp_path / "x.json"))
    for name in ("x.csv", "x.json"):
        assert tokens(tmp_path / name, model) == (TWO, ())


ARRAYS = {  # content, whether its rows are taken as they are, the rows of 2 of 4
    "rows": (array(np.array([[3, 4, 5, 6]] * 3)), True, [[3, 4, 5, 6]] * 3),
    "flat": (array(np.arange(3, 12)), False, [[3, 4, 5, 6], [7, 8, 9, 10]]),
    "named": (array(0, input_ids=np.array([[3, 4, 5, 6]], np.uint16)), True, [[3, 4, 5, 6]]),
    "the only one": (array(0, arr_0=np.array([[3, 4, 5, 6]])), True, [[3, 4, 5, 6]]),
    "all count": (
        array(0, input_ids=np.array([[3, 4, 5, 6]]), attention_mask=np.ones((1, 4))),
        None,
        "cannot be read as numpy arrays (attention_mask.npy has 4 values of float64",
    ),
    "all of them count": (
        array(0, input_ids=np.array([[3, 4, 5, 6]]), attention_mask=np.ones((1, 4), bool)),
        True,
        [[3, 4, 5, 6]],
    ),
    "padded": (
        array(0, input_ids=np.array([[3, 4, 5], [0, 6, 7]]), attention_mask=np.array([[1, 1, 1], [0, 1, 1]])),
        False,
        [[3, 4, 5, 2]],
    ),
    "another shape": (
        array(0, input_ids=np.array([[3, 4]]), attention_mask=np.array([[1]])),
        None,
        "holds attention_mask of shape [1, 1] for input_ids of [1, 2]; expected 0 or 1 each",
    ),
    "no mask": (
        array(0, input_ids=np.array([[3, 4]]), attention_mask=np.array([[1, 2]])),
        None,
        "expected 0 or 1 each",
    ),
    "several": (
        array(0, a=np.array([[3]]), b=np.array([[4]])),
        None,
        "holds a, b and no input_ids; expected integers [rows, length] as input_ids, or name them by",
    ),
    "a pickle": (array(0, input_ids=np.array([{}])), None, "input_ids.npy has 1 values of object"),
    "no zip": (b"PK\x03\x04", None, "cannot be read as numpy arrays (File is not a zip file"),
    "floats": (array(0, input_ids=np.ones((1, 4))), None, "has 4 values of float64"),
}


@pytest.mark.parametrize(("content", "ready", "expected"), ARRAYS.values(), ids=ARRAYS.keys())
def test_arrays(content, ready, expected, model, tmp_path):
    path = tmp_path / ("x.npz" if content[:2] == b"PK" else "X.NPY")
    path.write_bytes(content)
    assert are_rows(path) == bool(ready)
    if ready is None:
        with pytest.raises(CalibrationError) as error:
            rows(path, model)
        assert expected in str(error.value) and path.name in str(error.value)
    else:
        assert rows(path, model).ids.tolist() == expected


def test_an_array_whose_header_says_more_than_there_is(model, tmp_path):
    import zipfile

    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<i8", "fortran_order": False, "shape": (1 << 20, 8)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as packed:
        packed.writestr("input_ids.npy", out.getvalue())
    with pytest.raises(
        CalibrationError, match=r"x\.npz cannot be read .*it ends after 0 of 67,108,864 bytes"
    ):
        rows(tmp_path / "x.npz", model)


REFUSED = {
    "a pickle": (
        "x.pt",
        pickle.dumps([1]),
        "unknown kind '.pt', it is a pickle, which can run code and is not",
    ),
    "another packing": (
        "x.jsonl.bz2",
        bz2.compress(lines(AB)),
        "unknown kind '.bz2', it is packed; unpack it",
    ),
    "a packed table of others": ("x.parquet.gz", b"", "unknown kind '.gz', unpack it; expected .txt"),
    "a packed archive": ("x.tar.gz", b"", "unknown kind '.gz', unpack it; expected .txt"),
    "a column twice": (
        "x.csv",
        b"text,id,text\na,1,b\n",
        "x.csv: several columns have the name text; expected each name once",
    ),
    "a column of Parquet twice": (
        "x.parquet",
        table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])),
        "x.parquet: several columns have the name text",
    ),
    "a column of Arrow twice": (
        "x.arrow",
        arrow(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])),
        "x.arrow: several columns have the name text",
    ),
    "an open quote": (
        "x.csv",
        b'id,text\n1,a\n2,"a\n3,b\n4,c\n',
        "x.csv: ends within a quoted field of document 2; expected a closing quote",
    ),
    "an open quote in the header": ("x.csv", b'id,"text\n1,a\n', "ends within a quoted field of its header"),
    "a message's text elsewhere": (
        "x.jsonl",
        lines({"messages": [USER, {"role": "assistant", "value": "b"}]}),
        "message 2 of `messages` has `value` and no `content`; expected its text as `content`",
    ),
    "a workbook": ("x.xlsx", b"PK", "it is a workbook; save the sheet as .csv"),
    "Latin-1": (
        "x.jsonl",
        '{"text": "a"}\n{"text": "caf\u00e9"}\n'.encode("latin-1"),
        "x.jsonl cannot be read (byte 0xe9 in line 2); expected UTF-8 text",
    ),
    "half of UTF-16": ("x.jsonl", b"\xff\xfe{\x00\x00\xd8a\x00", "x.jsonl cannot be read ('utf-16"),
    "no gzip": ("x.jsonl.gz", lines(AB), "x.jsonl.gz cannot be read (Not a gzipped file"),
    "cut gzip": ("x.jsonl.gz", gzip.compress(lines(AB) * 50)[:-20], "x.jsonl.gz cannot be read ("),
    "cut line": ("x.jsonl", lines(AB) + b'{"text": "a', "x.jsonl, line 2: not JSON (Unterminated string"),
    "cut object": ("x.json", pretty(AB, CD)[:-3], "x.json: ends within the document that begins in line 4"),
    "cut array": (
        "x.json",
        json.dumps([AB, CD], indent=1).encode()[:-2],
        "x.json: ends within the array that",
    ),
    "cut array of a line": ("x.json", json.dumps([AB, CD]).encode()[:-5], "x.json: ends within the document"),
    "no JSON": (
        "x.jsonl",
        b"hello\n",
        "x.jsonl, line 1: not JSON (Expecting value, at character 1); expected",
    ),
    "no JSON in an array": (
        "x.json",
        b'[{"text": "a"},\n {"text": b}]',
        "x.json, line 2: not JSON (Expecting v",
    ),
    "Python's quotes": ("x.json", b"[{'text': 'a'}]", "x.json, line 1: not JSON (Expecting property name"),
    "no comma": (
        "x.json",
        b'[{"text": "a"}\n{"text": "b"}]',
        "x.json, line 2: not JSON (Expecting ',' delim",
    ),
    "brackets that do not fit": ("x.json", b'{"text": "a"]}', "x.json, line 1: not JSON ("),
    "nothing": ("x.csv", b"", "x.csv holds no text; expected at least one row"),
    "a header alone": ("x.csv", b"text\n", "x.csv holds no text; expected at least one row"),
    "no Parquet": ("x.parquet", lines(AB), "x.parquet cannot be read as parquet ("),
    "no Arrow": ("x.arrow", lines(AB), "x.arrow cannot be read as Arrow ("),
    "cut Arrow": ("x.arrow", arrow([AB] * 9)[:500], "x.arrow cannot be read as Arrow ("),
    "other columns": (
        "x.csv",
        b"id,body\n1,a\n",
        "x.csv: 1 of 1 documents can't be used; the first: x.csv, document 1: has body (str), id (str)",
    ),
    "all of them": (
        "x.jsonl",
        b'{"text": "\\ud800"}\n' * 3,
        "x.jsonl: 3 of 3 documents can't be used; the first: x.jsonl, line 1: can't be used (a string in",
    ),
    "a mask of another length": (
        "x.jsonl",
        lines({"input_ids": [3, 4], "attention_mask": [1]}),
        "x.jsonl, document 1: `attention_mask` has 1 values for 2 token ids; expected as many",
    ),
    "a mask of something else": (
        "x.jsonl",
        lines({"input_ids": [3, 4], "attention_mask": [1, 5]}),
        "`attention_mask` holds 5; expected 0 and 1",
    ),
    "a mask of fewer rows": (
        "x.json",
        lines({"input_ids": [[3], [4]], "attention_mask": [[1]]}),
        "`attention_mask` does not have the 2 rows of `input_ids`",
    ),
    "floats": ("x.jsonl", lines({"input_ids": [3.0, 4.0]}), "`input_ids` holds 3.0; expected token ids"),
    "tools": ("x.jsonl", lines({"messages": [USER], "tools": "get"}), "`tools` is text that is not JSON"),
    "tools that are names": (
        "x.jsonl",
        lines({"messages": [USER], "tools": ["get"]}),
        "expected a list of obj",
    ),
    "variables": (
        "x.jsonl",
        lines({"messages": [USER], "chat_template_kwargs": {"chat_template": "x"}}),
        "`chat_template_kwargs` is {'chat_template': 'x'}; expected an object of variables",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(name, content, message, model, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError) as error:
        rows(tmp_path / name, model)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_packed_file_of_too_much(model, tmp_path, monkeypatch):
    monkeypatch.setattr(opened, "MOST_UNPACKED", 1 << 20)
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b" " * (4 << 20)))
    with pytest.raises(
        CalibrationError, match=r"x\.txt\.gz unpacks to more than 1,048,576 bytes, 128 times wh"
    ):
        rows(tmp_path / "x.txt.gz", model)


def test_long_values_over_lines_and_short_ones_in_chunks(tmp_path, monkeypatch):
    """Wherever a chunk ends: in a string, after a backslash, in a number."""
    from nemoquant.tokens import jsons

    documents = [{"n": 12345.5, "text": 'a "b\\' + " c" * n + "\u00e9\n"} for n in (0, 1, 30, 3)]
    expected = [document["text"] for document in documents]
    for content in (
        pretty(*documents),
        json.dumps(documents, indent=1).encode(),
        b"\n[1,\n2]" + pretty(*documents),
    ):
        (tmp_path / "x.json").write_bytes(content)
        for size in (1, 2, 3, 7, 100, 5000):
            monkeypatch.setattr(jsons, "CHUNK", size)
            found = [value for _, value in jsons.json_documents(tmp_path / "x.json", lambda row: True)]
            assert [v["text"] for v in found if isinstance(v, dict)] == expected
            assert [v for v in found if isinstance(v, list)] == [[1, 2]] * content.startswith(b"\n[1")


def test_a_line_is_as_long_as_its_documents_need(model, tmp_path, monkeypatch):
    """An array in one line may have any length; a document may not."""
    monkeypatch.setattr(opened, "MOST_LINE", 1000)
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"text": "a b c"}] * 1000))
    assert len(tokens(path, model)[0]) == 4000
    path.write_text(json.dumps([{"text": "a " * 30_000}, {"text": "a"}]))
    for content in (path.read_text(), json.dumps({"text": "a " * 30_000}, indent=1)):
        path.write_text(content)
        with pytest.raises(
            CalibrationError, match=r"x\.json, line \d: has more than 1,000 characters; cut the"
        ):
            tokens(path, model)


def test_an_array_is_read_element_by_element(model, tmp_path):
    """No more of it than is used: what comes after is not even JSON."""
    (tmp_path / "x.json").write_text("[\n" + '{"text": "a b c"},\n' * 100_000 + "no JSON")
    assert rows(tmp_path / "x.json", model).ids.tolist() == [[3, 4, 5, 2]] * 2


SKIPPED = {
    "half of a pair": b'{"text": "\\ud800"}\n',
    "twice": b'{"text": "a", "text": "b"}\n',
    "deep": b'{"text": ' + b"[" * 100 + b"]" * 100 + b"}\n",
    "no known column": lines({"body": "a"}),
    "a number": lines(5),
    "not text": lines({"text": 5}),
    "a mask of another length": lines({"input_ids": [3], "attention_mask": [1, 1]}),
    "no message": lines({"messages": []}),
    "a template that refuses": lines({"messages": [{"role": "narrator", "content": "a"}]}),
}


@pytest.mark.parametrize("line", SKIPPED.values(), ids=SKIPPED.keys())
def test_one_bad_document_is_left_out_and_told(line, model, tmp_path):
    (model / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'narrator' %}{{ raise_exception('no narrators') }}{% endif %}" + TEMPLATE
    )
    (tmp_path / "x.jsonl").write_bytes(lines(AB) + line + lines(CD))
    ids, said = tokens(tmp_path / "x.jsonl", model)
    assert ids == TWO
    assert len(said) == 1
    assert said[0].startswith(
        "x.jsonl: 1 of 3 documents can't be used and were left out; the first: x.jsonl, "
    )
    assert "document 2: " in said[0] or "line 2: " in said[0]


def test_the_place_of_a_bad_document_is_told_whatever_the_file_is_called(model, tmp_path):
    (tmp_path / "a, b.jsonl").write_bytes(
        lines({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]})
    )
    with pytest.raises(
        CalibrationError, match=r"the first: a, b\.jsonl, document 1: a tool call in message 1"
    ):
        tokens(tmp_path / "a, b.jsonl", model)


def test_most_documents_must_be_usable(model, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines(5) * 2 + lines(AB) * 2)
    assert tokens(tmp_path / "x.jsonl", model)[1][0].startswith("x.jsonl: 2 of 4 documents can't be used and")
    (tmp_path / "x.jsonl").write_bytes(lines(5) * 3 + lines(AB) * 2)
    with pytest.raises(
        CalibrationError, match=r"x\.jsonl: 3 of 5 documents can't be used; the first: x\.jsonl, "
    ):
        tokens(tmp_path / "x.jsonl", model)
    (tmp_path / "x.jsonl").write_bytes(lines(5) * 1000 + b"this is not even read")
    with pytest.raises(
        CalibrationError, match=r"none of the first 1,000 documents can be used: x\.jsonl, docum"
    ):
        tokens(tmp_path / "x.jsonl", model)


def test_a_csv_row_that_does_not_fit(model, tmp_path):
    (tmp_path / "x.csv").write_bytes(b"id,text\n1,a b\n2,a,b\n3,c d\n")
    ids, said = tokens(tmp_path / "x.csv", model)
    assert ids == TWO
    assert said[0].endswith("the first: x.csv, document 2: has 3 fields; the header names 2")


def test_a_csv_field_of_any_length(model, tmp_path):
    (tmp_path / "x.csv").write_text("text\n" + '"' + "a " * 200_000 + '"\n')
    assert len(tokens(tmp_path / "x.csv", model)[0]) == 200_001


NAMED = {
    "a text": (["body"], {"body": "a b", "text": "e"}, [3, 4]),
    "another known one": (["content"], {"content": "a b", "text": "e"}, [3, 4]),
    "messages": (["turns"], {"turns": [USER, ANSWER]}, CHAT),
    "messages as text": (["turns"], {"turns": json.dumps([USER, ANSWER])}, CHAT),
    "brackets in a text": (["body"], {"body": "[ a"}, [0, 3]),
    "ids": (["tokens"], {"tokens": [3, 4, 0], "attention_mask": [1, 1, 0]}, [3, 4]),
    "two": (["ask", "say"], {"ask": "a", "say": "b"}, CHAT),
    "two of messages": (["ask", "say"], {"ask": [USER], "say": [ANSWER]}, CHAT),
    "three": (["ask", "more", "say"], {"ask": "a", "more": "c", "say": "b"}, [8, 3, 5, 9, 4]),
}


@pytest.mark.parametrize(("columns", "row", "expected"), NAMED.values(), ids=NAMED.keys())
def test_columns_that_are_named(columns, row, expected, model, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines(row))
    (tmp_path / "x.parquet").write_bytes(table([row]))
    for name in ("x.jsonl", "x.parquet"):
        assert tokens(tmp_path / name, model, columns=columns)[0] == [*expected, 2]
        found = rows(tmp_path / name, model, 1, 1, columns=columns)
        assert found.source == f"{name}: {' + '.join(columns)}"


def test_a_column_that_is_not_there(model, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines(AB))
    with pytest.raises(
        CalibrationError, match=r"document 1: has no `body`, which --calib-column .* it has text"
    ):
        tokens(tmp_path / "x.jsonl", model, columns=["body"])


def test_columns_are_named_of_what_has_none(model, tmp_path):
    np.save(tmp_path / "x.npy", np.full((1, 2), 3))
    np.savez(tmp_path / "x.npz", input_ids=np.full((1, 2), 3))
    for name, content in (("x.txt", b"a b"), ("x.jsonl", lines("a b")), ("y.jsonl", lines([USER]))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CalibrationError, match="it has no columns, and so no body; leave"):
            tokens(tmp_path / name, model, columns=["body"])
    with pytest.raises(CalibrationError, match=r"x.npy is one array and has no body; leave out"):
        tokens(tmp_path / "x.npy", model, columns=["body"])
    with pytest.raises(CalibrationError, match=r"expected one name of --calib-column .* got input_ids, body"):
        tokens(tmp_path / "x.npz", model, columns=["input_ids", "body"])


def test_columns_are_named_of_what_has_some(model, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("a b")
    (folder / "b.jsonl").write_bytes(lines({"body": "c d"}))
    ids, said = tokens(folder, model, columns=["body"])
    assert ids == [3, 4, 2, 5, 6, 2]
    assert any("1 documents have no columns, --calib-column" in one for one in said)


USED = {
    "text": ([AB], "x.jsonl", ""),
    "messages": ([{"messages": [USER], "prompt": "a"}], "x.jsonl: messages", ""),
    "both": (
        [{"messages": [USER], "text": "a"}],
        "x.jsonl: messages",
        "`messages` was read, and `text` is there",
    ),
    "rendered": ([{"instruction": "a", "output": "b", "text": "e"}], "x.jsonl", "and `instruction` is there"),
    "alpaca": (
        [{"instruction": "a", "input": "c", "output": "b"}],
        "x.jsonl: instruction + input + output",
        "",
    ),
    "several": ([AB, {"article": "a"}, {"article": "b"}], "x.jsonl: article, text", ""),
}


@pytest.mark.parametrize(("found", "name", "said"), USED.values(), ids=USED.keys())
def test_what_was_read_is_told(found, name, said, model, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines(*found))
    made = rows(tmp_path / "x.jsonl", model, 10, 1)
    assert made.source == name
    warned = [
        text for text in made.warnings if "too; --calib-column (of diff: --data-column) chooses" in text
    ]
    assert len(warned) == bool(said) and said in "".join(warned)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_tables_without_their_extra(name, model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(MissingExtraError, match=rf"{name} needs the extra `parquet`: pip install"):
        rows(tmp_path / name, model)


def test_a_folder_with_what_is_no_file(model, tmp_path):
    (tmp_path / "x").mkdir()
    os.mkfifo(tmp_path / "x/a.jsonl")
    (tmp_path / "x/b.jsonl").write_bytes(lines(AB, CD))
    assert tokens(tmp_path / "x", model)[0] == TWO


def test_rows_without_a_text_are_empty(model, tmp_path):
    """As an empty text is: no token, and nothing to tell. Tables have them where other columns are filled."""
    for name, content in {
        "x.jsonl": lines({"text": None, "messages": None}, AB, {"text": None}, {"text": ""}, CD),
        "x.parquet": table([{"text": None, "id": 1}, AB, {"text": None}, {"text": ""}, CD]),
        "x.csv": b"text,id\n,1\na b,\n,\nc d,\n",
        "x.arrow": arrow([{"text": None, "id": 1}, AB, {"text": None}, {"text": ""}, CD]),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert tokens(tmp_path / name, model) == (TWO, ())
        assert rows(tmp_path / name, model, 1, 4).source == name


def test_an_array_of_rows_that_have_roles_is_no_conversation(model, tmp_path):
    rows_of_messages = [
        {"text": "a b", "role": "user", "content": None},
        {"text": "c d", "role": "assistant"},
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows_of_messages))
    assert tokens(tmp_path / "x.json", model)[0] == TWO

"""Documents of a file: cut before they are tokenized, read within bounds, refused with their place."""

import json
import os
import random

import numpy as np
import pytest
from support.measured import child, needs_proc
from support.places import DEMO

from nemoquant.errors import CalibrationError
from nemoquant.model.parse import load_config
from nemoquant.tokens import opened, tables
from nemoquant.tokens.documents import documents
from nemoquant.tokens.named import given
from nemoquant.tokens.rows import load_rows
from tests.faults import fuzz, parsers

PEAK = """
from nemoquant.model.parse import load_config
from nemoquant.tokens.rows import load_rows
from nemoquant.errors import CalibrationError
model, path = map(Path, sys.argv[1:])
config, _ = load_config(model)
before = memory()
try:
    ids = load_rows(path, model, config, 1, 128).ids.tolist()
except CalibrationError as error:
    ids = str(error)
print(json.dumps([ids, memory() - before]))
"""
LINE = 100_000_000  # characters
LARGE = {  # memory in MB that reading and tokenizing may take; the text is 100 MB
    "one word.txt": ("a" * LINE, 120),
    "words.txt": ("word " * (LINE // 5), 60),
    "words.jsonl": (json.dumps({"text": "word " * (LINE // 5)}), 400),
    "a smile.jsonl": (json.dumps({"text": "word " * 3_000_000 + "\U0001f600"}, ensure_ascii=False), 250),
}


@needs_proc
@pytest.mark.parametrize("name", LARGE)
def test_memory_of_a_long_line(name, tmp_path):
    content, most = LARGE[name]
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    ids, took = child(PEAK, DEMO, path)
    assert took < most * 1e6
    assert np.shape(ids) == (1, 128)


def test_a_line_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(opened, "MOST_LINE", 1000)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": "word " * 200}))
    with pytest.raises(CalibrationError) as error:
        list(documents(given(tmp_path / "x.jsonl"), DEMO))
    assert str(error.value) == (
        "x.jsonl, line 2: has more than 1,000 characters; cut the document into several, or give it as .txt, "
        "which may have any size"
    )


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_a_byte_order_mark_is_no_text(name, tmp_path):
    text = '{"text": "It is a truth."}' if name == "x.jsonl" else "It is a truth."
    found = []
    for mark in ("", "\ufeff"):
        (tmp_path / name).write_text(mark + text, encoding="utf-8")
        found.append([list(document) for document in documents(given(tmp_path / name), DEMO)])
    assert found[0] == found[1]


@needs_proc
def test_memory_of_a_long_parquet_row(tmp_path):
    import pyarrow
    from pyarrow import parquet

    words = pyarrow.table({"text": ["word " * 3_000_000] * 8, "other": ["x" * 5_000_000] * 8})
    parquet.write_table(words, tmp_path / "words.parquet")
    ids, took = child(PEAK, DEMO, tmp_path / "words.parquet")
    assert np.shape(ids) == (1, 128)
    assert took < 150e6
    parquet.write_table(pyarrow.table({"text": ["a", "a" * 20_000_000]}), tmp_path / "x.parquet")
    ids, _ = child(PEAK, DEMO, tmp_path / "x.parquet")
    assert ids.startswith(
        "x.parquet, document 2: has more than 16,777,216 bytes; cut it into several, or give"
    )


def test_a_parquet_page_that_would_fill_the_memory(tmp_path, monkeypatch):
    """Each page is unpacked whole, a small file to any size."""
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(tables, "MOST_UNPACKED", 1 << 20)
    table = pyarrow.table({"text": ["a" * 1_100_000], "other": ["x" * 2_000_000]})
    parquet.write_table(table, tmp_path / "x.parquet", compression="zstd")
    with pytest.raises(
        CalibrationError,
        match=r"x.parquet: row group 0 unpacks to 3,\d\d\d,\d\d\d bytes, of [\d,]+ that a group has .*; "
        r"expected at most 1,048,576, write it with smaller row groups",
    ):
        list(documents(given(tmp_path / "x.parquet"), DEMO))
    table = pyarrow.table({"text": [draw.randbytes(600_000).hex() for draw in [random.Random(0)]]})
    parquet.write_table(table, tmp_path / "x.parquet", compression="zstd")
    assert len(list(documents(given(tmp_path / "x.parquet"), DEMO))) == 1  # a large one may


def test_damaged_statistics_of_a_column_do_not_end_the_process(tmp_path):
    """pyarrow's table of columns throws where nobody catches; a case that the fuzzer found."""
    (tmp_path / "x.parquet").write_bytes(fuzz.case("parquet", parsers._parquet(), 2027, 365))
    with pytest.raises(CalibrationError, match="histogram size mismatch"):
        list(documents(given(tmp_path / "x.parquet"), DEMO))


def test_no_more_of_a_text_is_read_than_is_used(tmp_path):
    """The file's end is not UTF-8."""
    (tmp_path / "x.txt").write_bytes(b"word " * (1 << 20) + b"\xff")
    config, _ = load_config(DEMO)
    assert load_rows(tmp_path / "x.txt", DEMO, config, 2, 64).ids.shape == (2, 64)


DAMAGED = {
    "deep": (
        b'{"text": ' + b"[" * 100_000,
        "line 2: can't be used (it is nested too deeply; expected at most 64 lists",
    ),
    "surrogate": (
        b'{"text": "\\ud800"}',
        "line 2: can't be used (a string in it has half of a surrogate pair",
    ),
    "surrogate name": (b'{"\\udc00": "a"}', "line 2: can't be used (a string in it has half of a surrogate"),
    "digits": (b'{"input_ids": [' + b"1" * 5000 + b"]}", "line 2: can't be used (Exceeds the limit"),
    "twice": (b'{"text": "a", "text": "b"}', "line 2: can't be used (duplicate key 'text')"),
    "bytes": (
        b'{"text": "\xed\xa0\x80"}',
        "x.jsonl cannot be read (byte 0xed in line 2); expected UTF-8 text",
    ),
    "many names": (
        json.dumps({f"key{i:06}": 0 for i in range(100_000)}).encode(),
        "(int), key000002 (int), key000003 (int), key000004 (int) and 99995 more; expected `text`",
    ),
    "text": (b'{"text": ["a"]}', "document 2: has text (list); expected `text` (str)"),
    "number": (b'{"text": 1e999}', "document 2: has text (float); expected `text` (str)"),
    "true": (b'{"input_ids": [true]}', "document 2: `input_ids` holds True; expected token ids"),
    "wide": (b'{"input_ids": ["' + b"x" * 10_000_000 + b'"]}', "document 2: `input_ids` holds 'xxxx"),
}


@pytest.mark.parametrize(("line", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_lines(line, message, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n' + line + b"\n")
    config, _ = load_config(DEMO)
    with pytest.raises(CalibrationError) as error:
        load_rows(tmp_path / "x.jsonl", DEMO, config)
    assert message in str(error.value)
    assert "x.jsonl" in str(error.value)
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)


def test_a_byte_of_a_text_is_found_in_its_line(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"line\n" * 100_000 + b"and \xfe this\n")
    config, _ = load_config(DEMO)
    with pytest.raises(
        CalibrationError, match=r"x\.txt cannot be read \(byte 0xfe in line 100001\); expected"
    ):
        load_rows(tmp_path / "x.txt", DEMO, config, 4000, 512)


@pytest.mark.parametrize("values", [[b"\xff"], [1.5], [["a"]]], ids=["bytes", "floats", "lists"])
def test_parquet_columns_of_other_types(values, tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "x.parquet")
    config, _ = load_config(DEMO)
    with pytest.raises(
        CalibrationError, match=r"x\.parquet, document 1: has text \((bytes|float|list)\); expec"
    ):
        load_rows(tmp_path / "x.parquet", DEMO, config)


def test_parquet_text_that_is_not_utf8(tmp_path):
    import pyarrow
    from pyarrow import parquet

    bad = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(np.array([0, 1], np.int32)), pyarrow.py_buffer(b"\xff")]
    )
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "x.parquet")
    config, _ = load_config(DEMO)
    with pytest.raises(
        CalibrationError, match=r"x\.parquet cannot be read as parquet \(.*codec can't decode"
    ):
        load_rows(tmp_path / "x.parquet", DEMO, config)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.parquet"])
def test_what_is_no_file(name, tmp_path):
    os.mkfifo(tmp_path / name)
    config, _ = load_config(DEMO)
    with pytest.raises(CalibrationError, match="is not a file; expected"):
        load_rows(tmp_path / name, DEMO, config)

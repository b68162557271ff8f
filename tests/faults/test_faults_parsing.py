"""What every parser shares: JSON within bounds, and values of any size in a message."""

import errno
import os
import time
from contextlib import nullcontext

import pytest
from pydantic import BaseModel, ValidationError

from nemoquant.errors import brief, field_problem, schema_problem
from nemoquant.files import MOST_DEPTH, parse_json, read_json, read_text, sync_folder


@pytest.mark.parametrize("open_", ["[", '{"a":', '[{"a":'])
def test_json_is_nested_as_deep_as_the_bound_and_no_deeper(open_):
    levels = open_.count("[") + open_.count("{")
    close = open_.replace('"a":', "").replace("[", "]").replace("{", "}")[::-1]

    def text(depth):
        return open_ * (depth // levels) + "[]" + close * (depth // levels)

    assert parse_json(text(MOST_DEPTH - levels)) is not None
    for depth in (MOST_DEPTH, 900, 100_000):
        with pytest.raises(ValueError, match="nested too deeply; expected at most 64 lists and objects"):
            parse_json(text(depth))


def test_many_values_take_no_longer_for_the_bound():
    data = "[" + ",".join(['{"a":[1,2],"b":"c"}'] * 100_000) + "]"
    began = time.process_time()
    assert len(parse_json(data)) == 100_000
    assert time.process_time() - began < 3


def test_a_file_is_a_regular_one_of_a_size(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            read_json(tmp_path / path)
    (tmp_path / "long").write_text("x" * 11)
    assert len(read_text(tmp_path / "long", 11)) == 11
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_text(tmp_path / "long", 10)


class _Record(BaseModel):
    size: int
    names: dict[str, list[int]] = {}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3, "3"),
        ("wide", "'wide'"),
        (None, "None"),
        (10**40, "1" + "0" * 40),
        pytest.param(10**5000, "<16,610 bits>", id="digits"),
        ("\ud800", r"'\ud800'"),
        ([[[[[[1]]]]]], "[[[[...]]]]"),
        ({"a": [1, 2]}, "{'a': [1, 2]}"),
    ],
)
def test_a_value_in_a_message(value, shown):
    assert brief(value) == shown


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, [0] * 10**6, dict.fromkeys(range(10**5)), b"x" * 10**6, 1 << 10**6, [["x" * 999] * 9] * 9],
    ids=["text", "list", "dict", "bytes", "number", "lists"],
)
def test_a_long_value_in_a_message_is_cut_at_once(value):
    began = time.process_time()
    assert len(brief(value)) <= 200
    assert time.process_time() - began < 0.1


def test_a_deep_value_in_a_message():
    value = []
    for _ in range(100_000):
        value = [value]
    assert brief(value) == "[[[[...]]]]"
    while value:  # one after the other: freeing all at once would exhaust the stack of some versions
        value = value[0]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({}, "`size`: field required"),
        ([], "`the whole` is []: input should be a valid dictionary"),
        ({"size": "x" * 1000}, "`size` is 'xxx"),
        (
            {"size": 1, "names": {"a" * 1000: 3}},
            "`names." + "a" * 80 + "` is 3: input should be a valid list",
        ),
        (
            {"size": None, "names": {"a": ["b", "c"]}},
            "`size` is None: input should be a valid integer, and 2 more",
        ),
    ],
)
def test_the_first_problem_of_a_record(data, problem):
    with pytest.raises(ValidationError) as error:
        _Record.model_validate(data, strict=True)
    line = field_problem(error.value)
    assert line.startswith(problem)
    assert len(line) < 400 and "\n" not in line


@pytest.mark.parametrize("value", ["{}", "[]", '"a"', '{"b":1}'])
def test_entries_are_counted_before_they_are_made(value):
    text = "[" + ",".join([value] * 1000) + "]"
    entries = 1000 + (1000 if value[0] in "{[" else 0)
    assert len(parse_json(text, entries=entries)) == 1000
    with pytest.raises(ValueError, match=f"more than {entries - 1:,} entries"):
        parse_json(text, entries=entries - 1)


def test_of_many_wrong_values_none_is_looked_for():
    """pydantic would make all of them, to show the first."""

    class Numbers(BaseModel):
        them: dict[str, int]

    data = {"them": {str(i): "x" for i in range(200_000)}}
    began = time.process_time()
    assert schema_problem(Numbers.model_validate, data) == (
        "200,000 of its values are not of the kind that they should be"
    )
    assert time.process_time() - began < 1
    assert schema_problem(Numbers.model_validate, {"them": {"a": 1}}) is None


@pytest.mark.parametrize(("code", "raised"), [("EIO", True), ("ENOSPC", True), ("EINVAL", False)])
def test_a_disk_that_fails_to_keep_a_name_is_told(code, raised, tmp_path, monkeypatch):
    """Where a file system has no such call, there is nothing to tell."""

    def fail(_):
        raise OSError(getattr(errno, code), "no")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=str(tmp_path)) if raised else nullcontext():
        sync_folder(tmp_path)

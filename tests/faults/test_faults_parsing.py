"""What every parser shares: JSON within bounds, and values of any size in a message."""

import os
import time

import pytest
from pydantic import BaseModel, ValidationError

from nemoquant.errors import brief, field_problem
from nemoquant.files import MOST_DEPTH, parse_json, read_json, read_text


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
        ([], "`the whole` is []: input should be a valid dictionary or instance of _Record"),
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

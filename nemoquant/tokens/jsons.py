"""JSON as people keep documents in it, as one value a document.

    a value a line                           .jsonl, .ndjson; .json too
    an array, on one line or many            its elements, one at a time
    values over several lines, one after another
    an object that holds one array           its elements: ``{"data": [...]}``

An array of messages is one conversation, an array of numbers one document of token ids. Only the document
that is read is in memory, but for the object that holds an array.

A line that is no JSON is a damaged file, and an error; JSON that can't be used (half of a surrogate pair, a
key twice, nested without end) is a document that is left out.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from nemoquant.errors import CalibrationError
from nemoquant.files import parse_json
from nemoquant.tokens import opened
from nemoquant.tokens.opened import check_characters, open_text, too_long
from nemoquant.tokens.unusable import DocumentError

MOST_ENTRIES = 6 << 20  # of a document, commas of its text too: an object takes 20 times its size in the file
WRAPPERS = ("train", "data", "rows", "examples", "samples", "instances", "documents")
CHUNK = 1 << 16  # characters
_MARK = re.compile(r'[\[\]{}"]')
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SCALAR = re.compile(r'[^\s,\[\]{}"]+')
_SPACE = re.compile(r"\s*")


def json_documents(path: Path, is_document: Callable[[dict[str, Any]], bool]) -> Iterator[tuple[int, Any]]:
    """Values with their numbers from 1, which are those of lines where there is one a line.

    A value that can't be used is the DocumentError that says why.

    Args:
        is_document: whether an object is a document by itself; one that is not may hold them.
    Raises:
        CalibrationError: the file can't be read, or is not JSON.
    """
    with open_text(path) as file:
        first = _first_line(file, path)
        if first is None:
            return
        number, line = first
        if len(line) <= opened.MOST_LINE:  # a longer one may be an array of any number of documents
            try:
                value = _parsed(line, path, number)
            except json.JSONDecodeError:
                pass
            else:
                yield from _by_line(file, path, number, value, is_document)
                return
        yield from _values(_Scanner(file, path, line, number), is_document)


def _first_line(file: TextIO, path: Path) -> tuple[int, str] | None:
    """The first line that is not blank, with its number."""
    number = 0
    while line := file.readline(opened.MOST_LINE + 1):
        number += 1
        if line.strip():
            check_characters(line, path, number)
            return number, line
    return None


def _parsed(text: str, path: Path, line: int) -> Any:
    """A JSON value, or the DocumentError that says why it can't be used; JSONDecodeError where it is none."""
    try:
        return parse_json(text, entries=MOST_ENTRIES)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        return DocumentError(
            f"{path.name}, line {line}: can't be used ({error}); expected one JSON object a line"
        )


def _no_json(path: Path, line: int, message: str, column: int) -> CalibrationError:
    return CalibrationError(
        f"{path.name}, line {line}: not JSON ({message}, at character {column}); expected one JSON object a "
        f"line, or an array of them"
    )


def _by_line(
    file: TextIO, path: Path, number: int, value: Any, is_document: Callable[[dict[str, Any]], bool]
) -> Iterator[tuple[int, Any]]:
    """A value a line, from the first one on."""
    alone = True
    while True:
        line, coming = "", number
        while text := file.readline(opened.MOST_LINE + 1):
            coming += 1
            if len(text) > opened.MOST_LINE:
                raise too_long(path, coming)
            if text.strip():
                check_characters(text, path, coming)
                line = text
                break
        if alone and not line and isinstance(value, dict) and not is_document(value):
            value = unwrapped(value)
        if is_array_of_documents(value):
            yield from enumerate(value, 1)
        else:
            yield number, value
        if not line:
            return
        alone, number = False, coming
        try:
            value = _parsed(line, path, number)
        except json.JSONDecodeError as error:
            raise _no_json(path, number, error.msg, error.pos + 1) from None


def is_array_of_documents(value: Any) -> bool:
    """Whether a list holds a document in each element; else it is one: messages, or token ids."""
    return isinstance(value, list) and not (value and _is_part(value[0]))


def _is_part(element: Any) -> bool:
    """Whether an element of an array is a part of a document: a message of a conversation, or a token id."""
    if isinstance(element, dict):
        return {"from", "value"} <= element.keys() or (
            "role" in element and bool(element.get("content") or element.get("tool_calls"))
        )
    return isinstance(element, int | float)


def unwrapped(value: dict[str, Any]) -> Any:
    """The documents in an object that holds them in one array, or in one of the usual names; else itself."""
    arrays = {
        name: inside
        for name, inside in value.items()
        if isinstance(inside, list) and inside and isinstance(inside[0], dict | str | list)
    }
    for name in (*WRAPPERS, *(arrays if len(arrays) == 1 else ())):
        if name in arrays:
            return arrays[name]
    return value


class _Scanner:
    """Finds where JSON values end, before they are made; ``line`` is where the next one begins."""

    def __init__(self, file: TextIO, path: Path, begin: str, line: int) -> None:
        self.path, self.line = path, line
        self._file, self._text, self._at, self._more = file, begin, 0, True

    def _grow(self) -> bool:
        """Read on; whether there was more."""
        if len(self._text) - self._at > opened.MOST_LINE:
            raise too_long(self.path, self.line)
        chunk = self._file.read(max(CHUNK, len(self._text) - self._at)) if self._more else ""
        self._more = bool(chunk)
        check_characters(chunk, self.path, self.line + self._text.count("\n", self._at))
        self._text, self._at = self._text[self._at :] + chunk, 0
        return self._more

    def _pass(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._pass(found.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._grow():
                return ""

    def skip(self) -> None:
        """Pass the character that :meth:`peek` showed."""
        self._at += 1

    def take(self) -> Any:
        """The value that begins with what :meth:`peek` showed; see :func:`_parsed`.

        Raises:
            CalibrationError: it is not JSON, or ends with the file.
        """
        end = self._end()
        text, line = self._text[self._at : end], self.line
        if len(text) > opened.MOST_LINE:
            raise too_long(self.path, line)
        self._pass(end)
        try:
            return _parsed(text, self.path, line)
        except json.JSONDecodeError as error:
            raise _no_json(self.path, line + error.lineno - 1, error.msg, error.colno) from None

    def _end(self) -> int:
        """Where the value at ``_at`` ends: what is found wrong with it later may be before that."""
        if self._text[self._at] not in '[{"':
            found = _SCALAR.match(self._text, self._at)
            while found and found.end() == len(self._text) and self._grow():
                found = _SCALAR.match(self._text, self._at)
            return found.end() if found else self._at + 1
        depth, seen = 0, 0  # the latter counted from ``_at``, which moves
        while True:
            mark = _MARK.search(self._text, self._at + seen)
            if mark is None:
                seen = len(self._text) - self._at
            elif mark[0] == '"':
                seen = mark.start() - self._at
                mark = _STRING.match(self._text, mark.start())
            if mark is not None:
                depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark[0], 0)
                seen = mark.end() - self._at
                if depth <= 0:
                    return mark.end()
            elif not self._grow():
                raise CalibrationError(
                    f"{self.path.name}: ends within the document that begins in line {self.line}; expected "
                    f"JSON, is the file cut?"
                )


def _values(scanner: _Scanner, is_document: Callable[[dict[str, Any]], bool]) -> Iterator[tuple[int, Any]]:
    """Values over any number of lines, and the elements of arrays."""
    number = 0
    while begins := scanner.peek():
        if begins == "[":
            scanner.skip()
            for value in _elements(scanner):
                number += 1
                yield number, value
            continue
        value = scanner.take()
        if not number and isinstance(value, dict) and not is_document(value) and not scanner.peek():
            value = unwrapped(value)
        if is_array_of_documents(value):
            yield from enumerate(value, 1)
            continue
        number += 1
        yield number, value


def _elements(scanner: _Scanner) -> Iterator[Any]:
    """The elements of an array that has begun; one list of them where they are parts of a document."""
    begun, parts = scanner.line, []
    is_first, is_whole = True, False
    while (next_one := scanner.peek()) != "]":
        if not next_one:
            raise CalibrationError(
                f"{scanner.path.name}: ends within the array that begins in line {begun}; expected JSON, is "
                f"the file cut?"
            )
        value = scanner.take()
        if is_first:
            is_first, is_whole = False, _is_part(value)
        if is_whole:
            parts.append(value)
            if len(parts) > MOST_ENTRIES:
                raise too_long(scanner.path, begun)
        else:
            yield value
        separator = scanner.peek()
        if separator == ",":
            scanner.skip()
        elif separator and separator != "]":
            raise _no_json(scanner.path, scanner.line, "Expecting ',' delimiter", 1)
    scanner.skip()
    if is_whole:
        refused = next((part for part in parts if isinstance(part, DocumentError)), None)
        yield refused or parts

"""Documents of a file as token ids, in pieces: no more of a file is read or tokenized than is used.

    .txt       one document
    .jsonl     one document per line: {"text": ...}, {"messages": [...]} through the chat template,
               or {"input_ids": [...]}
    .parquet   the same by columns (extra `parquet`)

A .txt may be of any size, it is read as it is used. A document of the other kinds is in memory as a whole,
and bounded.
"""

import json
import os
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from nemoquant.errors import CalibrationError, MissingExtraError, listing
from nemoquant.files import open_regular, parse_json
from nemoquant.tokens.template import ChatTemplate
from nemoquant.tokens.tokenizer import encode, load_tokenizer

MOST_LINE = 100 << 20  # characters of a line of .jsonl: it and its text are in memory, at 1 to 4 bytes each
MOST_ENTRIES = 6 << 20  # of a line, commas of its text too: an object takes 20 times its size in the file
MOST_ROW = 16 << 20  # bytes of a row of .parquet
MOST_UNPACKED = 128 << 20  # bytes of a row group of .parquet, or
MOST_RATIO = 16  # times as many as it has in the file
PIECE_CHARS = 1 << 16  # at least, of a text that goes on
MOST_PIECE = 1 << 18  # a tokenizer takes some 100 bytes for each
LINE_END = re.compile(r"(?<=\S)\n(?=[^\s/])")
WORD_END = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")
COLUMNS = ("input_ids", "text", "messages")


def documents(path: Path, model: Path) -> Generator[Iterable[list[int]]]:
    """Token ids of each document, in pieces that are tokenized on demand.

    To be closed: the chat template has a process.

    Args:
        model: the folder that holds tokenizer and chat template.
    Raises:
        CalibrationError: an unreadable file, or a document that is none of the above.
        MissingExtraError: a .parquet file without the extra.
    """
    tokenizer: Any = None
    if path.suffix == ".txt":
        yield map(partial(encode, load_tokenizer(model)), pieces(_characters(path)))
        return
    template: ChatTemplate | None = None
    with ExitStack() as stack:
        for number, document in _objects(path):
            where = f"{path.name}, document {number}"
            if isinstance(document.get("input_ids"), list):
                yield [_ids(document["input_ids"], where)]
                continue
            text = document.get("text")
            if text is None and isinstance(document.get("messages"), list):
                template = template or stack.enter_context(ChatTemplate(model))
                text = template.render(document["messages"], where)
            if not isinstance(text, str):
                kinds = [f"{key} ({type(value).__name__})" for key, value in sorted(document.items())]
                raise CalibrationError(
                    f"{where}: has {listing(kinds) or 'nothing'}; expected `text` (str), `messages` (list) "
                    f"or `input_ids` (list)"
                )
            tokenizer = tokenizer or load_tokenizer(model)
            slices = (text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS))
            yield map(partial(encode, tokenizer), pieces(slices))


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """A text, which comes in chunks, in pieces that can be tokenized one by one.

    A cut is after a single line break between two other characters, the first after ``PIECE_CHARS``: no
    tokenizer of this family joins tokens across one, but where a slash follows (some take ``;\n//`` as one).
    Where there is none before ``MOST_PIECE``, it is between
    two words, before a space between two letters: there tokens of this family begin as well. Where there is
    no such place either, it is at ``MOST_PIECE``, and the tokens around the cut may differ from those of the
    whole text.
    """
    coming, text, more = iter(chunks), "", True
    while True:
        while more and len(text) <= MOST_PIECE:  # one character more than a piece: a cut looks at it
            chunk = next(coming, None)
            more = chunk is not None
            text += chunk or ""
        if len(text) <= PIECE_CHARS:
            break
        end = _end(LINE_END, text)
        if end is None and len(text) <= MOST_PIECE:
            break
        end = end or _end(WORD_END, text) or MOST_PIECE
        yield text[:end]
        text = text[end:]
    yield text


def _end(place: re.Pattern[str], text: str) -> int | None:
    """Where the first such place is that a piece may end at."""
    found = place.search(text, PIECE_CHARS, MOST_PIECE + 1)
    return found and found.end()


def _ids(ids: list[Any], where: str) -> list[int]:
    for i in ids:
        if type(i) is not int or not 0 <= i < 1 << 31:
            raise CalibrationError(f"{where}: `input_ids` holds {i!r:.200}; expected token ids")
    return ids


def _open(path: Path) -> TextIO:
    """A text file, without its byte order mark.

    Bytes that are not UTF-8 become lone surrogates, which :func:`_check_utf8` finds.
    """
    return os.fdopen(open_regular(path), encoding="utf-8-sig", errors="surrogateescape")


def _check_utf8(text: str, path: Path, line: int) -> None:
    """Raises CalibrationError, with its line, for a byte that was not UTF-8; the text begins in ``line``."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        line += text.count("\n", 0, error.start)
        raise CalibrationError(
            f"{path} cannot be read (byte 0x{ord(text[error.start]) & 0xFF:02x} in line {line}); "
            f"expected UTF-8 text"
        ) from None


def _characters(path: Path) -> Iterator[str]:
    """The text of a file, as much of it at a time as a piece has."""
    line = 1
    try:
        with _open(path) as file:
            while chunk := file.read(PIECE_CHARS):
                _check_utf8(chunk, path, line)
                yield chunk
                line += chunk.count("\n")
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({error}); expected UTF-8 text") from None


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Documents as mappings, with their numbers from 1."""
    if path.suffix == ".jsonl":
        yield from _lines(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    else:
        raise CalibrationError(
            f"{path}: unknown kind {path.suffix!r}; expected .txt, .jsonl, .parquet or .npy"
        )


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(MOST_LINE + 1):
                number += 1
                if len(line) > MOST_LINE:
                    raise CalibrationError(
                        f"{path.name}, line {number}: has more than {MOST_LINE:,} characters; cut the "
                        f"document into several, or give it as .txt, which may have any size"
                    )
                if line.strip():
                    _check_utf8(line, path, number)
                    document = _object(line, f"{path.name}, line {number}")
                    line = ""  # it may be as large as its text
                    yield number, document
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({error}); expected UTF-8 text") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        document = parse_json(line, entries=MOST_ENTRIES)
    except json.JSONDecodeError as error:
        raise CalibrationError(
            f"{where}: not JSON ({error.msg}, at character {error.pos + 1}); expected one JSON object a line"
        ) from None
    except ValueError as error:
        raise CalibrationError(f"{where}: can't be used ({error}); expected one JSON object a line") from None
    if not isinstance(document, dict):
        raise CalibrationError(f"{where}: a JSON {type(document).__name__}, expected an object")
    return document


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows, one at a time and read as they are used: a row can be as large as a document may be."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError(
            f"{path.name} needs the extra `parquet`: pip install 'nemoquant[parquet]'"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            known = [name for name in COLUMNS if name in file.schema_arrow.names]
            for group in range(file.num_row_groups):
                _check_pages(file.metadata, group, path)
                for batch in file.iter_batches(1, [group], known or None, use_threads=False):
                    columns = (  # a column of categories has all of them in each batch, only one is used
                        column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
                        for column in batch.columns
                    )
                    if sum(column.get_total_buffer_size() for column in columns) > MOST_ROW:
                        raise CalibrationError(
                            f"{path.name}, document {number + 1}: has more than {MOST_ROW:,} bytes; cut it "
                            f"into several, or give it as .txt, which may have any size"
                        )
                    document = batch.to_pylist()[0]
                    number += 1
                    yield number, document
    except CalibrationError:
        raise
    except Exception as error:  # without a common base: of a date beyond Python's it is an OverflowError
        raise CalibrationError(
            f"{path} cannot be read as parquet ({error}), after {number} documents"
        ) from None


def _check_pages(metadata: Any, number: int, path: Path) -> None:
    """Raises CalibrationError if a row group may have a page that fills the memory.

    A page is unpacked whole, three times its size; its size is in no table, but that of all pages of the
    group. Much text compresses to a quarter. Not by column: pyarrow ends the process where a column's
    statistics are damaged.
    """
    unpacked = metadata.row_group(number).total_byte_size
    in_file = path.stat().st_size // metadata.num_row_groups
    if unpacked > max(MOST_UNPACKED, MOST_RATIO * in_file):
        raise CalibrationError(
            f"{path.name}: row group {number} unpacks to {unpacked:,} bytes, of {in_file:,} that a group has "
            f"in the file on average; expected at most {MOST_UNPACKED:,}, write it with smaller row groups"
        )

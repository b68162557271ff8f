"""Rows of tables as mappings: .csv and .tsv, Parquet, Arrow files as ``datasets`` saves them.

One row at a time is made: a row may be as large as a document may be.
"""

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from nemoquant.errors import CalibrationError, MissingExtraError, listing
from nemoquant.tokens import opened
from nemoquant.tokens.kinds import ending
from nemoquant.tokens.opened import lines
from nemoquant.tokens.unusable import DocumentError

MOST_ROW = 16 << 20  # bytes of a row of Parquet or Arrow
MOST_UNPACKED = 128 << 20  # bytes of a row group of Parquet, or
MOST_RATIO = 16  # times as many as it has in the file
DELIMITERS = (",", ";", "\t", "|")  # spreadsheets of half of Europe write the second


def separated(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a .csv or .tsv file, whose first line names the columns, with their numbers from 1.

    A row that does not fit the header is the DocumentError that says so. Spaces around the header's names,
    and after delimiters where it has some there, are none of theirs.

    Raises:
        CalibrationError: it can't be read, its header names a column twice, or it ends within a quoted field.
    """
    # A setting of the process, whose default of 131,072 characters is no more than a long article.
    csv.field_size_limit(max(csv.field_size_limit(), opened.MOST_LINE))
    content = _Lines(lines(path))
    header = next((line for line in content if line.strip()), None)
    if header is None:
        return
    delimiter = max(DELIMITERS, key=header.count) if ending(path) == ".csv" else "\t"
    spaced = f"{delimiter} " in header
    number = 0
    try:
        table = csv.reader(chain([header], content), delimiter=delimiter, skipinitialspace=spaced)
        names = [name.strip() for name in next(table)]
        _check_closed(content, path, "its header")
        _check_names(names, path)
        for row in table:
            if not row:
                continue
            number += 1
            _check_closed(content, path, f"document {number}")
            if len(row) != len(names):
                yield (
                    number,
                    DocumentError(
                        f"{path.name}, document {number}: has {len(row)} fields; the header names "
                        f"{len(names)}"
                    ),
                )
            else:
                yield number, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise CalibrationError(
            f"{path} cannot be read as {ending(path)} ({error}), after {number} documents"
        ) from None


class _Lines:
    """Lines; ``ended`` after somebody asked for one more than there are."""

    def __init__(self, content: Iterator[str]) -> None:
        self._content, self.ended = content, False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._content, None)
        if line is None:
            self.ended = True
            raise StopIteration
        return line


def _check_closed(content: _Lines, path: Path, where: str) -> None:
    """Raises CalibrationError if a row took what is left of a file: a whole one is made without asking on."""
    if content.ended:
        raise CalibrationError(
            f"{path}: ends within a quoted field of {where}; expected a closing quote, and quotes inside "
            f"quotes doubled; is the file cut?"
        )


def _check_names(names: Sequence[str], path: Path) -> None:
    """Raises CalibrationError if two columns have one name: only one of them would be read."""
    if repeated := [name for name, count in Counter(names).items() if count > 1 and name]:
        raise CalibrationError(
            f"{path}: several columns have the name {listing(repeated)}; expected each name once, rename the "
            f"others"
        )


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise MissingExtraError(
            f"{path.name} needs the extra `parquet`: pip install 'nemoquant[parquet]'"
        ) from None
    return pyarrow


def parquet(path: Path, known: Callable[[Sequence[str]], list[str]]) -> Iterator[tuple[int, Any]]:
    """Rows of a Parquet file, read as they are used, with their numbers from 1.

    Args:
        known: the columns to read, of those that there are.
    Raises:
        CalibrationError: it can't be read. MissingExtraError
    """
    _pyarrow(path)
    from pyarrow import parquet as reader

    number = 0
    try:
        with reader.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = known(file.schema_arrow.names)
            _check_names(names, path)
            for group in range(file.num_row_groups):
                _check_pages(file.metadata, group, path)
                for batch in file.iter_batches(1, [group], names, use_threads=False):
                    number += 1
                    yield number, _row(batch, f"{path.name}, document {number}")
    except CalibrationError:
        raise
    except Exception as error:  # without a common base: of a date beyond Python's it is an OverflowError
        raise CalibrationError(
            f"{path} cannot be read as parquet ({error}), after {max(0, number)} documents"
        ) from None


def _row(batch: Any, where: str) -> dict[str, Any]:
    """The only row of a batch."""
    import pyarrow

    columns = (  # a column of categories has all of them in each batch, only one is used
        column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
        for column in batch.columns
    )
    _check_size(sum(column.get_total_buffer_size() for column in columns), where)
    found: dict[str, Any] = batch.to_pylist()[0]
    return found


def _check_size(size: int, where: str) -> None:
    if size > MOST_ROW:
        raise CalibrationError(
            f"{where}: has more than {MOST_ROW:,} bytes; cut it into several, or give it as .txt, which may "
            f"have any size"
        )


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


def arrow(path: Path, known: Callable[[Sequence[str]], list[str]]) -> Iterator[tuple[int, Any]]:
    """Rows of an Arrow file (a stream, as ``datasets`` writes it, or with a footer), from a map of it.

    Args:
        known: the columns to read, of those that there are.
    Raises:
        CalibrationError: it can't be read. MissingExtraError
    """
    pyarrow = _pyarrow(path)
    number = 0
    try:
        with pyarrow.memory_map(str(path)) as mapped:
            for batch in _batches(pyarrow, mapped):
                names = known(batch.schema.names)
                _check_names(names, path)
                part = batch.select(names)
                part.validate(full=True)  # offsets are the file's, and would be followed anywhere
                for i in range(part.num_rows):
                    number += 1
                    row = part.slice(i, 1)
                    _check_size(row.nbytes, f"{path.name}, document {number}")
                    yield number, row.to_pylist()[0]
    except CalibrationError:
        raise
    except Exception as error:  # without a common base
        raise CalibrationError(
            f"{path} cannot be read as Arrow ({error}), after {max(0, number)} documents"
        ) from None


def _batches(pyarrow: Any, mapped: Any) -> Iterator[Any]:
    if mapped.size() >= 6 and mapped.read_at(6, 0) == b"ARROW1":
        with pyarrow.ipc.open_file(mapped) as file:
            for i in range(file.num_record_batches):
                yield file.get_batch(i)
    else:
        with pyarrow.ipc.open_stream(mapped) as stream:
            yield from stream

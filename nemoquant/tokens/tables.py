"""Rows of tables as mappings: .csv and .tsv, Parquet, Arrow files as ``datasets`` saves them.

One row at a time is made: a row may be as large as a document may be.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemoquant.errors import CalibrationError, MissingExtraError
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

    A row that does not fit the header is the DocumentError that says so.

    Raises:
        CalibrationError: it can't be read.
    """
    # A setting of the process, whose default of 131,072 characters is no more than a long article.
    csv.field_size_limit(max(csv.field_size_limit(), opened.MOST_LINE))
    content = lines(path)
    header = next((line for line in content if line.strip()), None)
    if header is None:
        return
    delimiter = max(DELIMITERS, key=header.count) if ending(path) == ".csv" else "\t"
    names = next(csv.reader([header], delimiter=delimiter))
    number = 0
    try:
        for row in csv.reader(content, delimiter=delimiter):
            if not row:
                continue
            number += 1
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
                part = batch.select(known(batch.schema.names))
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

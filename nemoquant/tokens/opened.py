"""Text files as characters: UTF-8, or UTF-16 and UTF-32 that a byte order mark announces; packed ones too.

What gzip unpacks is bounded: a small file can be packed from any amount.
"""

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from nemoquant.errors import CalibrationError
from nemoquant.files import open_regular
from nemoquant.tokens.kinds import is_packed

MOST_LINE = 100 << 20  # characters of a line: it and its text are in memory, at 1 to 4 bytes each
MOST_UNPACKED = 128 << 20  # bytes of a packed file, or
MOST_RATIO = 128  # times as many as it has: text packs to a quarter, the same text again and again to a 50th
MARKS = (  # the longer ones first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class _Unpacked(io.RawIOBase):
    """The content of a gzip file; CalibrationError where it is too much, OSError where it is damaged."""

    def __init__(self, packed: io.BufferedReader, path: Path) -> None:
        self._file, self._path, self._count = gzip.GzipFile(fileobj=packed), path, 0
        self._most = max(MOST_UNPACKED, MOST_RATIO * os.fstat(packed.fileno()).st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._file.read(len(into))
        except (EOFError, zlib.error) as error:
            raise OSError(str(error)) from None
        self._count += len(data)
        if self._count > self._most:
            raise CalibrationError(
                f"{self._path} unpacks to more than {self._most:,} bytes, {MOST_RATIO} times what it has; is "
                f"it text? Unpack it yourself if it is meant"
            )
        into[: len(data)] = data
        return len(data)


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """The characters of a text file, without its byte order mark; line ends are ``\\n``.

    Bytes that are not UTF-8 become lone surrogates, which :func:`check_characters` finds.

    Raises:
        CalibrationError: it can't be read, here or while it is read.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as raw:
            content = io.BufferedReader(_Unpacked(raw, path)) if is_packed(path) else raw
            begin = content.peek(4)
            encoding = next((name for mark, name in MARKS if begin.startswith(mark)), None)
            errors = "surrogateescape" if encoding is None else "strict"
            yield io.TextIOWrapper(content, encoding=encoding or "utf-8-sig", errors=errors)
    except UnicodeDecodeError as error:  # of the others: UTF-8 never fails
        raise CalibrationError(f"{path} cannot be read ({error}); expected UTF-8 text") from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({error}); expected UTF-8 text") from None


def check_characters(text: str, path: Path, line: int) -> None:
    """Raises CalibrationError, with its line, for a byte that was not UTF-8; the text begins in ``line``."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        line += text.count("\n", 0, error.start)
        raise CalibrationError(
            f"{path} cannot be read (byte 0x{ord(text[error.start]) & 0xFF:02x} in line {line}); "
            f"expected UTF-8 text"
        ) from None


def chunks(path: Path, size: int) -> Iterator[str]:
    """The text of a file, ``size`` characters at a time."""
    line = 1
    with open_text(path) as file:
        while chunk := file.read(size):
            check_characters(chunk, path, line)
            yield chunk
            line += chunk.count("\n")


def lines(path: Path) -> Iterator[str]:
    """The lines of a file, each of at most ``MOST_LINE`` characters."""
    number = 0
    with open_text(path) as file:
        while line := file.readline(MOST_LINE + 1):
            number += 1
            if len(line) > MOST_LINE:
                raise too_long(path, number)
            check_characters(line, path, number)
            yield line


def too_long(path: Path, line: int) -> CalibrationError:
    """The error for a document that is too large to be in memory as a whole."""
    return CalibrationError(
        f"{path.name}, line {line}: has more than {MOST_LINE:,} characters; cut the document into several, "
        f"or give it as .txt, which may have any size"
    )

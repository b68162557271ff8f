"""Documents of files as token ids, in pieces: no more of a file is read or tokenized than is used.

    kinds.py, opened.py              which files are read; their characters
    jsons.py, tables.py, array.py    rows in them
    columns.py, chat.py              the document in a row
    template.py, tokenizer.py        its text, and its tokens

A .txt may be of any size, it is read as it is used. A document of the other kinds is in memory as a whole,
and bounded.

A document that can't be used (no known column, a conversation that the template refuses, half of a surrogate
pair) is left out and counted; a file that is damaged (no JSON, no UTF-8, cut) ends in an error, and so does a
template that exceeds its limits.
"""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nemoquant.errors import CalibrationError
from nemoquant.tokens.array import read_arrays
from nemoquant.tokens.chat import without_nulls
from nemoquant.tokens.columns import Document, documents_of, is_document, to_read
from nemoquant.tokens.declared import chat_templates
from nemoquant.tokens.jsons import json_documents
from nemoquant.tokens.kinds import kind_of
from nemoquant.tokens.named import Given
from nemoquant.tokens.opened import chunks
from nemoquant.tokens.pieces import PIECE_CHARS, pieces, sliced
from nemoquant.tokens.tables import arrow, parquet, separated
from nemoquant.tokens.template import ChatTemplate
from nemoquant.tokens.tokenizer import Ends, encode, ends, load_tokenizer
from nemoquant.tokens.unusable import DocumentError

MOST_REFUSED = 1000  # documents from the first on, after which nobody waits for a good one


@dataclass
class Tally:
    """What became of documents, for the user.

    Attributes:
        columns: documents by the columns that they were read from.
        refused: documents that were left out, ``reason``: why the first was, with its place.
        masked: token ids that attention masks left out.
        rival: the first document's place and columns that would have been one too.
    """

    columns: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    reason: str = ""
    masked: int = 0
    rival: str = ""

    @property
    def used(self) -> int:
        """Documents that were used."""
        return self.columns.total()

    def count(self, document: Document) -> None:
        """One more that is used; not an empty one."""
        if not document.columns:
            return
        self.columns[document.columns] += 1
        self.masked += document.masked
        if document.others and not self.rival:
            self.rival = (
                f"`{document.columns}` was read, and {', '.join(f'`{name}`' for name in document.others)} is "
                f"there too"
            )

    def refuse(self, where: str, error: DocumentError) -> None:
        """One more that is left out.

        Raises:
            CalibrationError: so far all of very many were.
        """
        said, file = str(error), where.rpartition(", document ")[0]
        self.refused += 1
        self.reason = self.reason or (said if said.startswith(f"{file}, ") else f"{where}: {said}")
        if self.refused >= MOST_REFUSED and not self.used:
            raise CalibrationError(f"none of the first {self.refused:,} documents can be used: {self.reason}")


class _Codec:
    """Tokenizer and chat template of a model, loaded when the first document needs them."""

    def __init__(self, model: Path, stack: ExitStack) -> None:
        self._model, self._stack = model, stack
        self._tokenizer: Any = None
        self._ends: Ends | None = None
        self._template: ChatTemplate | None = None

    def text(self, text: Iterable[str]) -> Iterator[list[int]]:
        """Tokens of a text that is no conversation; an empty one has none."""
        found = (piece for piece in pieces(text) if piece)
        first = next(found, None)
        if first is None:
            return
        tokenizer = self._loaded()
        self._ends = self._ends or ends(tokenizer)
        yield [*self._ends.before, *encode(tokenizer, first)]
        yield from map(partial(encode, tokenizer), found)
        yield self._ends.after

    def rendered(self, text: str) -> Iterator[list[int]]:
        """Tokens of what a chat template made, which has its special tokens itself."""
        return map(partial(encode, self._loaded()), pieces(sliced(text)))

    def _loaded(self) -> Any:
        self._tokenizer = self._tokenizer or load_tokenizer(self._model)
        return self._tokenizer

    def tokens(self, document: Document, where: str) -> Iterable[list[int]]:
        """Tokens of a document.

        Raises:
            DocumentError: the template refuses it.
        """
        if document.ids is not None:
            return [document.ids]
        if document.conversation is None:
            return self.text(sliced(document.text or ""))
        joined = document.conversation.joined
        if joined is not None and self._template is None and not _has_template(self._model):
            return self.text(sliced(joined))
        self._template = self._template or self._stack.enter_context(ChatTemplate(self._model))
        return self.rendered(self._template.converse(document.conversation, where))


def _has_template(model: Path) -> bool:
    try:
        return bool(chat_templates(model))
    except CalibrationError:
        return False


def documents(
    given: Given, model: Path, tally: Tally | None = None, columns: Sequence[str] = ()
) -> Generator[Iterable[list[int]]]:
    """Token ids of each document, in pieces that are tokenized on demand.

    To be closed: the chat template has a process.

    Args:
        model: the folder that holds tokenizer and chat template.
        tally: counts them.
        columns: those that hold the text, instead of known names.
    Raises:
        CalibrationError: an unreadable file.
        MissingExtraError: a .parquet or .arrow file without the extra.
    """
    tally, columns = tally or Tally(), tuple(columns) or given.columns
    with ExitStack() as stack:
        codec = _Codec(model, stack)
        parts = [stack.enter_context(closing(_part(files, codec, tally, columns))) for files in given.parts]
        while parts:  # a document of each in turn
            for part in list(parts):
                document = next(part, None)
                if document is None:
                    parts.remove(part)
                else:
                    yield document


def _part(
    files: Sequence[Path], codec: _Codec, tally: Tally, columns: Sequence[str]
) -> Generator[Iterable[list[int]]]:
    """The documents of some files, one file after the other."""
    for path in files:
        if kind_of(path) == "text":
            tally.columns["text"] += 1
            yield codec.text(chunks(path, PIECE_CHARS))
            continue
        for number, row in _rows(path, columns):
            where = f"{path.name}, document {number}"
            try:
                for document in documents_of(row, columns):
                    tokens = codec.tokens(document, where)
                    tally.count(document)
                    yield tokens
            except DocumentError as error:
                tally.refuse(where, error)


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Rows of a file with their numbers; a row that can't be read is a DocumentError."""
    kind = kind_of(path)
    if kind == "json":
        return json_documents(path, lambda row: is_document(row) or any(name in row for name in columns))
    if kind == "table":
        return ((number, _filled(row)) for number, row in separated(path))
    if kind == "array":
        return _array_rows(path, columns)
    read = parquet if kind == "parquet" else arrow
    known = partial(to_read, given=columns)
    return (
        (number, {name: without_nulls(value) for name, value in row.items()})
        for number, row in read(path, known)
    )


def _filled(row: Any) -> Any:
    """A row of a .csv, whose empty fields are null in other kinds."""
    return {name: value or None for name, value in row.items()} if isinstance(row, dict) else row


def _array_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    ids, mask = read_arrays(path, columns)
    name = columns[0] if columns else "input_ids"
    for i, row in enumerate(ids if ids.ndim == 2 else ids[None], 1):
        masks = {} if mask is None else {"attention_mask": mask.reshape(-1, len(row))[i - 1].tolist()}
        yield i, {name: row.tolist(), **masks}

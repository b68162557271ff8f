"""Calibration rows: text or token ids from files, as one matrix of tokens.

Documents (``documents.py``) are taken in file order, each followed by the eos token, and cut into rows
without overlap; tokens that do not fill a last row are dropped and counted. An .npy or .npz file with
integers [rows, length], none of them masked, is used unchanged.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nemoquant.errors import CalibrationError, listing
from nemoquant.model.config import NemotronHConfig
from nemoquant.tokens.array import read_arrays
from nemoquant.tokens.columns import OPTION, shown
from nemoquant.tokens.documents import Tally, documents
from nemoquant.tokens.kinds import kind_of
from nemoquant.tokens.named import Given, given

DEFAULT_ROWS, DEFAULT_LENGTH = 32, 512
PLAIN_COLUMNS = frozenset(("text", "input_ids"))  # what nobody asks about


@dataclass(frozen=True)
class Rows:
    """Rows of tokens.

    Attributes:
        ids: [rows, length] int64.
        source: name of the text, printable, with ``columns``.
        dropped: number of tokens that do not fill a row.
        warnings: messages for the user: fewer rows than requested, tokens dropped, documents left out.
        columns: what was read of a table, the most frequent first; empty where it is plain text or ids.
    """

    ids: npt.NDArray[np.int64]
    source: str
    dropped: int
    warnings: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Identity of the tokens and their shape, whatever file they came from."""
        return hashlib.sha256(
            np.ascontiguousarray(self.ids).tobytes() + repr(self.ids.shape).encode()
        ).hexdigest()


def load_rows(
    path: Path,
    model: Path,
    config: NemotronHConfig,
    rows: int = DEFAULT_ROWS,
    length: int = DEFAULT_LENGTH,
    *,
    columns: Sequence[str] = (),
) -> Rows:
    """The first ``rows`` rows of ``length`` tokens of a text.

    Args:
        path: a file, a folder of files, or the name of a data set (``named.py``).
        model: the folder that holds the tokenizer.
        columns: those that hold the text, instead of known names (``columns.py``).
    Raises:
        CalibrationError: unreadable file, no text, less than one row, most documents can't be used, or ids
            outside the vocabulary.
        MissingExtraError: a .parquet or .arrow file, or a data set, without the extra.
    """
    found = given(path)
    loaded = _ready_rows(found, columns)
    if loaded is None:
        loaded = _read_documents(found, path, model, config, (rows, length), columns=columns)
    check_ids(loaded.ids, config, str(path))
    return loaded


def _ready_rows(found: Given, columns: Sequence[str]) -> Rows | None:
    """The rows of an array that has them already."""
    files = found.parts[0]
    if len(found.parts) != 1 or len(files) != 1 or kind_of(files[0]) != "array":
        return None
    arrays = read_arrays(files[0], columns)
    return Rows(arrays.ids, found.name, 0) if arrays.are_rows else None


def check_ids(ids: npt.ArrayLike, config: NemotronHConfig, where: str) -> None:
    """Raises CalibrationError if some of the token ids, which ``where`` gave, are not in the vocabulary."""
    found = np.asarray(ids)
    if found.size and not (found.min() >= 0 and found.max() < config.vocab_size):
        raise CalibrationError(
            f"{where}: token ids from {found.min()} to {found.max()}, expected 0 to {config.vocab_size - 1}; "
            f"is the tokenizer this model's?"
        )


def _read_documents(
    data: Given,
    path: Path,
    model: Path,
    config: NemotronHConfig,
    shape: tuple[int, int],
    *,
    columns: Sequence[str],
) -> Rows:
    tokens, tally, (rows, length) = array("q"), Tally(), shape
    with closing(documents(data, model, tally, columns)) as found:
        for document in found:
            before = len(tokens)
            for ids in document:
                tokens.extend(ids)
                if len(tokens) >= rows * length:
                    break
            if len(tokens) > before:
                tokens.extend(config.eos_token_ids[:1])
            if len(tokens) >= rows * length:
                break
    _check_used(tally, path)
    bare = tally.used - tally.columns[shown(columns)] if columns else 0
    if bare and bare == tally.used:
        raise CalibrationError(
            f"{path}: what was read of it has no columns, and so no {shown(columns)}; leave out {OPTION}, or "
            f"name files that have it"
        )
    total = len(tokens)
    refused = f"; {_left_out(tally)}" if tally.refused else ""
    if not total:
        raise CalibrationError(f"{path} holds no text; expected at least one row of {length} tokens{refused}")
    count = min(rows, total // length)
    if not count:
        raise CalibrationError(
            f"{path} holds {total} tokens, less than one row of {length}; give more text or a smaller "
            f"--seq-len{refused}"
        )
    dropped = total - count * length if count < rows else 0
    kept = np.frombuffer(tokens, np.int64)[: count * length].reshape(count, length)
    read = tuple(name for name, _ in tally.columns.most_common())
    read = () if set(read) <= PLAIN_COLUMNS else read
    source = f"{data.name}: {listing(read)}" if read else data.name
    made = Rows(kept, source, dropped, columns=read)
    return replace(made, warnings=tuple(_warnings(made, data, tally, shape, bare)))


def _check_used(tally: Tally, path: Path) -> None:
    """Raises CalibrationError where most documents can't be used: that is no text, or another model's."""
    if tally.refused > tally.used:
        raise CalibrationError(
            f"{path}: {tally.refused:,} of {tally.refused + tally.used:,} documents can't be used; the "
            f"first: {tally.reason}"
        )


def _left_out(tally: Tally) -> str:
    return (
        f"{tally.refused:,} of {tally.refused + tally.used:,} documents can't be used and were left out; the "
        f"first: {tally.reason}"
    )


def _warnings(made: Rows, data: Given, tally: Tally, shape: tuple[int, int], bare: int) -> Iterator[str]:
    """What the user is told; ``bare``: documents that had no columns, where some were named."""
    name, (rows, length) = data.name, shape
    if len(made.ids) < rows:
        yield (
            f"{name} holds {len(made.ids)} rows of {length} tokens, {rows} were asked for; all of them were "
            f"used"
        )
    if made.dropped:
        yield f"{name}: its last {made.dropped} tokens do not fill a row and were left out"
    if tally.refused:
        yield f"{name}: {_left_out(tally)}"
    if bare:
        yield f"{name}: {bare:,} documents have no columns, {OPTION} chose for the others alone"
    if tally.masked:
        yield f"{name}: {tally.masked:,} tokens that attention_mask masks (padding) were left out"
    if tally.rival:
        yield f"{name}: {tally.rival}; {OPTION} chooses"
    if data.left_out:
        yield f"{name}: files of other kinds were left out, {data.left_out:,} of them"

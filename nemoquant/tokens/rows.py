"""Calibration rows: text or token ids from a file, as one matrix of tokens.

Documents (``documents.py``) are taken in file order, each followed by the eos token, and cut into rows
without overlap; tokens that do not fill a last row are dropped and counted. An .npy file is an integer array
[rows, length], used unchanged.
"""

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nemoquant.errors import CalibrationError
from nemoquant.model.config import NemotronHConfig
from nemoquant.tokens.array import read_array
from nemoquant.tokens.documents import documents
from nemoquant.words import plain

DEFAULT_ROWS, DEFAULT_LENGTH = 32, 512


@dataclass(frozen=True)
class Rows:
    """Rows of tokens.

    Attributes:
        ids: [rows, length] int64.
        source: name of the file, printable.
        dropped: number of tokens that do not fill a row.
        warnings: messages for the user: fewer rows than requested, tokens dropped.
    """

    ids: npt.NDArray[np.int64]
    source: str
    dropped: int
    warnings: tuple[str, ...] = ()

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
) -> Rows:
    """The first ``rows`` rows of ``length`` tokens of a file.

    Args:
        model: the folder that holds the tokenizer.
    Raises:
        CalibrationError: unreadable file, no text, less than one row, or ids outside the vocabulary.
        MissingExtraError: a .parquet file without the extra.
    """
    if not path.is_file():
        raise CalibrationError(
            f"{path} {'is not a file' if path.exists() else 'does not exist'}; expected .txt, .jsonl, "
            f".parquet or .npy"
        )
    loaded = (
        Rows(read_array(path), plain(path.name), 0)
        if path.suffix == ".npy"
        else _read_documents(path, model, config, rows, length)
    )
    if loaded.ids.size and not (loaded.ids.min() >= 0 and loaded.ids.max() < config.vocab_size):
        raise CalibrationError(
            f"{path}: token ids from {loaded.ids.min()} to {loaded.ids.max()}, expected 0 to "
            f"{config.vocab_size - 1}; is the tokenizer this model's?"
        )
    warnings = []
    if len(loaded.ids) < rows and path.suffix != ".npy":
        warnings.append(
            f"{loaded.source} holds {len(loaded.ids)} rows of {length} tokens, {rows} were asked for; "
            f"all of them were used"
        )
    if loaded.dropped:
        warnings.append(
            f"{loaded.source}: its last {loaded.dropped} tokens do not fill a row and were left out"
        )
    return replace(loaded, warnings=tuple(warnings))


def _read_documents(path: Path, model: Path, config: NemotronHConfig, rows: int, length: int) -> Rows:
    parts: list[npt.NDArray[np.int64]] = []
    total = 0

    def add(ids: Sequence[int]) -> None:
        nonlocal total
        parts.append(np.array(ids, np.int64))
        total += len(ids)

    with closing(documents(path, model)) as found:
        for document in found:
            before = total
            for ids in document:
                add(ids)
                if total >= rows * length:
                    break
            if total > before:
                add(config.eos_token_ids[:1])
            if total >= rows * length:
                break
    if not total:
        raise CalibrationError(f"{path} holds no text; expected at least one row of {length} tokens")
    count = min(rows, total // length)
    if not count:
        raise CalibrationError(
            f"{path} holds {total} tokens, less than one row of {length}; give more text or a smaller "
            f"--seq-len"
        )
    dropped = total - count * length if count < rows else 0
    kept = np.concatenate(parts)[: count * length].reshape(count, length)
    return Rows(kept, plain(path.name), dropped)

"""Calibration rows: text or token ids from a file, as one matrix of tokens.

Documents (``documents.py``) are taken in file order, each followed by the eos token, and cut into rows
without overlap; tokens that do not fill a last row are dropped and counted. An .npy file is an integer array
[rows, length], used unchanged.
"""

import hashlib
from array import array
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
    check_ids(loaded.ids, config, str(path))
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


def check_ids(ids: npt.ArrayLike, config: NemotronHConfig, where: str) -> None:
    """Raises CalibrationError if some of the token ids, which ``where`` gave, are not in the vocabulary."""
    found = np.asarray(ids)
    if found.size and not (found.min() >= 0 and found.max() < config.vocab_size):
        raise CalibrationError(
            f"{where}: token ids from {found.min()} to {found.max()}, expected 0 to {config.vocab_size - 1}; "
            f"is the tokenizer this model's?"
        )


def _read_documents(path: Path, model: Path, config: NemotronHConfig, rows: int, length: int) -> Rows:
    tokens = array("q")
    with closing(documents(path, model)) as found:
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
    total = len(tokens)
    if not total:
        raise CalibrationError(f"{path} holds no text; expected at least one row of {length} tokens")
    count = min(rows, total // length)
    if not count:
        raise CalibrationError(
            f"{path} holds {total} tokens, less than one row of {length}; give more text or a smaller "
            f"--seq-len"
        )
    dropped = total - count * length if count < rows else 0
    kept = np.frombuffer(tokens, np.int64)[: count * length].reshape(count, length)
    return Rows(kept, plain(path.name), dropped)

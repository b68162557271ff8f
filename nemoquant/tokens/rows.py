"""Calibration rows: text or token ids from a file, as one matrix of tokens.

Documents are taken in file order, each followed by the eos token, and cut into rows without overlap; tokens
that do not fill a last row are dropped and counted.

    .txt       one document
    .jsonl     one document per line: {"text": ...}, {"messages": [...]} through the chat template,
               or {"input_ids": [...]}
    .parquet   the same by columns (extra `parquet`)
    .npy       integer array [rows, length], used unchanged
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nemoquant.errors import CalibrationError, MissingExtraError
from nemoquant.model.config import NemotronHConfig
from nemoquant.tokens.array import read_array
from nemoquant.tokens.codec import chat_template, load_tokenizer

DEFAULT_ROWS, DEFAULT_LENGTH = 32, 512
PIECE_CHARS = 1 << 16
LINE_END = re.compile(r"(?<=\S)\n(?=\S)")


@dataclass(frozen=True)
class Rows:
    """Rows of tokens.

    Attributes:
        ids: [rows, length] int64.
        source: name of the file.
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
        Rows(read_array(path), path.name, 0)
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
    stream: list[int] = []
    for document in _documents(path, model):
        before = len(stream)
        for ids in document:
            stream += ids
            if len(stream) >= rows * length:
                break
        if len(stream) > before:
            stream += config.eos_token_ids[:1]
        if len(stream) >= rows * length:
            break
    if not stream:
        raise CalibrationError(f"{path} holds no text; expected at least one row of {length} tokens")
    count = min(rows, len(stream) // length)
    if not count:
        raise CalibrationError(
            f"{path} holds {len(stream)} tokens, less than one row of {length}; give more text or a smaller "
            f"--seq-len"
        )
    dropped = len(stream) - count * length if count < rows else 0
    return Rows(np.array(stream[: count * length], np.int64).reshape(count, length), path.name, dropped)


def _documents(path: Path, model: Path) -> Iterator[Iterable[list[int]]]:
    """Token ids of each document, in pieces that are tokenized on demand."""
    tokenizer, template = None, None
    for number, document in _raw_documents(path):
        where = f"{path.name}, document {number}"
        if isinstance(document.get("input_ids"), list):
            ids = document["input_ids"]
            bad = [i for i in ids if type(i) is not int or not 0 <= i < 1 << 31]
            if bad:
                raise CalibrationError(f"{where}: `input_ids` holds {bad[0]!r}; expected token ids")
            yield [ids]
            continue
        text = document.get("text")
        if text is None and isinstance(document.get("messages"), list):
            template = template or chat_template(model)
            text = template(document["messages"], where)
        if not isinstance(text, str):
            kinds = (
                ", ".join(f"{key} ({type(value).__name__})" for key, value in sorted(document.items()))
                or "nothing"
            )
            raise CalibrationError(
                f"{where}: has {kinds}; expected `text` (str), `messages` (list) or `input_ids` (list)"
            )
        tokenizer = tokenizer or load_tokenizer(model)
        yield map(partial(_encode, tokenizer), _pieces(text))


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _pieces(text: str) -> Iterator[str]:
    """A long text cut between lines, so that not much more of it is tokenized than the rows need.

    The cut is after a single line break between two other characters: no tokenizer of this family joins
    tokens across one.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        place = LINE_END.search(text, start + PIECE_CHARS)
        if place is None:
            break
        yield text[start : place.end()]
        start = place.end()
    yield text[start:]


def _raw_documents(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        if path.suffix == ".txt":
            yield 1, {"text": path.read_text(encoding="utf-8")}
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        document = json.loads(line)
                        if not isinstance(document, dict):
                            raise CalibrationError(
                                f"{path.name}, line {number}: a JSON {type(document).__name__}, expected an "
                                f"object"
                            )
                        yield number, document
        elif path.suffix == ".parquet":
            yield from _parquet(path)
        else:
            raise CalibrationError(
                f"{path}: unknown kind {path.suffix!r}; expected .txt, .jsonl, .parquet or .npy"
            )
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path.name}: not JSON ({error}); expected one JSON object a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read ({error}); expected UTF-8 text") from None


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError(
            f"{path.name} needs the extra `parquet`: pip install 'nemoquant[parquet]'"
        ) from None
    try:
        rows = (row for batch in parquet.ParquetFile(path).iter_batches(64) for row in batch.to_pylist())
        yield from enumerate(rows, 1)
    except pyarrow.ArrowException as error:
        raise CalibrationError(f"{path} cannot be read as parquet ({error})") from None

"""Solved weights of a layer in one file of OUT.partial, until they are packed.

A file is a sequence of records, each of some weights that were solved together:

    length of the header, length of the data     two uint64, little endian
    header                                       JSON: the key, and a :class:`Record` for each weight
    data                                         codes, then block scales, of each weight in this order
    XXH3-128 of all that                         16 bytes

Records are only appended. What a kill leaves of the last one is cut off when the file is opened again. The
key is a hash of all that the codes follow from, so that a record is used again only for the same task.
"""

import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from nemoquant.errors import OutputError
from nemoquant.files import open_own
from nemoquant.formats import Method
from nemoquant.formats.arithmetic import Encoded
from nemoquant.planning.row import Row

_LENGTHS = struct.Struct("<QQ")
_DIGEST = 16
MOST_HEADER = 16 << 20
READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Record:
    """What is known of one solved weight.

    Attributes:
        method: that the codes are from: the planned one, or the format's plain one where that was better or
            nothing was observed.
        tokens: that its inputs were observed on.
        objective, plain: sum over rows of (w - q)' H (w - q), H damped, of these codes and of the plain
            method's; both 0 where nothing was observed.
        gram: hash of the inputs' second moments.
        error: ||w - q||^2 / ||w||^2, what ``verify`` can compute again.
        scale: of the whole tensor. degenerate: written as zeros.
    """

    name: str
    method: Method
    tokens: int
    gram: str
    scale: float
    objective: float = 0.0
    plain: float = 0.0
    error: float = 0.0
    degenerate: bool = False


class Stored(NamedTuple):
    """A solved weight."""

    record: Record
    encoded: Encoded


class _At(NamedTuple):
    record: Record
    number: int  # of the file's record that it is in
    codes: int
    blocks: int
    codes_shape: tuple[int, ...]
    blocks_shape: tuple[int, ...] | None


class SolvedFile:
    """The file of one layer.

    Attributes:
        digest: over all records; it is in the run's state.
    """

    def __init__(self, path: Path, rows: Iterable[Row]) -> None:
        """Open it, or make it; a half record at its end is cut off."""
        self.path = path
        self._rows = {row.name: row for row in rows}
        self._file = open_own(path)
        self._at: dict[str, _At] = {}
        self._keys: set[str] = set()
        self._whole: list[tuple[int, int, bytes]] = []  # begin, length and hash of each record
        self._checked: set[int] = set()
        self._end = 0
        self._scan()

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(b"".join(digest for _, _, digest in self._whole))

    @property
    def records(self) -> list[Record]:
        return [at.record for at in self._at.values()]

    def has(self, key: str) -> bool:
        """Whether the record with this key is there."""
        return key in self._keys

    def append(self, key: str, weights: Sequence[Stored]) -> None:
        """Add a record. It is on the disk when this returns."""
        header = json.dumps({"key": key, "weights": [asdict(w.record) for w in weights]}).encode()
        parts = [part for w in weights for part in w.encoded if part is not None]
        data = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
        body = _LENGTHS.pack(len(header), len(data)) + header + data
        digest = xxhash.xxh3_128_digest(body)
        view = memoryview(body + digest)
        at = self._end
        while view:
            written = os.pwrite(self._file, view, at)
            at, view = at + written, view[written:]
        os.fdatasync(self._file)
        self._take(header, digest)

    def get(self, name: str) -> Stored:
        """A weight's codes; raises OutputError where the file has changed since they were written."""
        found = self._at[name]
        self._check(found.number)
        codes = self._read(found.codes, found.codes_shape)
        blocks = None if found.blocks_shape is None else self._read(found.blocks, found.blocks_shape)
        return Stored(found.record, Encoded(codes, blocks))

    def _check(self, number: int) -> None:
        """Compare a record with its hash, once."""
        if number in self._checked:
            return
        at, length, written = self._whole[number]
        digest = xxhash.xxh3_128()
        for begin in range(0, length, READ_BYTES):
            digest.update(self._bytes(at + begin, min(READ_BYTES, length - begin)))
        if digest.digest() != written:
            raise self._damaged("a record is not what was written")
        self._checked.add(number)

    def _damaged(self, why: str) -> OutputError:
        return OutputError(f"{self.path} is damaged: {why}; remove {self.path.parent.parent} and begin again")

    def close(self) -> None:
        os.close(self._file)

    def _read(self, at: int, shape: tuple[int, ...]) -> Any:
        return np.frombuffer(self._bytes(at, int(np.prod(shape))), np.uint8).reshape(shape)

    def _bytes(self, at: int, length: int) -> bytearray:
        found = bytearray(length)
        view = memoryview(found)
        while view:
            got = os.preadv(self._file, [view], at)
            if not got:
                raise self._damaged("it ends too early")
            at, view = at + got, view[got:]
        return found

    def _scan(self) -> None:
        size = os.fstat(self._file).st_size
        while self._end + _LENGTHS.size <= size:
            header, data = _LENGTHS.unpack(self._bytes(self._end, _LENGTHS.size))
            end = self._end + _LENGTHS.size + header + data + _DIGEST
            if header > MOST_HEADER or end > size:
                break
            text = bytes(self._bytes(self._end + _LENGTHS.size, header))
            try:
                self._take(text, bytes(self._bytes(end - _DIGEST, _DIGEST)))
            except (ValueError, KeyError, TypeError):
                break
        if self._end < size:
            os.ftruncate(self._file, self._end)
            os.fsync(self._file)

    def _take(self, header: bytes, digest: bytes) -> None:
        """Note a whole record, which begins at the end of what was noted before."""
        content = json.loads(header)
        at = self._end + _LENGTHS.size + len(header)
        found: dict[str, _At] = {}
        for entry in content["weights"]:
            record = Record(**entry)
            number = self._rows[record.name].number
            shape = self._rows[record.name].shape
            assert number is not None
            shapes = {p.kind: p.shape for p in number.packed_tensors((shape[0], shape[1]))}
            blocks = shapes.get("block_scales")
            size = int(np.prod(shapes["codes"]))
            found[record.name] = _At(record, len(self._whole), at, at + size, shapes["codes"], blocks)
            at += size + (0 if blocks is None else int(np.prod(blocks)))
        self._keys.add(content["key"])
        self._at |= found
        self._whole.append((self._end, at - self._end, digest))
        self._end = at + _DIGEST


class Solved:
    """The solved weights of a run: a file for each layer, in the folder of its state."""

    def __init__(self, files: dict[int | None, SolvedFile]) -> None:
        self._of = {record.name: file for file in files.values() for record in file.records}
        self._files = files

    def get(self, name: str) -> Stored:
        return self._of[name].get(name)

    @property
    def records(self) -> dict[str, Record]:
        """By tensor, in order of layers."""
        return {record.name: record for file in self._files.values() for record in file.records}

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def summary(records: Iterable[Record]) -> dict[str, Any]:
    """How many weights got which method, and what it won over the plain one, as JSON data."""
    methods: dict[str, int] = {}
    objective = plain = 0.0
    for record in records:
        methods[record.method] = methods.get(record.method, 0) + 1
        if record.plain > 0:
            objective, plain = objective + record.objective, plain + record.plain
    return {"methods": methods, "objective_of_plain": objective / plain if plain else None}

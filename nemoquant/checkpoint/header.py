"""The header of one safetensors file, validated before anything else is read.

Format (safetensors README): 8 bytes little-endian header size, that many bytes of JSON, then the data. Each
entry has ``dtype``, ``shape`` and ``data_offsets`` relative to the data; together they cover it without holes
or overlaps.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemoquant.errors import HeaderError, brief
from nemoquant.files import MOST_TABLE_ENTRIES, open_regular, parse_json

ITEM_SIZE = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
MAX_HEADER = 100_000_000  # the limit of the reference implementation
MAX_DIMENSIONS = 64
MAX_TENSORS = 1 << 21  # four parts of every tensor that a config may have (model/parse.py)
ALIGNMENT = 4096  # in files that we write, the data begin at a multiple of a page


@dataclass(frozen=True)
class TensorInfo:
    """The place of one tensor: ``start`` and ``end`` are absolute byte offsets in ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of one safetensors file by name, in file order, and its ``__metadata__``.

    Raises:
        HeaderError: the file is too short, its JSON is wrong, or an entry contradicts the file's size or
            another entry.
    """
    try:
        with os.fdopen(open_regular(file), "rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > size - 8:
                raise HeaderError(
                    f"{file.name}: header size {length:,} does not fit the file's {size:,} bytes; expected "
                    f"a safetensors file, "
                    "the download may be incomplete"
                )
            if length > MAX_HEADER:
                raise HeaderError(
                    f"{file.name}: header size is {length:,}; expected at most {MAX_HEADER:,} bytes"
                )
            text = f.read(length)
    except OSError as error:
        raise HeaderError(f"{file}: cannot be read ({error.strerror}); expected a safetensors file") from None
    try:
        entries = parse_json(text.decode("utf-8"), entries=MOST_TABLE_ENTRIES)
    except ValueError as error:
        raise HeaderError(
            f"{file.name}: header is not valid JSON ({error}); expected a safetensors file"
        ) from None
    if not isinstance(entries, dict):
        raise HeaderError(f"{file.name}: header is a JSON {type(entries).__name__}, expected an object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise HeaderError(f"{file.name}: `__metadata__` is {brief(metadata)}; expected texts by name")
    if len(entries) > MAX_TENSORS:
        raise HeaderError(
            f"{file.name}: header has {len(entries):,} tensors; expected at most {MAX_TENSORS:,}"
        )
    begin = 8 + length
    tensors = {name: _tensor(file, name, entry, begin) for name, entry in entries.items()}
    _check_coverage(file, tensors, begin, size)
    return tensors, metadata


def _tensor(file: Path, name: str, entry: object, begin: int) -> TensorInfo:
    def fail(got: str) -> HeaderError:
        return HeaderError(f"{file.name}: tensor {brief(name)} has {got}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail(f"the entry {brief(entry)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise fail(f"dtype {brief(dtype)}, expected one of {', '.join(ITEM_SIZE)}")
    if not _naturals(shape):
        raise fail(f"shape {brief(shape)}, expected a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail(f"data_offsets {brief(offsets)}, expected [begin, end]")
    expected = math.prod(shape) * ITEM_SIZE[dtype]
    if offsets[1] - offsets[0] != expected:
        needed = f"{expected:,}" if expected < 1 << 63 else "more than any file has"
        raise fail(f"{offsets[1] - offsets[0]:,} bytes, expected {needed} for {dtype} {brief(shape)}")
    return TensorInfo(name, dtype, tuple(shape), file, begin + offsets[0], begin + offsets[1])


def _naturals(value: object) -> bool:
    """Whether this is a short list of 64-bit sizes; the product of a longer one could not even be printed."""
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMENSIONS
        and all(type(v) is int and 0 <= v < 1 << 63 for v in value)
    )


def _check_coverage(file: Path, tensors: Mapping[str, TensorInfo], begin: int, size: int) -> None:
    at = begin
    for t in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if t.start != at:
            kind = (
                "overlaps the tensor before it"
                if t.start < at
                else f"leaves a hole of {t.start - at:,} bytes before it"
            )
            raise HeaderError(f"{file.name}: tensor {brief(t.name)} {kind}; expected contiguous data")
        at = t.end
    if at != size:
        raise HeaderError(
            f"{file.name}: its tensors end at byte {at:,}, but the file has {size:,}; expected the same, it "
            f"may be truncated"
        )


def encode_header(tensors: list[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that holds ``tensors`` (name, dtype, shape) without gaps.

    It is padded with spaces to a multiple of ``ALIGNMENT`` bytes.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * ITEM_SIZE[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return padded.to_bytes(8, "little") + text.ljust(padded)

"""A source tensor's bytes encoded to codes, in chunks of rows: scratch memory does not grow with the tensor.

Pure functions of a checkpoint and of rows of a plan: they run in any thread or process that can open the
checkpoint. Pages that they touched are dropped before they return.

A weight may have a fold (``solve/folds``): then what is encoded, or copied, is the folded weight; hashes are
always of the source's bytes.

With the device "cuda" codes are made on the GPU, one chunk of each thread at a time; the bytes are the same.
The maximum of a weight of several chunks is computed on the CPU all the same: this takes no longer than
copying the chunks to the GPU.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nemoquant.calibrate.derived import check_finite, weight_scale
from nemoquant.checkpoint.identity import piece_hash, piece_rows
from nemoquant.checkpoint.reader import NUMPY, Checkpoint
from nemoquant.formats import Device, gpu
from nemoquant.formats.amax import amax as bits_amax
from nemoquant.formats.arithmetic import Encoded, TensorScale
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.model.nested import TOWER
from nemoquant.pack.outliers import Lost, lost_to_scale
from nemoquant.planning.row import Row
from nemoquant.solve.folds.layer import NO_FOLDS, Folds
from nemoquant.solve.folds.transform import Transform
from nemoquant.solve.source import floats, squares
from nemoquant.solve.store import Solved, Stored

Array = npt.NDArray[Any]
Part = tuple[Row, slice]


class EncodedWeight(NamedTuple):
    """A whole weight: decode scale, degenerate (all zeros) or not, its pieces in order."""

    scale: np.float32
    degenerate: bool
    pieces: list["EncodedPiece"]


class EncodedPiece(NamedTuple):
    """Some rows of a weight: codes, block scales, the hash of the source's bytes, and what its scale cost."""

    encoded: Encoded
    hash: bytes
    lost: Lost


class Measured(NamedTuple):
    """max |w| of some rows of a weight, and the hash of the source's bytes."""

    amax: np.float32
    hash: bytes


class Copied(NamedTuple):
    """Bytes of the source, mapped, and their hash."""

    raw: Array
    hash: bytes


def slices(row: Row) -> list[slice]:
    """Rows of a weight [out, in], one piece at a time (see ``checkpoint/identity.py``)."""
    step = piece_rows(row.shape[0], row.bytes_in)
    return [slice(start, min(start + step, row.shape[0])) for start in range(0, row.shape[0], step)]


def _row_bytes(row: Row) -> int:
    return max(1, row.bytes_in // row.shape[0])


@contextmanager
def _reading(checkpoint: Checkpoint, row: Row, part: slice) -> Iterator[Array]:
    """Some rows of a weight, mapped."""
    yield checkpoint.array(row.name)[part]
    checkpoint.release_bytes(row.name, part.start * _row_bytes(row), part.stop * _row_bytes(row))


def amax(checkpoint: Checkpoint, row: Row, part: slice, fold: Transform | None = None) -> np.float32:
    """max |w| of some rows.

    Raises:
        WeightError: the rows contain NaN or Inf.
    """
    return measure(checkpoint, row, part, fold).amax


def measure(checkpoint: Checkpoint, row: Row, part: slice, fold: Transform | None = None) -> Measured:
    """``amax`` with the hash of what it was found in; raises WeightError as it does."""
    with _reading(checkpoint, row, part) as source:
        weight = _folded(checkpoint, row, part, source, fold)
        return Measured(check_finite(row.name, bits_amax(weight)), piece_hash(source))


def _folded(checkpoint: Checkpoint, row: Row, part: slice, source: Array, fold: Transform | None) -> Array:
    """Some rows for the kernels: bf16 bit patterns or float32; float16 is converted."""
    weight = source if fold is None else fold.apply(checkpoint.array(row.name), part)
    return weight.astype(np.float32) if weight.dtype == np.float16 else weight


def encode(
    checkpoint: Checkpoint,
    row: Row,
    part: slice,
    scale: TensorScale,
    device: Device = "cpu",
    fold: Transform | None = None,
) -> EncodedPiece:
    """Codes of some rows, and their block scales; a degenerate weight becomes zeros."""
    value, degenerate = scale
    with _reading(checkpoint, row, part) as source:
        weight = _folded(checkpoint, row, part, source, fold)
        encoded = _codes(row, _on(device, weight), value, degenerate)
        return _piece(row, source, lambda: weight, encoded, value, degenerate)


def solved_piece(
    checkpoint: Checkpoint,
    row: Row,
    part: slice,
    stored: Stored,
    fold: Transform | None = None,
) -> EncodedPiece:
    """The same rows of a weight that was solved: its codes are there, the source is only read."""
    codes, blocks = stored.encoded
    encoded = Encoded(codes[part], None if blocks is None else blocks[part])
    with _reading(checkpoint, row, part) as source:
        scale = np.float32(stored.record.scale)
        return _piece(
            row,
            source,
            lambda: _folded(checkpoint, row, part, source, fold),
            encoded,
            scale,
            degenerate=stored.record.degenerate,
        )


def solved_weights(
    checkpoint: Checkpoint, rows: Sequence[Row], solved: Solved, folds: Folds
) -> list[EncodedWeight]:
    """What :func:`pack_weights` gives, of weights that were solved."""
    found = []
    for row in rows:
        stored = solved.get(row.name)
        pieces = [solved_piece(checkpoint, row, part, stored, folds.get(row.name)) for part in slices(row)]
        found.append(EncodedWeight(np.float32(stored.record.scale), stored.record.degenerate, pieces))
    return found


def encode_again(
    checkpoint: Checkpoint,
    row: Row,
    part: slice,
    scale: np.float32,
    degenerate: bool,
    fold: Transform | None = None,
) -> tuple[Encoded, bytes]:
    """What :func:`encode` gives, for a comparison: nothing is counted.

    Returns:
        codes and block scales, and the hash of the source's bytes.
    """
    with _reading(checkpoint, row, part) as source:
        weight = _folded(checkpoint, row, part, source, fold)
        return _codes(row, weight, scale, degenerate), piece_hash(source)


def error_again(
    checkpoint: Checkpoint, row: Row, part: slice, encoded: Encoded, scale: np.float32, fold: Transform | None
) -> tuple[tuple[float, float], bytes]:
    """Sums of (w - q)^2 and w^2 of some rows against codes that were solved, and the source's hash."""
    assert row.format != "source"
    with _reading(checkpoint, row, part) as source:
        weight = floats(_folded(checkpoint, row, part, source, fold))
        return squares(row.format, weight, encoded, scale), piece_hash(source)


def _piece(
    row: Row,
    source: Array,
    weight: Callable[[], Array],
    encoded: Encoded,
    scale: np.float32,
    degenerate: bool,
) -> EncodedPiece:
    assert row.format != "source"
    lost = Lost() if degenerate else lost_to_scale(row.format, weight, encoded, scale)
    return EncodedPiece(encoded, piece_hash(source), lost)


def _on(device: Device, weight: Array) -> Array | gpu.OnGpu:
    return gpu.put(weight) if gpu.chosen(device) else weight


def _codes(row: Row, weight: Array | gpu.OnGpu, scale: np.float32, degenerate: bool) -> Encoded:
    assert row.format != "source"
    arithmetic = ARITHMETIC[row.format]
    if degenerate:
        return arithmetic.zeros((weight.shape[0], weight.shape[1]))
    return arithmetic.encode(weight, scale, row.plain_method)


def pack_weights(
    checkpoint: Checkpoint, rows: Sequence[Row], device: Device = "cpu", folds: Folds = NO_FOLDS
) -> list[EncodedWeight]:
    """Encode whole weights that share no scale, such as experts.

    The maximum and the codes of each are computed while it is in the cache, or on the GPU.
    """
    return [_pack_weight(checkpoint, row, device, folds.get(row.name)) for row in rows]


def _pack_weight(checkpoint: Checkpoint, row: Row, device: Device, fold: Transform | None) -> EncodedWeight:
    parts = slices(row)
    if len(parts) > 1:
        whole = weight_scale(row, max(amax(checkpoint, row, part, fold) for part in parts))
        return EncodedWeight(*whole, [encode(checkpoint, row, part, whole, device, fold) for part in parts])
    with _reading(checkpoint, row, parts[0]) as source:
        weight = _folded(checkpoint, row, parts[0], source, fold)
        put = _on(device, weight)
        scale, degenerate = weight_scale(row, check_finite(row.name, bits_amax(put)))
        encoded = _codes(row, put, scale, degenerate)
        return EncodedWeight(
            scale, degenerate, [_piece(row, source, lambda: weight, encoded, scale, degenerate)]
        )


def copy(checkpoint: Checkpoint, row: Row, begin: int, end: int, fold: Transform | None = None) -> Copied:
    """A piece of an unquantized tensor, checked to be finite. The caller drops its pages.

    What is beside the language model is copied whatever it holds: it may be integers, or infinite on purpose.
    """
    source = raw = checkpoint.raw(row.name)[begin:end]
    if fold is not None:
        part = slice(begin // _row_bytes(row), end // _row_bytes(row))
        raw = fold.apply(checkpoint.array(row.name), part).reshape(-1).view(np.uint8)
    if row.role != TOWER:
        values = np.ascontiguousarray(raw).view(NUMPY[row.source_dtype])
        wide = values.astype(np.float32) if row.source_dtype == "F16" else values
        check_finite(row.name, bits_amax(wide[None]))
    return Copied(raw, piece_hash(source))


def groups(rows: Iterable[Row], nbytes: int) -> Iterator[tuple[Row, ...]]:
    """Rows in their order, in groups of at least ``nbytes`` of source (the last may be smaller)."""
    group: list[Row] = []
    size = 0
    for row in rows:
        group.append(row)
        size += row.bytes_in
        if size >= nbytes:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)

"""Plan and scales in, shards out, as a pipeline: reading, encoding, hashing and writing overlap.

    encode (threads; the kernels hold no lock) -> this thread, which puts results in file order -> hash ->
    write

A bounded number of pieces waits for each step, a few megabytes each, so that a step waits only for the
slowest one. Memory holds these pieces, and the block scales of one unit.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nemoquant.calibrate.derived import activation_scales, weight_scale
from nemoquant.calibrate.scales import Scales
from nemoquant.checkpoint.identity import UnitHash, Units, pieces, unit_name
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.writer import ShardWriter
from nemoquant.errors import SourceChangedError, listing
from nemoquant.formats.arithmetic import TensorScale
from nemoquant.pack.encode import (
    Array,
    Copied,
    EncodedPiece,
    EncodedWeight,
    Measured,
    Part,
    copy,
    encode,
    groups,
    measure,
    pack_weights,
    slices,
    solved_piece,
    solved_weights,
)
from nemoquant.pack.outliers import Lost
from nemoquant.pack.shards import Shard, Unit
from nemoquant.pack.workers import Workers
from nemoquant.planning.plan import Plan
from nemoquant.planning.row import Row
from nemoquant.progress import Count
from nemoquant.solve.folds.layer import NO_FOLDS, Folds
from nemoquant.solve.store import Solved, summary


class Changes(NamedTuple):
    """What calibration made of the weights: folds by tensor, and the solved ones."""

    folds: Folds = NO_FOLDS
    solved: Solved | None = None

    def summary(self) -> dict[str, Any]:
        """Methods of solved weights with their numbers, what they won, tensors with a fold, as JSON data."""
        found: dict[str, Any] = {"solved": None, "folded": len(self.folds)}
        if self.solved is not None and self.solved.records:
            found["solved"] = summary(self.solved.records.values())
        return found


# Work in a thread, and the function by which this thread takes its result.
PackStep = tuple[Future[Any] | None, Callable[[Any], None]]


class Packer:
    """Writes the shards of one plan.

    Attributes:
        warnings: what a user should know about the scales.
        zero_weights: modules whose weight has no value that a normal fp32 scale could represent; written as
            zeros with scale 1.0.
        lost: module -> what its scale cost, where that is too much.
        units: hashes of the source's units that were read.
    """

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        scales: Scales | None,
        changes: Changes,
        workers: Workers,
        progress: Count,
    ) -> None:
        """Raises CalibrationError where ``scales`` lack what the plan needs."""
        self.folds, self.solved = changes
        self.checkpoint, self.workers, self.progress = checkpoint, workers, progress
        self.scales = activation_scales(plan, scales)
        self.warnings = self.scales.warnings
        self.zero_weights: list[str] = []
        self.lost: dict[str, Lost] = {}
        self.units: Units = {}
        self._groups: dict[str, list[Row]] = {}
        self._maxima: dict[str, np.float32] = {}  # tensor -> its largest magnitude, of all in a group at once
        for row in plan.quantized:
            if row.weight_group:
                self._groups.setdefault(row.weight_group, []).append(row)

    def write(self, path: Path, shard: Shard) -> str:
        """Write one shard into the new file ``path``; returns its sha256.

        Raises:
            WeightError: NaN or Inf in a tensor, quantized or not.
            SourceChangedError: the source changed since it was opened.
        """
        with ShardWriter(
            path, [(e.written, e.dtype, e.shape) for e in shard.entries], background=True
        ) as writer:
            waiting: deque[PackStep] = deque()
            try:
                for step in self._steps(shard, writer):
                    waiting.append(step)
                    while len(waiting) > self.workers.ahead:
                        _finish(waiting.popleft())
                while waiting:
                    _finish(waiting.popleft())
            finally:
                for future, _ in waiting:
                    if future is not None:
                        future.cancel()
        self.checkpoint.check_unchanged()
        return writer.sha256

    def _steps(self, shard: Shard, writer: ShardWriter) -> Iterator[PackStep]:
        """All work of a shard in file order. Each step's work starts when the step is requested."""
        for unit in shard.units:
            self.checkpoint.check_unchanged()
            digest = UnitHash()
            if unit.rows[0].format == "source":
                for row in unit.rows:
                    yield from self._copy(row, writer, digest)
            else:
                yield from self._quantize(unit, writer, digest)
            yield None, partial(self._end_unit, unit_name(unit.rows[0].name), digest)
            caches = [
                self.scales.caches[entry.row.module] for entry in unit.entries if entry.kind == "kv_scale"
            ]
            if caches:
                yield None, partial(_write_scalars, writer, caches)

    def read_for(self, shard: Shard) -> Units:
        """Hashes of what a written shard was made from: its units, and those that share a scale with them."""
        rows = [member for unit in shard.units for row in unit.rows for member in self._members(row)]
        return {name: self.units[name] for name in dict.fromkeys(unit_name(row.name) for row in rows)}

    def _members(self, row: Row) -> list[Row]:
        """The rows whose maximum gives a row its scale."""
        return self._groups[row.weight_group] if row.weight_group and not row.solved else [row]

    def _end_unit(self, name: str, digest: UnitHash, _: None = None) -> None:
        """Keep the hash of a unit; one that was read for a scale before must have the same one."""
        if self.units.setdefault(name, digest.hexdigest()) != digest.hexdigest():
            raise SourceChangedError(
                f"{self.checkpoint.path}: {listing([name])} had other bytes for its scale than for its "
                f"codes; expected files that nobody writes to meanwhile, the same on all nodes of a cluster"
            )

    def _copy(self, row: Row, writer: ShardWriter, digest: UnitHash) -> Iterator[PackStep]:
        """Copy an unquantized tensor, bit for bit."""

        def put(begin: int, end: int, copied: Copied) -> None:
            digest.piece(copied.hash)
            writer.write(copied.raw, partial(self.checkpoint.release_bytes, row.name, begin, end))
            self.progress(end - begin)

        for begin, end in pieces(row.shape, row.bytes_in):
            copied = self.workers.here(copy, row, begin, end, self.folds.get(row.name))
            yield copied, partial(put, begin, end)
        yield None, lambda _: digest.end_tensor()

    def _quantize(self, unit: Unit, writer: ShardWriter, digest: UnitHash) -> Iterator[PackStep]:
        """Codes are written as they come; block scales, then scalars, at the end of the unit."""
        scales: list[np.float32] = []
        block_scales: list[Array] = []
        lost: dict[str, Lost] = {}

        def put(row: Row, nbytes: int, piece: EncodedPiece) -> None:
            codes, blocks = piece.encoded
            lost[row.module] = lost.get(row.module, Lost()) + piece.lost
            digest.piece(piece.hash)
            writer.write(codes)
            if blocks is not None:
                block_scales.append(blocks)
            self.progress(nbytes)

        def put_weights(rows: tuple[Row, ...], packed: list[EncodedWeight]) -> None:
            for row, (scale, degenerate, encoded) in zip(rows, packed, strict=True):
                for part, piece in zip(slices(row), encoded, strict=True):
                    put(row, row.bytes_in * (part.stop - part.start) // row.shape[0], piece)
                digest.end_tensor()
                put_scale(row, scale)
                if degenerate:
                    self.zero_weights.append(row.module)

        def put_scale(row: Row, scale: np.float32) -> None:
            if row.number is not None and row.number.global_scale:
                scales.append(scale)

        def end(_: None) -> None:
            if len(unit.rows) == 1:
                digest.end_tensor()
            for row in unit.rows:
                if row.format != "source" and lost[row.module].too_much(row.format):
                    self.lost[row.module] = lost[row.module]
            for blocks in block_scales:
                writer.write(blocks)
            _write_scalars(writer, scales)
            _write_scalars(writer, [self.scales.inputs[row.module] for row in unit.rows if row.calibrated])

        if len(unit.rows) > 1:
            for rows in groups(unit.rows, self.workers.group_bytes):
                yield self._weights(rows), partial(put_weights, rows)
        else:
            (row,) = unit.rows
            scale, pieces = self._pieces(row)
            put_scale(row, scale)
            for part, encoded in zip(slices(row), pieces, strict=True):
                nbytes = row.bytes_in * (part.stop - part.start) // row.shape[0]
                yield encoded, partial(put, row, nbytes)
        yield None, end

    def _weights(self, rows: tuple[Row, ...]) -> Future[list[EncodedWeight]]:
        folds = {row.name: self.folds[row.name] for row in rows if row.name in self.folds}
        if rows[0].solved:
            assert self.solved is not None
            return self.workers.here(solved_weights, rows, self.solved, folds)
        return self.workers.submit(pack_weights, rows, self.workers.device, folds)

    def _pieces(self, row: Row) -> tuple[np.float32, Iterator[Future[EncodedPiece]]]:
        """The scale of a weight, and its pieces in order; each is begun when it is asked for."""
        fold = self.folds.get(row.name)
        if row.solved:
            assert self.solved is not None
            stored = self.solved.get(row.name)
            scale, degenerate = np.float32(stored.record.scale), stored.record.degenerate
            if degenerate or not stored.encoded.codes.any():
                self.zero_weights.append(row.module)
            return scale, (self.workers.here(solved_piece, row, p, stored, fold) for p in slices(row))
        whole = self._scale(row)
        submit, device = self.workers.submit, self.workers.device
        return whole.value, (submit(encode, row, p, whole, device, fold) for p in slices(row))

    def _scale(self, row: Row) -> TensorScale:
        """The scale of one weight, from its group's maximum: chunks are read for this, then for the codes."""
        members = self._members(row)
        if row.name not in self._maxima:
            self._measure([(member, part) for member in members for part in slices(member)])
        scale = weight_scale(row, max(self._maxima[member.name] for member in members))
        if scale.degenerate or not self._maxima[row.name]:
            self.zero_weights.append(row.module)  # even if its group gives it a scale
        return scale

    def _measure(self, parts: list[Part]) -> None:
        """Find the maxima of whole weights, in pieces; their hashes are kept too."""
        digests = {member.name: UnitHash() for member, _ in parts}
        for (member, _), found in zip(parts, self._map(parts), strict=True):
            self._maxima[member.name] = max(found.amax, self._maxima.get(member.name, found.amax))
            digests[member.name].piece(found.hash)
        for name, digest in digests.items():
            digest.end_tensor()
            self._end_unit(unit_name(name), digest)

    def _map(self, parts: Iterable[Part]) -> Iterator[Measured]:
        waiting: deque[Future[Measured]] = deque()
        for part in parts:
            waiting.append(self.workers.submit(measure, *part, self.folds.get(part[0].name)))
            if len(waiting) > self.workers.ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _finish(step: PackStep) -> None:
    future, take = step
    take(None if future is None else future.result())


def _write_scalars(writer: ShardWriter, values: Iterable[np.float32], _: None = None) -> None:
    """Write the scalars of successive tensors as one piece."""
    array = np.array(list(values), np.float32)
    if array.size:
        writer.write(array)

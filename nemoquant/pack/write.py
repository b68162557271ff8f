"""Plan and scales in, shards out. Weights are read, encoded and written a few megabytes at a time.

Encoding runs ahead in threads (the kernels hold no lock), a bounded number of tasks; the calling thread writes the results in file
order and hashes them. What waits in memory: the tasks in flight, and the block scales of one unit.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from nemoquant.calibrate.scales import Scales
from nemoquant.checkpoint.reader import NUMPY, Checkpoint
from nemoquant.checkpoint.writer import ShardWriter
from nemoquant.formats.amax import amax as bits_amax
from nemoquant.pack.encode import Array, Encoded, amax, check_finite, encode, slices
from nemoquant.pack.scales import Warn, input_scales, kv_scales, weight_scale
from nemoquant.pack.shards import Shard, Unit
from nemoquant.planning.plan import Plan, Row

Progress = Callable[[int], None]  # bytes of source that were dealt with since the last call
T = TypeVar("T")
Item = TypeVar("Item")
COPY_BYTES = 16 << 20


class Packer:
    """Writes the shards of one plan.

    Attributes:
        zero_weights: modules whose weight has no value that a normal fp32 scale could represent; written as zeros with scale 1.0.
    """

    def __init__(
        self, plan: Plan, checkpoint: Checkpoint, scales: Scales | None, *, threads: int, warn: Warn, progress: Progress
    ) -> None:
        """Raises CalibrationError where ``scales`` do not say enough."""
        self.checkpoint, self.threads, self.progress = checkpoint, threads, progress
        self.input_scales = input_scales(plan, scales, warn)
        self.kv_scales = kv_scales(plan, scales, warn)
        self.zero_weights: list[str] = []
        self._groups: dict[str, list[Row]] = {}
        for row in plan.quantized:
            if row.weight_group:
                self._groups.setdefault(row.weight_group, []).append(row)

    def write(self, folder: Path, shards: Iterable[Shard]) -> dict[str, str]:
        """Write the shards into ``folder``: file name -> sha256.

        Raises:
            WeightError: NaN or Inf in a tensor, quantized or not.
        """
        digests = {}
        with ThreadPoolExecutor(self.threads) as pool:
            for shard in shards:
                with ShardWriter(folder / shard.file, [(e.name, e.dtype, e.shape) for e in shard.entries]) as writer:
                    for unit in shard.units:
                        self._unit(unit, writer, pool)
                digests[shard.file] = writer.sha256
        return digests

    def _unit(self, unit: Unit, writer: ShardWriter, pool: ThreadPoolExecutor) -> None:
        if unit.rows[0].format == "source":
            for row in unit.rows:
                self._copy(row, writer)
        else:
            self._quantize(unit, writer, pool)
        for entry in unit.entries:
            if entry.kind == "kv_scale":
                writer.write(np.array(self.kv_scales[entry.row.module]))

    def _copy(self, row: Row, writer: ShardWriter) -> None:
        """An unquantized tensor, bit for bit."""
        raw = self.checkpoint.raw(row.name)
        for start in range(0, raw.size, COPY_BYTES):
            part = raw[start : start + COPY_BYTES]
            check_finite(row.name, bits_amax(_as_floats(part, row.source_dtype)[None]))
            writer.write(part)
            self.checkpoint.release([row.name])
        self.progress(row.bytes_in)

    def _quantize(self, unit: Unit, writer: ShardWriter, pool: ThreadPoolExecutor) -> None:
        scales: list[np.float32] = []
        block_scales: list[Array] = []
        work = self._tensor(unit.rows[0], pool) if len(unit.rows) == 1 else self._experts(unit.rows, pool)
        for row, scale, degenerate, chunks in work:
            for codes, blocks in chunks:
                writer.write(codes)
                if blocks is not None:
                    block_scales.append(blocks)
            scales.append(scale)
            if degenerate:
                self.zero_weights.append(row.module)
            self.checkpoint.release([row.name])
            self.progress(row.bytes_in)
        for blocks in block_scales:
            writer.write(blocks)
        for scale in scales:
            writer.write(np.array(scale))
        for row in unit.rows:
            if row.activation_format:
                writer.write(np.array(self.input_scales[row.module]))

    def _tensor(self, row: Row, pool: ThreadPoolExecutor) -> Iterator[tuple[Row, np.float32, bool, Iterable[Encoded]]]:
        """One weight: its chunks go to the threads, first for the maximum of its group, then for the codes."""
        members = self._groups[row.weight_group] if row.weight_group else [row]
        parts = [(member, part) for member in members for part in slices(member)]
        found = list(self._ahead(pool, lambda item: amax(self.checkpoint, *item), parts))
        scale, degenerate = weight_scale(row, max(found))
        if not degenerate and not any(value for (member, _), value in zip(parts, found, strict=True) if member is row):
            self.zero_weights.append(row.module)  # its group has a scale all the same
        yield (
            row,
            scale,
            degenerate,
            self._ahead(pool, lambda part: encode(self.checkpoint, row, part, scale, degenerate), slices(row)),
        )

    def _experts(
        self, rows: Iterable[Row], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[Row, np.float32, bool, Iterable[Encoded]]]:
        """Experts: one task each, maximum and codes while the weight is in the cache."""

        def task(row: Row) -> tuple[Row, np.float32, bool, Iterable[Encoded]]:
            scale, degenerate = weight_scale(row, max(amax(self.checkpoint, row, part) for part in slices(row)))
            return row, scale, degenerate, [encode(self.checkpoint, row, part, scale, degenerate) for part in slices(row)]

        return self._ahead(pool, task, rows)

    def _ahead(self, pool: ThreadPoolExecutor, function: Callable[[Item], T], items: Iterable[Item]) -> Iterator[T]:
        """``map`` in the threads, in order, with a bounded number of results waiting."""
        waiting: deque[Future[T]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * self.threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _as_floats(raw: Array, dtype: str) -> Array:
    """Bytes of a floating tensor as the kernels take them: bf16 bit patterns or float32."""
    values = np.ascontiguousarray(raw).view(NUMPY[dtype])
    return values.astype(np.float32) if dtype == "F16" else values

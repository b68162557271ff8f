"""The tensors of a converted checkpoint, each in pieces that threads make, and how they are written.

Memory holds some pieces for each thread and those that wait to be hashed and written.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nemoquant.checkpoint.header import ITEM_SIZE
from nemoquant.checkpoint.identity import piece_rows, pieces
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.writer import ShardWriter, nothing
from nemoquant.errors import UncomputableError
from nemoquant.formats.bf16 import INFINITE, rounded
from nemoquant.model.roles import TensorSpec
from nemoquant.progress import Count
from nemoquant.quantized.checkpoint import PackedCheckpoint, PackedWeights
from nemoquant.quantized.packed import PackedWeight

AHEAD = 2  # pieces for each thread

Array = npt.NDArray[Any]


class Piece(NamedTuple):
    """Some bytes of a tensor: ``make`` computes or maps them, ``done`` is called when they are written."""

    make: Callable[[], Array]
    done: Callable[[], None] = nothing


@dataclass(frozen=True)
class Tensor:
    """One tensor to write; ``pieces`` together are its bytes, in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Piece]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZE[self.dtype]


def copied(checkpoint: Checkpoint, source: str, name: str) -> Tensor:
    """A tensor of ``checkpoint`` under a name, bit for bit."""
    info = checkpoint.tensors[source]

    def make() -> Iterator[Piece]:
        raw = checkpoint.raw(source)
        for begin, end in pieces(info.shape, info.nbytes):
            yield Piece(
                partial(raw.__getitem__, slice(begin, end)),
                partial(checkpoint.release_bytes, source, begin, end),
            )

    return Tensor(name, info.dtype, info.shape, make)


def decoded(opened: PackedCheckpoint, spec: TensorSpec, name: str) -> Tensor:
    """A quantized weight [out, in], decoded in float32 and rounded to bf16, under a name."""
    stored = opened.stored[spec.name]
    rows, width = spec.shape
    step = piece_rows(rows, rows * width * 4)

    def piece(weight: PackedWeight) -> Array:
        values = np.empty(weight.shape, np.float32)
        weight.decode(values)
        bits = rounded(values)
        if not np.isfinite(values).all() or ((bits & 0x7FFF) >= INFINITE).any():
            raise UncomputableError(
                f"{opened.path}: {spec.name} decodes to NaN or Inf; expected finite weights, is it damaged?"
            )
        return bits

    def make() -> Iterator[Piece]:
        weight = PackedWeights(opened, "").packed(stored)
        for start in range(0, rows, step):
            yield Piece(partial(piece, weight[start : start + step]))
        yield Piece(_empty, partial(opened.checkpoint.release, stored.parts.values()))

    return Tensor(name, "BF16", (rows, width), make)


def _empty() -> Array:
    return np.empty(0, np.uint16)


def scalar(name: str, bits: np.uint16) -> Tensor:
    """A bf16 number, by its bit pattern, with shape [1]."""
    return Tensor(name, "BF16", (1,), lambda: iter([Piece(lambda: np.array([bits]))]))


def shards(tensors: Iterable[Tensor], limit: int) -> dict[str, list[Tensor]]:
    """File -> its tensors, as many as fit ``limit`` bytes; scalars at its end, so that all are aligned."""
    groups: list[list[Tensor]] = []
    used = 0
    for tensor in tensors:
        if not groups or (used and used + tensor.nbytes > limit):
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.nbytes
    names = (f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1))
    return {
        name: sorted(group, key=lambda tensor: tensor.shape == (1,))
        for name, group in zip(names, groups, strict=True)
    }


def write(path: Path, tensors: list[Tensor], threads: int, count: Count) -> str:
    """Write one shard into a new file; returns its sha256. ``count`` gets the bytes of each piece."""
    entries = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    with (
        ThreadPoolExecutor(threads, "convert") as pool,
        ShardWriter(path, entries, background=True) as writer,
    ):
        waiting: deque[tuple[Future[Array], Piece]] = deque()

        def finish() -> None:
            future, piece = waiting.popleft()
            data = future.result()
            writer.write(data, piece.done)
            count(data.nbytes)

        try:
            for piece in (piece for tensor in tensors for piece in tensor.pieces()):
                waiting.append((pool.submit(piece.make), piece))
                if len(waiting) > AHEAD * threads:
                    finish()
            while waiting:
                finish()
        finally:
            for future, _ in waiting:
                future.cancel()
    return writer.sha256

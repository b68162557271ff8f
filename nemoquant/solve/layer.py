"""The weights of one layer, solved one after the other from the inputs that calibration kept.

Memory holds the second moments of the inputs that are in work: those of one dense weight, or those of as many
experts as there are threads. Rows of a weight are independent, so a large one is solved in slices.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from nemoquant.calibrate.derived import weight_scale
from nemoquant.calibrate.inputs import InputFile
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.formats.arithmetic import Encoded, round_trip
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.formats.rounding import Floats
from nemoquant.planning.plan import Row
from nemoquant.planning.recipe import Solve
from nemoquant.solve.folds.layer import Folds, input_transform
from nemoquant.solve.folds.transform import Transform
from nemoquant.solve.memory import SLICE_ELEMENTS
from nemoquant.solve.metric import Metric, gram, prepare
from nemoquant.solve.solver import solve
from nemoquant.solve.source import folded, largest, relative, squares
from nemoquant.solve.store import Record, SolvedFile, Stored
from nemoquant.solve.taps import input_of

GROUP_BYTES = 64 << 20  # of the source in a record: what a kill may cost
VERSION = 1  # of the method: another one makes other codes
SCARCE = 2.0  # how much stronger H is damped where it comes from few tokens, see `damping`

Change = Callable[[NDArray[Any]], NDArray[Any]]


def units(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows that are solved with one matrix of second moments, or as one record: an expert has its own."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        key = (input_of(row), row.activation_format) if row.expert is None else (row.role,)
        groups.setdefault(key, []).append(row)
    for group in groups.values():
        part: list[Row] = []
        for row in group:
            part.append(row)
            if sum(r.bytes_in for r in part) >= GROUP_BYTES and row.expert is not None:
                yield part
                part = []
        if part:
            yield part


def damping(base: float, width: int, tokens: int) -> float:
    """How strongly H [width, width] from so many tokens is damped: ``base * (1 + 2 * width / tokens)``.

    H's own error grows with width / tokens. Found on the trained models (docs/accuracy.md): 0.5 was best at
    4,096 tokens an expert, 2 at 128, where widths are 96 and 256.
    """
    return base * (1 + SCARCE * width / max(1, tokens))


@dataclass(frozen=True)
class LayerSolver:
    """Solves the rows of one layer.

    Attributes:
        inputs: what calibration kept of this layer.
        folds: of the tensors of this layer.
        scales: module -> ``input_scale``.
        shared: scale group of weights -> largest magnitude of all of them, folded.
    """

    checkpoint: Checkpoint
    inputs: InputFile
    folds: Folds
    settings: Solve
    scales: Mapping[str, np.float32]
    shared: Mapping[str, np.float32]
    threads: int
    _changes: dict[tuple[int, int], Change] = field(default_factory=dict)

    def run(self, rows: Sequence[Row], file: SolvedFile, done: Callable[[int], None]) -> None:
        """Solve what ``file`` does not have; ``done`` is called with the number of weights that are."""
        count = 0
        with ThreadPoolExecutor(self.threads, "solve", torch.set_num_threads, (1,)) as pool:
            for part in units(rows):
                if part[0].expert is None:
                    self._dense(part, file, pool)
                else:
                    self._experts(part, file, pool)
                count += len(part)
                done(count)
        torch.set_num_threads(self.threads)  # one of those above would count for threads that begin later

    def _dense(self, part: list[Row], file: SolvedFile, pool: ThreadPoolExecutor) -> None:
        key = self._key(part)
        if not file.has(key):
            moments, tokens, digest = self._moments(part[0])
            metric = prepare(moments, tokens, damping(self.settings.damping, part[0].shape[1], tokens))
            file.append(key, [self._solved(row, metric, tokens, digest, pool.map) for row in part])

    def _experts(self, part: list[Row], file: SolvedFile, pool: ThreadPoolExecutor) -> None:
        def one(row: Row) -> Stored:
            moments, tokens, digest = self._moments(row)
            metric = prepare(moments, tokens, damping(self.settings.damping, row.shape[1], tokens))
            return self._solved(row, metric, tokens, digest, map)

        key = self._key(part)
        if not file.has(key):
            file.append(key, list(pool.map(one, part)))

    def _moments(self, row: Row) -> tuple[NDArray[np.float64], int, str]:
        """Second moments of a row's input as engines will have it, the number of tokens, their hash."""
        moments = gram(self._pieces(row), row.shape[1])
        return moments, self.inputs.tokens(input_of(row)), xxhash.xxh3_128_hexdigest(moments.data)

    def _pieces(self, row: Row) -> Iterator[Floats]:
        changed = self._changed(row)
        scale = self.scales.get(row.module, np.float32(1))
        for piece in self.inputs.pieces(input_of(row)):
            x: Floats = np.ascontiguousarray(changed(piece), np.float32)
            if row.activation_format is not None:
                round_trip(ARITHMETIC[row.activation_format], x, scale, x)
            yield x

    def _changed(self, row: Row) -> Change:
        """What folds make of a row's input; made once for all experts that share a matrix."""
        fold = self.folds.get(row.name, Transform())
        key = id(fold.right), id(fold.columns)
        if key not in self._changes:
            self._changes[key] = input_transform(self.folds, row.module)
        return self._changes[key]

    def _solved(
        self, row: Row, metric: Metric, tokens: int, digest: str, mapped: Callable[..., Iterable[Any]]
    ) -> Stored:
        assert row.format != "source"
        number, method = row.format, row.solved_method
        weight = folded(self.checkpoint, self.folds, row)
        scale, degenerate = weight_scale(
            row, self.shared[row.weight_group] if row.weight_group else largest(row, weight)
        )
        arithmetic = ARITHMETIC[row.format]
        if degenerate:
            record = Record(
                row.name, row.plain_method, tokens, gram=digest, scale=float(scale), degenerate=True
            )
            return Stored(record, arithmetic.zeros((row.shape[0], row.shape[1])))
        step = max(1, SLICE_ELEMENTS // row.shape[1])
        slices = [slice(at, at + step) for at in range(0, row.shape[0], step)]

        def one(part: slice) -> Any:
            rows = np.ascontiguousarray(weight[part])
            found = solve(number, rows, scale, metric, method, self.settings.descent)
            return found, squares(number, rows, found.encoded, scale)

        results = list(mapped(one, slices))
        solved = [found for found, _ in results]
        blocks = [s.encoded.block_scales for s in solved if s.encoded.block_scales is not None]
        encoded = Encoded(
            np.concatenate([s.encoded.codes for s in solved]),
            np.concatenate(blocks) if blocks else None,
        )
        methods = [s.method for s in solved]
        record = Record(
            row.name,
            method if method in methods else row.plain_method,
            tokens,
            objective=math.fsum(s.objective for s in solved),
            plain=math.fsum(s.plain for s in solved),
            gram=digest,
            error=relative([part for _, part in results]),
            scale=float(scale),
        )
        return Stored(record, encoded)

    def _key(self, part: Sequence[Row]) -> str:
        """A hash of all that the codes of some rows follow from."""
        found = xxhash.xxh3_128()
        found.update(repr((VERSION, self.settings.damping, self.settings.descent)).encode())
        matrices: dict[int, bytes] = {}
        for row in part:
            scales = float(self.scales.get(row.module, 1)), float(self.shared.get(row.weight_group or "", 1))
            found.update(
                repr((row.name, row.format, row.scale_method, row.activation_format, scales)).encode()
            )
            found.update(np.ascontiguousarray(self.checkpoint.raw(row.name)).data)
            self.checkpoint.release([row.name])
            fold = self.folds.get(row.name, Transform())
            for array in (fold.rows, fold.columns, fold.left, fold.right):
                if array is not None and id(array) not in matrices:
                    matrices[id(array)] = xxhash.xxh3_128_digest(np.ascontiguousarray(array).data)
                found.update(b"" if array is None else matrices[id(array)])
        for tap in dict.fromkeys(map(input_of, part)):
            for piece in self.inputs.pieces(tap):
                found.update(piece.data)
        return found.hexdigest()

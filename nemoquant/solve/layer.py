"""The weights of one layer, solved one after the other from the inputs that calibration kept.

Memory holds the second moments of the inputs that are in work: those of one dense weight, or those of as many
experts as there are threads. Rows of a weight are independent, so a large one is solved in slices.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from nemoquant.calibrate.derived import weight_scale
from nemoquant.calibrate.inputs import InputFile
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.formats import Device, FormatName
from nemoquant.formats.arithmetic import Encoded, round_trip
from nemoquant.formats.gpu import torch_device
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.formats.rounding import Floats
from nemoquant.planning.recipe import Solve
from nemoquant.planning.row import Row
from nemoquant.solve.coupled import solve_coupled
from nemoquant.solve.folds.layer import Folds, InputTransforms
from nemoquant.solve.folds.transform import Transform
from nemoquant.solve.memory import SLICE_ELEMENTS, coupled_rows
from nemoquant.solve.metric import Doubles, Metric, gram, prepare
from nemoquant.solve.on_device import Task, solve_all_on
from nemoquant.solve.order import WRITERS
from nemoquant.solve.solver import Solved, solve
from nemoquant.solve.source import folded, largest, relative, squares
from nemoquant.solve.store import Record, SolvedFile, Stored
from nemoquant.solve.taps import input_of, output_of
from nemoquant.solve.targets import Target, cross, inner_target, writer_target

GROUP_BYTES = 64 << 20  # of the source in a record: what a kill may cost
VERSION = 2  # of the method: another one makes other codes
RIDGE = 0.2  # how near targets are kept to weights, see `targets.py`; of many tokens
SCARCE = 15.0  # how much stronger both are where H comes from few tokens, see `damping`
OUTPUT_DAMPING = 0.1  # of the metric of outputs, where tokens are many; see `damping`

Mapped = Callable[..., Iterable[Any]]
"""``map``, or that of a pool of threads."""


class _Seen(NamedTuple):
    """What a weight is solved from: its input's metric, the number of tokens, and the hash of their sums.

    ``target`` makes what it is solved for of the weight; None leaves the weight itself.
    """

    metric: Metric
    tokens: int
    digest: str
    target: Target | None = None


class _Work(NamedTuple):
    """A row with its weight, folded, what it is solved for, and the weight's scale."""

    row: Row
    seen: _Seen
    weight: Floats
    target: Floats
    scale: np.float32
    degenerate: bool


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
    """How strongly H [width, width] from so many tokens is damped: ``base * (1 + 15 * width / tokens)``.

    H's own error grows with width / tokens. Found with the trained models, on tokens that were not solved for
    (docs/accuracy.md): the least error is near 0.1 where an expert has 4,096 tokens, near 1 to 3 where it has
    about as many as the width.
    """
    return base * (1 + SCARCE * width / max(1, tokens))


@dataclass(frozen=True)
class LayerSolver:
    """Solves the rows of one layer.

    Attributes:
        inputs: what calibration kept of this layer.
        reached: the same of the stream of the quantized layers, and what writers should put out; None where
            that is not propagated.
        graded: gradients of the loss at the outputs of this layer's modules, by their names; None where
            errors of outputs count alike.
        folds: of the tensors of this layer.
        scales: module -> ``input_scale``.
        shared: scale group of weights -> largest magnitude of all of them, folded.
        device: where weights are solved. Second moments are summed on the host in either case: their hash
            and their damping need them there, and with few tokens to fetch an expert's from a GPU takes
            about as long as to sum them.
    """

    checkpoint: Checkpoint
    inputs: InputFile
    folds: Folds
    settings: Solve
    scales: Mapping[str, np.float32]
    shared: Mapping[str, np.float32]
    threads: int
    device: Device
    reached: InputFile | None = None
    graded: InputFile | None = None

    @cached_property
    def _changes(self) -> InputTransforms:
        return InputTransforms(self.folds)

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
            seen = self._seen(part[0])
            file.append(key, [self._solved([self._work(row, seen)], pool.map)[0] for row in part])

    def _experts(self, part: list[Row], file: SolvedFile, pool: ThreadPoolExecutor) -> None:
        key = self._key(part)
        if file.has(key):
            return
        if self.device == "cpu":
            file.append(
                key, list(pool.map(lambda row: self._solved([self._work(row, self._seen(row))])[0], part))
            )
            return
        stored: list[Stored] = []
        for start in range(0, len(part), self.threads):  # as many at once as memory is planned for
            works = pool.map(lambda row: self._work(row, self._seen(row)), part[start : start + self.threads])
            stored += self._solved(list(works), pool.map)
        file.append(key, stored)

    def _seen(self, row: Row) -> _Seen:
        """From a row's input as engines will have it."""
        moments = gram(self._pieces(row), row.shape[1])
        tokens, digest = self.inputs.tokens(input_of(row)), xxhash.xxh3_128_hexdigest(moments.data)
        strength = damping(self.settings.damping, row.shape[1], tokens)
        metric = prepare(moments, tokens, strength)
        if self.reached is None or metric.empty:
            return _Seen(metric, tokens, digest)
        return _Seen(metric, tokens, digest, self._target(row, moments, tokens))

    def _target(self, row: Row, moments: Doubles, tokens: int) -> Target:
        """What a row, and all that share its input, are solved for on the quantized stream."""
        assert self.reached is not None
        out, width = row.shape
        ridge = damping(RIDGE, width, tokens)
        if row.role in WRITERS:
            lacking = self.reached.pieces(output_of(row), width)
            wanted = cross(zip(lacking, self._pieces(row, out), strict=True), out, width)
            return writer_target(moments, wanted, ridge)
        pairs = zip(self._source(row), self._pieces(row), strict=True)
        missed = cross(((x - z, z) for x, z in pairs), width, width)
        return inner_target(moments, missed, ridge)

    def _source(self, row: Row) -> Iterator[Floats]:
        """The source's input, folded."""
        changed = self._changes.of(row.module)
        for piece in self.inputs.pieces(input_of(row)):
            yield np.ascontiguousarray(changed(piece), np.float32)

    def _pieces(self, row: Row, widest: int = 0) -> Iterator[Floats]:
        """The input as the GEMM gets it. On the quantized stream it is folded already."""
        scale = self.scales.get(row.module, np.float32(1))
        for x in self._source(row) if self.reached is None else self.reached.pieces(input_of(row), widest):
            if row.activation_format is not None:
                round_trip(ARITHMETIC[row.activation_format], x, scale, x)
            yield x

    def _work(self, row: Row, seen: _Seen) -> _Work:
        weight = folded(self.checkpoint, self.folds, row)
        shared = self.shared[row.weight_group] if row.weight_group else largest(row, weight)
        target = weight if seen.target is None else seen.target(weight)
        return _Work(row, seen, weight, target, *weight_scale(row, shared))

    def _solved(self, works: list[_Work], mapped: Mapped = map) -> list[Stored]:
        """The weights of some rows."""
        if self.device == "cpu":
            return [_zeros(work) if work.degenerate else self._on_host(work, mapped) for work in works]
        stored: list[Stored] = []
        for (degenerate, *_), group in groupby(works, _alike):
            some = list(group)
            stored += map(_zeros, some) if degenerate else self._on_device(some, mapped)
        return stored

    def _on_host(self, work: _Work, mapped: Mapped) -> Stored:
        """A weight, slice by slice."""
        row, weight = work.row, work.weight
        number, method = _format(row), row.solved_method

        def one(part: slice) -> Solved:
            found = solve(
                number, work.target[part], work.scale, work.seen.metric, method, self.settings.descent
            )
            return self._weighed(work, part, found)

        solved: list[Solved] = list(mapped(one, self._slices(weight)))
        return _stored(work, solved, _joined(solved), mapped)

    def _on_device(self, works: list[_Work], mapped: Mapped) -> list[Stored]:
        """Weights that are alike, at once."""
        row = works[0].row
        tasks = [Task(work.target, work.scale, work.seen.metric) for work in works]
        found = solve_all_on(
            torch_device(self.device), _format(row), tasks, row.solved_method, self.settings.descent, mapped
        )
        if self.graded is None:
            return [
                _stored(work, [solved], solved.encoded, mapped)
                for work, solved in zip(works, found, strict=True)
            ]

        def weighed(work: _Work, solved: Solved) -> list[Solved]:
            parts = self._slices(work.weight)
            return [self._weighed(work, part, _part(solved, part)) for part in parts]

        # On the host: one row after the other, a step of a sweep is less work than a launch takes.
        return [
            _stored(work, solved, _joined(solved), mapped)
            for work, solved in zip(works, mapped(weighed, works, found), strict=True)
        ]

    def _slices(self, weight: Floats) -> list[slice]:
        return _slices(weight) if self.graded is None else _coupled(weight)

    def _weighed(self, work: _Work, rows: slice, start: Solved) -> Solved:
        """The codes of some rows with their errors weighed by the loss, from those without."""
        module = work.row.module
        if self.graded is None or work.seen.metric.empty or module not in self.graded:
            return start
        pieces = (np.ascontiguousarray(piece[:, rows]) for piece in self.graded.pieces(module))
        tokens, target = self.graded.tokens(module), work.target[rows]
        strength = damping(OUTPUT_DAMPING, len(target), tokens)
        outputs = prepare(gram(pieces, len(target)), tokens, strength)
        if outputs.empty:
            return start
        return solve_coupled(
            _format(work.row),
            target,
            work.scale,
            work.seen.metric,
            outputs,
            start=start.encoded,
            method=work.row.solved_method,
            sweeps=self.settings.descent,
        )

    def _key(self, part: Sequence[Row]) -> str:
        """A hash of all that the codes of some rows follow from."""
        found = xxhash.xxh3_128()
        found.update(repr((VERSION, self.settings)).encode())
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
        taps = dict.fromkeys(map(input_of, part))
        for piece in (x for tap in taps for x in self.inputs.pieces(tap)):
            found.update(piece.data)
        if self.reached is not None:
            for tap in (*taps, *(output_of(row) for row in part)):
                for piece in self.reached.pieces(tap):
                    found.update(piece.data)
        if self.graded is not None:
            for piece in (g for row in part for g in self.graded.pieces(row.module)):
                found.update(piece.data)
        return found.hexdigest()


def _alike(work: _Work) -> tuple[object, ...]:
    return work.degenerate, work.row.format, work.row.solved_method, work.weight.shape


def _format(row: Row) -> FormatName:
    assert row.format != "source"
    return row.format


def _slices(weight: Floats) -> list[slice]:
    step = max(1, SLICE_ELEMENTS // weight.shape[1])
    return [slice(at, at + step) for at in range(0, len(weight), step)]


def _coupled(weight: Floats) -> list[slice]:
    """Rows whose errors are weighed together; those of different slices count as independent.

    So the metric of outputs stays small where there are many: Mamba's input projections have 18,560.
    """
    step = coupled_rows(len(weight))
    return [slice(at, at + step) for at in range(0, len(weight), step)]


def _part(solved: Solved, rows: slice) -> Solved:
    blocks = solved.encoded.block_scales
    return solved._replace(
        encoded=Encoded(solved.encoded.codes[rows], None if blocks is None else blocks[rows])
    )


def _joined(solved: list[Solved]) -> Encoded:
    """The codes of all slices."""
    blocks = [s.encoded.block_scales for s in solved if s.encoded.block_scales is not None]
    return Encoded(
        np.concatenate([s.encoded.codes for s in solved]), np.concatenate(blocks) if blocks else None
    )


def _zeros(work: _Work) -> Stored:
    """A degenerate weight."""
    row, seen = work.row, work.seen
    record = Record(
        row.name, row.plain_method, seen.tokens, gram=seen.digest, scale=float(work.scale), degenerate=True
    )
    return Stored(record, ARITHMETIC[_format(row)].zeros((row.shape[0], row.shape[1])))


def _stored(work: _Work, solved: list[Solved], encoded: Encoded, mapped: Mapped) -> Stored:
    """A weight with what was found of all its slices."""
    row, weight = work.row, work.weight

    def missed(part: slice) -> tuple[float, float]:
        blocks = encoded.block_scales
        codes = Encoded(encoded.codes[part], None if blocks is None else blocks[part])
        return squares(_format(row), weight[part], codes, work.scale)

    methods = [s.method for s in solved]
    record = Record(
        row.name,
        row.solved_method if row.solved_method in methods else row.plain_method,
        work.seen.tokens,
        objective=math.fsum(s.objective for s in solved),
        plain=math.fsum(s.plain for s in solved),
        gram=work.seen.digest,
        error=relative(mapped(missed, _slices(weight))),
        scale=float(work.scale),
    )
    return Stored(record, encoded)

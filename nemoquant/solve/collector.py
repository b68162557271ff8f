"""Solving as a part of calibration: a layer's folds and weights are found when its inputs have been seen.

Each layer goes through the rows once. Its inputs wait in a file (``calibrate/inputs.py``) until the maxima
are known, because codes are solved for the inputs as engines will have them: folded, and rounded with their
scale.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from nemoquant.calibrate.derived import cache_scale, input_scales
from nemoquant.calibrate.hidden import InFiles
from nemoquant.calibrate.inputs import InputFile, InputObserver, Place
from nemoquant.calibrate.observers import AmaxCollector, Observer
from nemoquant.checkpoint.folder import GRADED, INPUTS, REACHED, STREAM, folds_file, solved_file
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.errors import CalibrationError
from nemoquant.formats import Device, FormatName
from nemoquant.formats.gpu import torch_device
from nemoquant.machine import trim_heap
from nemoquant.model import names
from nemoquant.planning.plan import Plan
from nemoquant.planning.row import Row
from nemoquant.solve.backward import GradientFiles, keep_at_outputs
from nemoquant.solve.folds.chosen import LayerFolds
from nemoquant.solve.folds.file import load, save
from nemoquant.solve.folds.layer import Folds, InputTransforms
from nemoquant.solve.layer import LayerSolver
from nemoquant.solve.source import shared_maxima
from nemoquant.solve.store import Solved, SolvedFile
from nemoquant.solve.stream import Layer, QuantizedStream, Rounding, routers
from nemoquant.solve.taps import input_of
from nemoquant.solve.written import FoldedWeights, Written

NAME = "solved"


class SolveCollector:
    """Finds folds and solves weights, layer by layer.

    Attributes:
        folds: of all finished layers, by tensor.
    """

    name = NAME

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        amax: AmaxCollector,
        folder: Path,
        threads: int,
        say: Callable[[str], None],
        device: Device = "cpu",
        *,
        hidden: InFiles,
        gradients: GradientFiles | None = None,
        state: Mapping[str, str],
    ) -> None:
        """``folder``: of the run's state. ``say``: receives how far a layer is, in words. ``device``: where
        weights are solved. ``hidden``: the source's stream. ``gradients``: of the loss between its layers,
        where errors of outputs count by it. ``state``: what :meth:`restore` will get.
        """
        self.plan, self.checkpoint, self.amax = plan, checkpoint, amax
        self.folder, self.threads, self.say, self.device = folder, threads, say, device
        self.folds: Folds = {}
        self._rows: dict[int | None, list[Row]] = {}
        for row in plan.quantized:
            self._rows.setdefault(row.layer, []).append(row)
        taps = {input_of(row) for row in plan.quantized if row.solved}
        self._folding = LayerFolds(plan, checkpoint)
        taps |= self._folding.taps
        self._stream: QuantizedStream | None = None
        if plan.propagates:
            taps |= routers(plan.config)
            current = next((i for i, name in enumerate(STREAM) if name in state), 0)
            self._stream = QuantizedStream(
                checkpoint,
                plan.config,
                hidden,
                InFiles(folder, hidden.shape, hidden.dtype, current, STREAM),
                InputFile(folder / REACHED, ()),
                torch_device(device),
            )
        self._inputs = InputFile(folder / INPUTS, taps)
        self._hidden, self._gradients = hidden, gradients
        self._graded = None if gradients is None else InputFile(folder / GRADED, ())
        self._digests: dict[str, str] = {}

    @property
    def observer(self) -> Callable[[], Observer]:
        return partial(InputObserver, self._inputs)

    def add(self, collected: list[tuple[str, Place]]) -> None:
        self._inputs.keep(collected)

    def finish(self, layer: int | None, batches: Sequence[Sequence[int]]) -> None:
        rows = self._rows.get(layer, [])
        folds: Folds = {}
        if layer is not None and self.plan.recipe.folds:
            folds = self._folding.choose(layer, rows, self._inputs)
            path = self.folder / folds_file(layer)
            path.unlink(missing_ok=True)
            self._digests[path.name] = save(path, folds)
            self.folds |= folds
            self._fold_maxima(rows, folds)
        self._solve(layer, batches, rows, folds)
        self._inputs.clear()
        trim_heap()  # what the solver's threads freed is not there for the next layer's rows

    def _solve(
        self, layer: int | None, batches: Sequence[Sequence[int]], rows: list[Row], folds: Folds
    ) -> None:
        """Solve what a layer, or the head, has to solve; ``rows`` are its quantized ones."""
        solved = [row for row in rows if row.solved]
        if not solved and (self._stream is None or layer is None):
            return
        scales = input_scales(rows, self.amax.scales.amax_of(self.plan), self.plan.recipe.headroom, [])
        shared = shared_maxima(self.checkpoint, folds, rows)
        self._grade(layer, batches, solved, folds)
        solver = LayerSolver(
            self.checkpoint,
            self._inputs,
            folds,
            self.plan.recipe.solve,
            scales=scales,
            shared=shared,
            threads=self.threads,
            device=self.device,
            reached=None if self._stream is None else self._stream.reached,
            graded=self._graded,
        )
        with closing(SolvedFile(self.folder / solved_file(layer), solved)) as file:
            where = "head" if layer is None else f"layer {layer}"

            def solve(part: Sequence[Row]) -> None:
                def say(done: int) -> None:
                    self.say(f"{where}, {before + done} of {len(solved)} weights solved")

                before = solved.index(part[0])
                solver.run(part, file, say)

            if self._stream is None:
                solve(solved)
            elif layer is None:
                self._stream.solve_head(batches, solved, solve)
            else:
                written = Written(self.checkpoint, rows, folds, shared, file)
                rounding = self._rounding(layer, rows, scales)
                self._stream.solve(Layer(layer, batches, rounding, written, self._inputs), solved, solve)
            if solved:
                self._digests[file.path.name] = file.digest

    def _grade(
        self, layer: int | None, batches: Sequence[Sequence[int]], solved: list[Row], folds: Folds
    ) -> None:
        """Keep the gradients of the loss at the outputs of what is solved in a layer."""
        if self._gradients is None or self._graded is None:
            return
        self._graded.clear()
        wanted = {row.module for row in solved if row.weighed}
        if layer is None or not wanted:
            return
        weights = FoldedWeights(self.checkpoint, names.layer(layer), folds)
        keep_at_outputs(
            self.plan.config,
            layer,
            weights,
            self._hidden.before,
            self._gradients,
            batches=batches,
            wanted=wanted,
            outputs=self._graded,
            device=torch_device(self.device),
        )
        weights.release()

    def _rounding(self, layer: int, rows: Iterable[Row], scales: Mapping[str, np.float32]) -> Rounding:
        """What engines round in a layer."""
        found: dict[str, tuple[FormatName, np.float32]] = {}
        for row in rows:
            if row.activation_format is not None:
                found[row.module] = row.activation_format, scales.get(row.module, np.float32(1))
        cache = self.plan.cache
        if cache is not None and layer in self.plan.kv_layers:
            for module in names.kv_projections(layer):
                amax = self.amax.scales.kv_amax[module]
                found[f"{module}{names.OUTPUT}"] = cache.number, cache_scale(amax, cache.number)
        return found

    def _fold_maxima(self, rows: list[Row], folds: Folds) -> None:
        """The maxima of folded inputs."""
        changes = InputTransforms(folds)
        for row in rows:
            fold = folds.get(row.name)
            if not row.calibrated or fold is None or (fold.right is None and fold.columns is None):
                continue
            tap, change = input_of(row), changes.of(row.module)
            largest = [float(np.abs(change(piece)).max()) for piece in self._inputs.pieces(tap) if piece.size]
            if largest:
                self.amax.scales.folded_amax[row.module] = max(largest)

    def state(self) -> dict[str, str]:
        """Names of files, with their hashes."""
        if self._stream is None:
            return dict(self._digests)
        states = self._stream.states
        return self._digests | {STREAM[states.current]: states.sha256}

    def restore(self, state: Mapping[str, str]) -> None:
        self._digests = {name: digest for name, digest in state.items() if name not in STREAM}
        self.folds = read_folds(self.folder, self._digests)
        open_solved(self.plan, self.folder, self._digests).close()

    def holds(self, rows: Sequence[int], state: Mapping[str, str]) -> bool:
        """Whether these rows of the quantized layers' stream are what the state says, if there is one."""
        if self._stream is None:
            return True
        states = self._stream.states
        return states.holds(rows, state.get(STREAM[states.current], ""))

    def close(self) -> None:
        self._inputs.close()
        if self._graded is not None:
            self._graded.close()
        if self._stream is not None:
            self._stream.close()


def _damaged(path: Path) -> CalibrationError:
    return CalibrationError(f"{path} is not what the run wrote; remove {path.parent.parent} and begin again")


def read_folds(folder: Path, digests: Mapping[str, str]) -> Folds:
    """The folds of all finished layers, from the files of a run's state.

    Raises:
        CalibrationError: a file is missing or has changed.
    """
    from nemoquant.checkpoint.manifest import file_sha256

    folds: Folds = {}
    for name in (name for name in digests if name.startswith("folds.")):
        path = folder / name
        if not path.is_file() or file_sha256(path) != digests[name]:
            raise _damaged(path)
        folds |= load(path)
    return folds


def open_solved(plan: Plan, folder: Path, digests: Mapping[str, str]) -> Solved:
    """The solved weights of all finished layers; close it after use.

    Raises:
        CalibrationError: a file is missing or has changed.
    """
    layers: dict[int | None, list[Row]] = {}
    for row in plan.quantized:
        if row.solved:
            layers.setdefault(row.layer, []).append(row)
    files: dict[int | None, SolvedFile] = {}
    for layer, rows in layers.items():
        name = solved_file(layer)
        if name not in digests:
            continue
        if not (folder / name).is_file():
            raise _damaged(folder / name)
        files[layer] = SolvedFile(folder / name, rows)
        if files[layer].digest != digests[name]:
            raise _damaged(folder / name)
    return Solved(files)

"""One quantize run: where its scales come from, which earlier run it continues, its steps in order."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nemoquant._version import __version__
from nemoquant.calibrate.batch import Batch, RowBatch, compute_dtype
from nemoquant.calibrate.scales import FILE as SCALES_FILE
from nemoquant.calibrate.scales import Scales
from nemoquant.checkpoint import manifest
from nemoquant.checkpoint.folder import (
    GRADED,
    HIDDEN,
    INPUTS,
    REACHED,
    STATE,
    STREAM,
    check_output,
    nearest_folder,
)
from nemoquant.checkpoint.identity import (
    Ahead,
    Units,
    calibrated_groups,
    differing,
    told,
    unit_name,
    units_of,
)
from nemoquant.checkpoint.intact import check_settings
from nemoquant.checkpoint.making import clear, ended
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.errors import CheckpointError, OutputError, UsageError, WeightError, listing
from nemoquant.files import replace_text
from nemoquant.formats.gpu import torch_device
from nemoquant.machine import torch_threads, usable_threads
from nemoquant.pack.workers import Threads
from nemoquant.pack.write import Changes
from nemoquant.planning.plan import Plan
from nemoquant.progress import Progress, no_progress
from nemoquant.run import same_source
from nemoquant.run.budget import Budget, budget
from nemoquant.run.estimate import Estimate, estimate_run
from nemoquant.run.options import RunOptions
from nemoquant.run.unfinished import Unfinished, check_finished, earlier, unfinished
from nemoquant.run.write import Output
from nemoquant.shipped import calibration_data
from nemoquant.solve.memory import waiting_bytes
from nemoquant.sources.source import Source
from nemoquant.tokens.array import are_rows
from nemoquant.tokens.rows import Rows, load_rows

if TYPE_CHECKING:
    import torch

    from nemoquant.run.cluster import Cluster
    from nemoquant.solve.backward import GradientFiles


class Outcome(NamedTuple):
    """Result of a run: items that verify checked, source files not copied, warnings, calibration summary.

    Nothing was checked where OUT was finished already.
    """

    verified: dict[str, int]
    skipped: list[str]
    warnings: list[str]
    calibration: dict[str, Any] | None


@dataclass(frozen=True)
class Listener:
    """Receives progress, messages, and the estimate of what the run will need (None: nothing is measured)."""

    progress: Progress = no_progress
    say: Callable[[str], None] = lambda text: None
    expected: Callable[[Estimate], None] | None = None


@dataclass(frozen=True)
class Prepared:
    """What a run works with; known before its first byte is written.

    Attributes:
        origin: source of the scales, an earlier run's file or rows to calibrate on; None where the plan needs
            no calibration.
        batch: all rows to calibrate on, and their dtype; None where nothing is calibrated.
        budget: memory, rows at once, and pieces ahead in packing.
    """

    origin: Scales | Rows | None
    batch: Batch | None
    budget: Budget


class Job:
    """A run of ``quantize`` over an opened source."""

    def __init__(
        self, source: Source, plan: Plan, out: Path, options: RunOptions, listener: Listener
    ) -> None:
        """Raises OutputError where the state of an earlier run can't be read."""
        self.source, self.plan, self.out, self.listener = source, plan, out, listener
        self.output = Output(source, plan, options)
        self.earlier = earlier(out) if options.resume else None
        self.options = _with_earlier_dtype(options, self.earlier)
        began = self.earlier.identity if self.earlier and not self.earlier.calibrated else {}
        self.threads: int = (
            options.threads or (options.on != "ray" and began.get("threads")) or usable_threads()
        )
        self.calibration_threads = 1 if options.on == "ray" else self.threads
        self._solved: dict[str, str] = {}  # files of solved weights and folds, with their hashes

    @cached_property
    def dtype(self) -> str:
        """The compute dtype of calibration, ``float32`` or ``bfloat16``."""
        return self.options.dtype or compute_dtype(self.options.device)

    @property
    def is_finished(self) -> bool:
        """Whether the run that ``--resume`` is to continue has made OUT already."""
        return self.earlier is not None and self.earlier.folder == self.out

    def check(self) -> None:
        """Refuse everything that can be refused without reading weights or text.

        Raises:
            OutputError, UsageError
        """
        if self.options.scales is not None and self.plan.needs_inputs:
            raise UsageError(
                f"--scales {self.options.scales} has the maxima of GEMM inputs alone, but recipe "
                f"{self.plan.recipe.name} solves for codes or folds, which needs the inputs themselves; give "
                f"--method max or mse, or calibrate without --scales"
            )
        if self.plan.needs_inputs and self.options.on == "ray":
            raise UsageError(
                f"--on ray does not solve for codes or folds, which recipe {self.plan.recipe.name} asks for; "
                f"give --method max or mse, or leave out --on"
            )
        if not self.is_finished:
            needed = self.plan.bytes_out + self._waiting_bytes()
            check_output(
                self.out, self.source.path, self.plan.tensors_out, needed, resume=self.options.resume
            )
        self.output.side_files  # noqa: B018  raises where one can't be read

    def _waiting_bytes(self) -> int:
        """Disk for what waits during calibration in bytes, as far as known before rows are read; else 0."""
        options = self.options
        calibrates = self.plan.needs_calibration and options.scales is None
        calibrates = calibrates and not (self.earlier and self.earlier.calibrated)
        if not calibrates or (options.data is not None and are_rows(Path(options.data), options.columns)):
            return 0
        batch = Batch(options.rows, options.seq_len, self.dtype)
        return batch.hidden_bytes(self.source.config.hidden_size) + waiting_bytes(self.plan, batch)

    def read_origin(self) -> Scales | Rows | None:
        """Read the source of the scales; None where the plan needs no calibration.

        Raises:
            CalibrationError, UsageError
        """
        options = self.options
        if not self.plan.needs_calibration:
            return None
        if options.scales is not None:
            scales = Scales.load(Path(options.scales))
            scales.check(self.plan, Path(options.scales))
            return scales
        data = calibration_data(Path(options.data) if options.data is not None else None)
        rows = load_rows(
            data,
            self.source.path,
            self.source.config,
            options.rows,
            options.seq_len,
            columns=options.columns,
        )
        if rows.columns:  # before hours are spent on the wrong ones
            self.listener.say(f"calibration text is read from {rows.source}")
        return rows

    def prepare(self, origin: Scales | Rows | None, processors: int | None = None) -> Prepared:
        """Choose the budget: how to keep below the memory.

        Args:
            processors: of a cluster; None is this process.
        Raises:
            UsageError: the memory is too little.
        """
        options, batch = self.options, None
        row_batch: RowBatch | None = options.row_batch
        if isinstance(origin, Rows):
            count, length = origin.ids.shape
            batch = Batch(count, length, self.dtype)
            if row_batch is None and self.earlier is not None:
                row_batch = self._earlier_row_batch(self.earlier)

        def choose(row_batch: RowBatch | None) -> Budget:
            return budget(
                self.plan,
                batch,
                memory=options.memory,
                row_batch=row_batch,
                threads=self.threads,
                device=options.device,
            )

        if row_batch is None and batch is not None and processors is not None:
            most = math.ceil(batch.rows / processors)  # at least one batch for each processor
            picked = choose(None).row_batch
            assert isinstance(picked, Mapping)
            row_batch = {kind: min(most, picked[kind]) for kind in sorted(picked)}
        return Prepared(origin, batch, choose(row_batch))

    def _earlier_row_batch(self, before: Unfinished) -> RowBatch | None:
        """Rows at once in the run that is continued; None where it does not name all kinds of layers."""
        found: RowBatch | None = before.identity.get("row_batch")
        if isinstance(found, Mapping) and not found.keys() >= set(self.source.config.layers):
            return None
        return found

    def announce(self, prepared: Prepared, processors: int | None = None) -> None:
        """If the listener wants an estimate, measure this machine and report what the run will need."""
        if self.listener.expected is None:
            return
        expected = estimate_run(
            self.source.checkpoint,
            self.plan,
            nearest_folder(self.out),
            prepared.batch,
            prepared.budget,
            threads=self.calibration_threads,
            processors=processors or self.threads,
            device=self.options.device,
        )
        self.listener.expected(expected)

    def dry_run(self) -> tuple[str, ...]:
        """Read and decide all that a run would, and announce it; returns warnings.

        Raises:
            CalibrationError, UsageError
        """
        origin = self.read_origin()
        self.announce(self.prepare(origin))
        return origin.warnings if isinstance(origin, Rows) else ()

    def run(self, warnings: Sequence[str]) -> Outcome:
        """Calibrate, pack and verify.

        Args:
            warnings: those of the run so far.
        Raises:
            NemoquantError: any of its kinds; see errors.py.
        """
        origin = self.read_origin()
        if self.is_finished:
            return self._done(origin)
        with ExitStack() as end, self._cluster() as cluster:
            processors = None if cluster is None else cluster.processors
            prepared = self.prepare(origin, processors)
            self.announce(prepared, processors)
            identity = self._identity(prepared)
            with (
                unfinished(self.out, identity, self.output.names, resume=self.options.resume) as run,
                self._unless_it_changed(),
            ):
                if run.worth_keeping:
                    self.listener.say(f"going on with {run.folder}: {run.describe()}")
                    self._keep_finished(run)
                    self._check_source(run.folder, run.units)
                elif self.options.resume:
                    self.listener.say("nothing to go on with, beginning anew")
                scales, added = self._scales(run, prepared, cluster)
                changes = end.enter_context(self._changes(run))
                workers = (
                    Threads(self.source.checkpoint, self.threads, prepared.budget.ahead, self.options.device)
                    if cluster is None
                    else cluster.workers(self.threads)
                )
                with self._hashed(run, cluster) as hashed:
                    written = self.output.write(
                        run,
                        scales,
                        changes,
                        workers,
                        [*warnings, *added],
                        self.listener.progress,
                        hashed=hashed,
                        scales_file=None if self.options.scales is None else str(self.options.scales),
                    )
                self.source.checkpoint.check_unchanged()
            end.enter_context(ended(self.out))
            self.source.checkpoint.done = True  # whatever happens to it now, OUT is whole
        summary = None if scales is None else scales.summary() | changes.summary()
        return Outcome(*written, summary)

    @contextmanager
    def _changes(self, run: Unfinished) -> Iterator[Changes]:
        """Folds and solved weights, as calibration left them in the folder of the state."""
        if not self.plan.needs_inputs:
            yield Changes()
            return
        from nemoquant.solve.collector import open_solved, read_folds

        assert run.calibration is not None
        digests = run.calibration["solved"]
        with closing(open_solved(self.plan, run.state, digests)) as solved:
            yield Changes(read_folds(run.state, digests), solved)

    @contextmanager
    def _cluster(self) -> Iterator["Cluster | None"]:
        if self.options.on != "ray":
            yield None
            return
        from nemoquant.run.cluster import connected

        with connected(self.options.address, self.source.checkpoint) as cluster:
            self.listener.say(f"Ray: {cluster.processors} processors")
            yield cluster

    def _done(self, origin: Scales | Rows | None) -> Outcome:
        """The outcome of a run that had made OUT already; only its state may be left to remove.

        Raises:
            UsageError: of other options or of another source. CheckpointError: OUT is damaged.
        """
        assert self.earlier is not None
        made = manifest.read_manifest(self.out)
        check_finished(self.earlier, self._identity(self.prepare(origin)), made)
        check_settings(self.out, made)
        Checkpoint(self.out).close()  # its headers and sizes; `verify` reads all of it
        units = made["source"]["units"]
        if units.keys() != units_of(row.name for row in self.plan.rows).keys():
            raise CheckpointError(
                f"{self.out / manifest.FILE} does not list the hashes of all of its source; remove "
                f"{self.out} and begin again"
            )
        self._check_source(self.out, units)
        scales = Scales.load(self.out / SCALES_FILE) if self.plan.needs_calibration else None
        if isinstance(origin, Rows) and scales is not None:
            other = same_source.of_other_weights(self.source, scales.units, units)
            if other is not None:
                raise UsageError(
                    f"{self.out} has scales of other weights than {self.source.path}, which this run would "
                    f"calibrate: {other}; give the --scales that it was made with, or remove it"
                )
        clear(self.out)
        self.listener.say(f"{self.out} was finished already")
        copied, skipped = self.output.side_files
        absent = [name for name in copied if not (self.out / name).exists()]
        if absent:
            self.listener.say(
                f"{self.out} lacks {listing(absent)}, which this run would copy; copy them by hand"
            )
        summary = None if scales is None else scales.summary() | {"solved": None, "folded": 0}
        return Outcome({}, skipped, made["warnings"], summary)

    def _check_source(self, folder: Path, expected: Units) -> None:
        same_source.check(
            self.source,
            folder,
            expected,
            self.threads,
            say=self.listener.say,
            progress=self.listener.progress,
        )

    def _keep_finished(self, run: Unfinished) -> None:
        """Keep those shards of an earlier run that are whole."""
        if not run.shards:
            return
        needed = {
            shard.file: {unit_name(row.name) for unit in shard.units for row in unit.rows}
            for shard in self.output.layout
        }
        self.listener.say(f"hashing the {len(run.shards)} shards in {run.folder}, to see that they are whole")
        run.keep_finished(needed, self.threads)

    @contextmanager
    def _unless_it_changed(self) -> Iterator[None]:
        """NaN and Inf in a file that somebody writes to are no damage: what is done by now is worth keeping.

        Raises:
            SourceChangedError: in place of a WeightError, where the source changed.
        """
        try:
            yield
        except WeightError:
            self.source.checkpoint.check_unchanged()
            raise

    @contextmanager
    def _hashed(self, run: Unfinished, cluster: "Cluster | None") -> Iterator[Callable[[], Units]]:
        """Yields what returns hashes of the source that packing must come to as well.

        Those of what was calibrated and of what is kept; on a cluster all of them, because its nodes read
        their own copies: they are hashed while packing goes on.
        """
        known = run.units
        if cluster is None:
            yield lambda: known
            return
        with same_source.hashing_rest(self.source, known, self.listener.say) as rest:
            yield lambda: known | rest()

    def _identity(self, prepared: Prepared) -> dict[str, Any]:
        """What decides the output's bytes: see ``run/unfinished.py`` and the table of options."""
        identity: dict[str, Any] = {
            "nemoquant": __version__,
            "config": manifest.config_sha256(self.source.raw_config)[:12],
            "tensors": manifest.tensor_table_sha256(self.source.checkpoint.tensors)[:12],
            "scale_groups": self.plan.scale_groups,
            "recipe": f"{self.plan.recipe.name} ({self.plan.sha256[:12]})",
            "shard_bytes": self.options.shard_bytes,
        }
        origin = prepared.origin
        if isinstance(origin, Scales):
            identity["scales"] = hashlib.sha256(origin.dump().encode()).hexdigest()[:12]
        elif origin is not None:
            count, length = origin.ids.shape
            identity |= {
                "data": f"{count} rows of {length} tokens of {origin.source} ({origin.sha256[:12]})",
                "device": self.options.device,
                "dtype": self.dtype,
                "row_batch": prepared.budget.row_batch,
                "threads": self.calibration_threads,
            }
        return identity

    def _scales(
        self, run: Unfinished, prepared: Prepared, cluster: "Cluster | None"
    ) -> tuple[Scales | None, list[str]]:
        """Calibrate, or take the results of an earlier run; returns warnings too.

        Warnings of a calibration are in its scales file, and are shown with it again.
        """
        origin = prepared.origin
        if origin is None:
            return None, []
        file = run.folder / SCALES_FILE
        if isinstance(origin, Scales):
            scales = origin
        elif run.calibrated:
            scales = self._calibrated(run, file)
            scales.check(self.plan, file)
        else:
            with torch_threads(self.calibration_threads):
                scales = self._calibrate(run, origin, prepared, cluster)
            scales.check(self.plan, run.state / STATE)  # which an earlier run may have begun
            scales.warnings = [*origin.warnings, *scales.warnings_for(self.plan)]
        text = scales.dump()
        if isinstance(origin, Scales) or not run.calibrated:  # the state has no hash of a file that was given
            replace_text(file, text)
        if not run.calibrated:
            run.calibrated = True
            if run.calibration is not None:
                run.calibration = {
                    "layers": run.calibration["layers"],
                    "units": scales.units,
                    "scales_sha256": hashlib.sha256(text.encode()).hexdigest(),
                    "solved": self._solved,
                }
            run.save()
        between = (run.gradients or {"files": {}})["files"]
        for name in (*HIDDEN, *STREAM, INPUTS, REACHED, GRADED, *between):
            (run.state / name).unlink(missing_ok=True)
        return scales, list(scales.warnings)

    def _calibrated(self, run: Unfinished, file: Path) -> Scales:
        """The scales that an earlier run calibrated; raises OutputError where their file is not its own."""
        at = run.calibration
        if at is None or not file.is_file() or manifest.file_sha256(file) != at["scales_sha256"]:
            raise OutputError(
                f"{file} is damaged: its sha256 is not the one in the run's state; remove {run.folder} and "
                f"begin again"
            )
        return Scales.load(file)

    def _calibrate(
        self, run: Unfinished, rows: Rows, prepared: Prepared, cluster: "Cluster | None"
    ) -> Scales:
        import torch

        from nemoquant.calibrate.hidden import InFiles
        from nemoquant.calibrate.observers import AmaxCollector, Collector
        from nemoquant.calibrate.run import Between, calibrate, settings

        dtype, device = getattr(torch, self.dtype), str(torch_device(self.options.device))
        row_batch = prepared.budget.row_batch
        assert row_batch is not None
        at = run.calibration
        amax = AmaxCollector(self.source.config, Scales(settings(rows, device, self.dtype, row_batch)))
        at_layer = [0, len(self.source.config.layers) + 1]

        def progress(stage: str, done: int, total: int, what: str) -> None:
            at_layer[0] = done
            self.listener.progress(stage, done, total, what)

        run.check_calibration(len(self.source.config.layers), len(rows.ids))
        gradients = None
        if self.plan.weighs_outputs:
            gradients = self._gradients(run, rows, dtype, device, row_batch)
        hidden = InFiles(
            run.state, (*rows.ids.shape, self.source.config.hidden_size), dtype, at["hidden"] if at else 0
        )
        solving = None
        solved: dict[str, str] = {}
        if self.plan.needs_inputs:
            from nemoquant.solve.collector import NAME, SolveCollector

            solved = at["collected"].get(NAME, {}) if at else {}
            solving = SolveCollector(
                self.plan,
                self.source.checkpoint,
                amax,
                run.state,
                threads=self.threads,
                say=lambda text: self.listener.progress("calibrate", at_layer[0], at_layer[1], text),
                device=self.options.device,
                hidden=hidden,
                gradients=gradients,
                state=solved,
            )
        collectors: list[Collector] = [amax] if solving is None else [amax, solving]
        begin = None
        units: Units = dict(at["units"]) if at else {}
        if at:
            begin = Between(at["layers"], at["dead_rows"], at["collected"])
            alive = [row for row in range(len(rows.ids)) if row not in begin.dead]
            whole = hidden.holds(alive, at["hidden_sha256"])
            if not (whole and (solving is None or solving.holds(alive, solved))):
                self.listener.say(
                    f"the hidden states in {run.state} are damaged: calibrating from the first layer on"
                )
                begin = run.calibration = None
                units = {}
        groups = calibrated_groups(self.source.table)
        ahead = Ahead(self.source.checkpoint, groups)

        def keep(between: Between) -> None:
            if between.layers == 1:
                units.update(ahead.take("begin"))
            units.update(ahead.take(between.layers - 1))
            # The layer's own check came before its hashes were complete, which are those of what it read only
            # if nothing changed until now.
            self.source.checkpoint.check_unchanged()
            if cluster is not None:
                self._check_nodes(units, cluster)
            run.calibration = {
                "layers": between.layers,
                "units": units,
                "dead_rows": between.dead,
                "collected": between.collected,
                "hidden": hidden.current,
                "hidden_sha256": hidden.sha256,
            }
            run.save()

        with closing(hidden), ahead, nullcontext() if solving is None else closing(solving):
            keys = list(groups)
            at_first = 0 if begin is None else keys.index(begin.layers if begin.layers in groups else "norm")
            for key in keys[at_first : at_first + 2]:
                ahead.begin(key)
            dead = calibrate(
                self.source.checkpoint,
                self.source.config,
                rows,
                collectors,
                device=device,
                dtype=dtype,
                row_batch=row_batch,
                hidden=hidden,
                begin=begin,
                keep=keep,
                spread=None if cluster is None else cluster.spread,
                progress=progress,
            )
            units.update(ahead.take("norm"))
        self.source.checkpoint.check_unchanged()
        if solving is not None:
            self._solved = solving.state()
        amax.scales.units = units
        amax.scales.non_finite_rows = len(dead)
        return amax.scales

    def _gradients(
        self, run: Unfinished, rows: Rows, dtype: "torch.dtype", device: str, row_batch: RowBatch
    ) -> "GradientFiles":
        """The gradients of the loss between all layers."""
        import torch

        from nemoquant.solve.backward import GradientFiles, find_gradients

        source, at = self.source, run.gradients
        shape = (*rows.ids.shape, source.config.hidden_size)
        files = GradientFiles(run.state, shape, dtype, at["files"] if at else {})
        units: Units = dict(at["units"]) if at else {}
        groups = calibrated_groups(source.table, head=True)
        layers = len(source.config.layers)

        with Ahead(source.checkpoint, groups) as ahead:

            def keep(done: int, dead: list[int], digests: Mapping[str, str]) -> None:
                for key in list(groups) if done > layers else ("begin", done - 1):
                    if not set(units_of(groups.get(key, ()))) <= units.keys():
                        units.update(ahead.take(key))
                source.checkpoint.check_unchanged()
                run.gradients = {"layers": done, "units": units, "dead_rows": dead, "files": dict(digests)}
                run.save()

            find_gradients(
                source.checkpoint,
                source.config,
                rows,
                files,
                dead=at["dead_rows"] if at else (),
                device=torch.device(device),
                dtype=dtype,
                row_batch=row_batch,
                keep=keep,
                progress=self.listener.progress,
            )
        return files

    def _check_nodes(self, units: Units, cluster: "Cluster") -> None:
        """Make sure that the nodes calibrated what is here, before the state says that it was calibrated.

        Raises:
            CheckpointError
        """
        changed = differing(units, cluster.units)
        if changed:
            raise CheckpointError(
                f"{self.source.path} is another one on the nodes of the cluster than here: "
                f"{told(changed, len(cluster.units))}; copy it to them again"
            )


def _with_earlier_dtype(options: RunOptions, before: Unfinished | None) -> RunOptions:
    """A calibrated run keeps its dtype: the default of this run's device may differ."""
    if before is not None and before.calibrated and options.dtype is None:
        return replace(options, dtype=before.identity.get("dtype"))
    return options

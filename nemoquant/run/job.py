"""One quantize run: what it was told, where its scales come from, what it goes on with, and the steps in their order."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemoquant._version import __version__
from nemoquant.calibrate.scales import FILE as SCALES_FILE
from nemoquant.calibrate.scales import Scales
from nemoquant.checkpoint import manifest
from nemoquant.checkpoint.folder import check_output, side_files
from nemoquant.errors import listing
from nemoquant.formats.gpu import torch_device
from nemoquant.pack.files import WRITTEN
from nemoquant.pack.shards import Shard, shards
from nemoquant.pack.workers import Threads, usable_threads
from nemoquant.planning.plan import Plan
from nemoquant.progress import Progress
from nemoquant.run.estimate import Estimate, budget, compute_dtype_name, estimate
from nemoquant.run.options import CalibrationOptions
from nemoquant.run.unfinished import Unfinished, check_options, earlier, finish, unfinished
from nemoquant.shipped import calibration_data
from nemoquant.sources.source import Source
from nemoquant.tokens.rows import Rows, load_rows

if TYPE_CHECKING:
    from nemoquant.calibrate.memory import RowBatch
    from nemoquant.run.cluster import Cluster

Verified = dict[str, int]


class Job:
    """A run of ``quantize`` over an opened source; finds are added to ``warnings``, which go into the output."""

    def __init__(
        self, source: Source, plan: Plan, out: Path, options: CalibrationOptions, threads: int | None, shard_bytes: int,
        resume: bool, warnings: list[str], progress: Progress, say: Callable[[str], None], expected: Callable[[Estimate], None] | None,
        engine: str, address: str | None,
    ) -> None:  # fmt: skip
        """Raises OutputError where the state of an earlier run can't be read."""
        assert source.checkpoint is not None
        self.source, self.checkpoint, self.plan, self.out, self.options = source, source.checkpoint, plan, out, options
        self.shard_bytes, self.resume, self.warnings, self.progress, self.say = shard_bytes, resume, warnings, progress, say
        self.expected, self.engine, self.address = expected, engine, address
        self.earlier = earlier(out) if resume else None
        if (
            self.earlier and self.earlier.calibrated and options.dtype is None
        ):  # what that run's device chose may not be this one's choice
            self.options = replace(options, dtype=self.earlier.options.get("--compute"))
        began = self.earlier.options if self.earlier and not self.earlier.calibrated else {}
        self.threads: int = threads or (engine != "ray" and began.get("--threads")) or usable_threads()
        self._calibration_threads = 1 if engine == "ray" else self.threads

    def check(self) -> None:
        """Everything that can be refused without reading weights or text.

        Raises:
            OutputError
        """
        if self.earlier is None or self.earlier.verified is None or self.earlier.folder != self.out:
            needed = self.plan.bytes_out + self._hidden_bytes()
            check_output(self.out, self.source.path, self.plan.tensors_out, needed, resume=self.resume)
        side_files(self.source.path, self.source.raw_config)

    def _hidden_bytes(self) -> int:
        """Disk for both files of hidden states, as far as it is known before the rows are read."""
        options = self.options
        calibrates = self.plan.needs_calibration and options.scales is None and not (self.earlier and self.earlier.calibrated)
        if not calibrates or (options.data is not None and Path(options.data).suffix == ".npy"):
            return 0
        item = 4 if compute_dtype_name(options) == "float32" else 2
        return 2 * options.rows * options.seq_len * self.source.config.hidden_size * item

    def check_calibration(self) -> Scales | Rows | None:
        """Read what the scales will come from, an earlier run's file or rows to calibrate on; None where nothing is needed.

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
        data = Path(options.data) if options.data is not None else calibration_data()
        return load_rows(data, self.source.path, self.source.config, options.rows, options.seq_len, self.warnings.append)

    def expect(self, found: Scales | Rows | None, cluster: "Cluster | None" = None) -> None:
        """Choose how to keep below the memory, and, where somebody listens, measure this machine and tell what the run will need.

        Raises:
            UsageError: the memory is too little.
        """
        options, shape = self.options, None
        row_batch: RowBatch | None = options.row_batch
        dtype, item = None, 0
        if isinstance(found, Rows):
            dtype = compute_dtype_name(options)
            item = 4 if dtype == "float32" else 2
            shape = (found.ids.shape[0], found.ids.shape[1])
            if row_batch is None and self.earlier is not None:
                row_batch = self.earlier.options.get("--row-batch")
        if row_batch is None and shape is not None and cluster is not None:
            most = math.ceil(shape[0] / cluster.processors)  # a batch for each processor at least
            picked = budget(self.plan, options.memory, None, shape, item, self.threads).row_batch
            assert isinstance(picked, Mapping)
            row_batch = {kind: min(most, picked[kind]) for kind in sorted(picked)}
        self._budget = budget(self.plan, options.memory, row_batch, shape, item, self.threads, options.device)
        if self.expected is not None:
            folder = next(p for p in self.out.absolute().parents if p.exists())
            processors = self.threads if cluster is None else cluster.processors
            estimated = estimate(
                self.checkpoint, self.plan, folder, shape, dtype, self._budget, self._calibration_threads, processors, options.device
            )  # fmt: skip
            self.expected(estimated)

    def run(self) -> tuple[Verified, list[str], dict[str, Any] | None]:
        """Calibrate, pack and verify.

        Returns:
            what verify checked, the source's files that were left behind, and the calibration's summary.
        Raises:
            MissingExtraError, UsageError: the cluster can't be used.
        """
        told = len(self.warnings)
        found = self.check_calibration()
        told_of_rows = self.warnings[told:]
        del self.warnings[told:]
        with self._cluster() as cluster:
            self.expect(found, cluster)
            weights = manifest.weights_fingerprint(self.checkpoint)
            identity = self._identity(found, weights)
            if self.earlier is not None and self.earlier.folder == self.out:
                return self._done(self.earlier, identity)
            with unfinished(self.out, identity, self._known_files(), resume=self.resume) as run:
                if run.worth_keeping:
                    self.say(f"going on with {run.folder}: {run.describe()}")
                elif self.resume:
                    self.say("nothing to go on with, beginning anew")
                scales = self._scales(run, found, weights, told_of_rows, cluster)
                from nemoquant.run.write import write_checkpoint

                workers = (
                    cluster.workers(self.threads)
                    if cluster
                    else Threads(self.checkpoint, self.threads, self._budget.ahead, self.options.device)
                )
                verified, skipped = write_checkpoint(
                    self.source, self.plan, self.layout, scales, run, workers, self.shard_bytes, self.warnings, self.progress
                )
        return verified, skipped, None if scales is None else scales.summary()

    @contextmanager
    def _cluster(self) -> Iterator["Cluster | None"]:
        if self.engine != "ray":
            yield None
            return
        from nemoquant.run.cluster import connected

        with connected(self.address, self.checkpoint) as cluster:
            self.say(f"Ray: {cluster.processors} processors")
            yield cluster

    def _done(self, found: Unfinished, identity: dict[str, Any]) -> tuple[Verified, list[str], dict[str, Any] | None]:
        """The earlier run was killed after it had given the folder its name: only its state is left to remove."""
        check_options(found, identity)
        scales = Scales.load(self.out / SCALES_FILE) if self.plan.needs_calibration else None
        self.warnings[:] = manifest.read_manifest(self.out)["warnings"]
        self.say(f"{self.out} was finished already")
        finish(self.out)
        assert found.verified is not None
        skipped = side_files(self.source.path, self.source.raw_config)[1]
        return found.verified, skipped, None if scales is None else scales.summary()

    @cached_property
    def layout(self) -> list[Shard]:
        """The output's shards; of a large model they take seconds to lay out."""
        return shards(self.plan, self.shard_bytes)

    def _known_files(self) -> set[str]:
        """Names that this run may write into OUT."""
        copied, _ = side_files(self.source.path, self.source.raw_config)
        return {shard.file for shard in self.layout} | {*copied, *WRITTEN}

    def _identity(self, found: Scales | Rows | None, weights: str) -> dict[str, Any]:
        """The options that decide the output's bytes, by the names that a user knows them by."""
        config = hashlib.sha256(json.dumps(self.source.raw_config, sort_keys=True).encode()).hexdigest()
        table = manifest.tensor_table_sha256(self.checkpoint.tensors)
        options: dict[str, Any] = {
            "nemoquant": __version__,
            "SRC's config": config[:12],
            "SRC's tensors": table[:12],
            "SRC's weights": weights[:12],
            "--no-scale-groups": not self.plan.scale_groups,
            "the recipe": f"{self.plan.recipe.name} ({self.plan.sha256[:12]})",
            "--shard-size": self.shard_bytes / 1e9,
        }
        if isinstance(found, Scales):
            options["--scales"] = hashlib.sha256(found.dump().encode()).hexdigest()[:12]
        elif found is not None:
            count, length = found.ids.shape
            options |= {
                "--calib": f"{count} rows of {length} tokens of {found.source} ({found.sha256[:12]})",
                "--device": self.options.device,
                "--compute": compute_dtype_name(self.options),
                "--row-batch": self._budget.row_batch,
                "--threads": self._calibration_threads,
            }
        return options

    def _scales(
        self, run: Unfinished, found: Scales | Rows | None, weights: str, told: list[str], cluster: "Cluster | None"
    ) -> Scales | None:
        """Calibrate, or take the results of an earlier run. What was told of a run is told again with its file."""
        if found is None:
            return None
        file = run.folder / SCALES_FILE
        if run.calibrated:
            scales = Scales.load(file)
        elif isinstance(found, Scales):
            scales = found
        else:
            scales = self._calibrate(run, found, cluster)
            scales.settings["weights"] = weights
            scales.warnings = told + self._told_of(scales)
        if isinstance(found, Scales) and found.settings.get("weights") != weights:
            self.warnings.append(
                f"{self.options.scales} was made from other weights than {self.source.path}: their norms and SSM parameters differ"
            )
        self.warnings += scales.warnings
        if not run.calibrated:
            manifest.replace_text(file, scales.dump())
            run.calibrated = True
            if run.calibration is not None:
                run.calibration = {"layers": run.calibration["layers"]}
            run.save()
        for hidden in run.state.glob("hidden.*"):
            hidden.unlink()
        return scales

    def _calibrate(self, run: Unfinished, rows: Rows, cluster: "Cluster | None") -> Scales:
        import torch

        from nemoquant.calibrate.hidden import InFiles
        from nemoquant.calibrate.run import Between, calibrate

        torch.set_num_threads(self._calibration_threads)
        dtype = getattr(torch, compute_dtype_name(self.options))
        assert self._budget.row_batch is not None
        shape = (*rows.ids.shape, self.source.config.hidden_size)
        begin, at = None, run.calibration
        hidden = InFiles(run.state, shape, dtype, at["hidden"] if at else 0)
        if at:
            begin = Between(at["layers"], Scales.from_json(at["scales"]), at["dead_rows"])
            if not hidden.holds([row for row in range(shape[0]) if row not in begin.dead], at["hidden_sha256"]):
                self.say(f"the hidden states in {run.state} are damaged: calibrating from the first layer on")
                begin = run.calibration = None

        def keep(between: Between) -> None:
            run.calibration = {
                "layers": between.layers,
                "dead_rows": between.dead,
                "scales": between.scales.to_json(),
                "hidden": hidden.current,
                "hidden_sha256": hidden.sha256,
            }
            run.save()

        try:
            return calibrate(
                self.checkpoint, self.source.config, rows, device=str(torch_device(self.options.device)), dtype=dtype,
                row_batch=self._budget.row_batch, hidden=hidden, begin=begin, keep=keep,
                spread=None if cluster is None else cluster.spread,
                progress=self.progress,
            )  # fmt: skip
        finally:
            hidden.close()

    def _told_of(self, scales: Scales) -> list[str]:
        told = []
        if scales.non_finite_rows:
            told.append(f"{scales.non_finite_rows} calibration rows came to NaN or Inf and were left out")
        unreached, experts = scales.unreached(), sum(map(len, scales.tokens_per_expert.values()))
        if unreached and any(row.expert is not None and row.activation_format for row in self.plan.rows):
            told.append(
                f"{len(unreached)} of {experts} experts got no calibration token ({listing(unreached)}); "
                "each has the largest input scale of its layer and projection, give more rows to see them"
            )
        return told

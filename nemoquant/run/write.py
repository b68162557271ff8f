"""Writes a run's folder (shards, configs, index, side files, scales, card, manifest), then verifies it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from nemoquant._version import __version__
from nemoquant.calibrate.scales import Scales
from nemoquant.checkpoint import manifest
from nemoquant.checkpoint.identity import Units, differing, told, units_of
from nemoquant.checkpoint.reader import INDEX
from nemoquant.checkpoint.side_files import copy_side_files, side_files
from nemoquant.errors import OutputError, SourceChangedError, VerificationError, listing
from nemoquant.files import sync_folder, write_again, write_json_again
from nemoquant.layouts.modelopt import config_files
from nemoquant.pack.card import Told, card
from nemoquant.pack.files import WRITTEN
from nemoquant.pack.outliers import Lost, lost_warnings
from nemoquant.pack.shards import Shard, shards
from nemoquant.pack.verify import verify
from nemoquant.pack.workers import Workers
from nemoquant.pack.write import Changes, Packer
from nemoquant.planning.plan import Plan
from nemoquant.progress import Progress
from nemoquant.run.options import RunOptions
from nemoquant.run.same_source import of_other_weights
from nemoquant.run.state import LostState
from nemoquant.run.unfinished import Unfinished
from nemoquant.solve import records
from nemoquant.solve.files import FOLDS, SOLVED
from nemoquant.solve.folds.file import save
from nemoquant.solve.words import change_sentences
from nemoquant.sources.hub import from_hub
from nemoquant.sources.source import Source
from nemoquant.words import in_markdown, markdown_code, message


class Written(NamedTuple):
    """Result of writing: items that verify checked, source files that were not copied, all warnings."""

    verified: dict[str, int]
    skipped: list[str]
    warnings: list[str]


@dataclass(frozen=True)
class Output:
    """The files of one quantized checkpoint, before they exist."""

    source: Source
    plan: Plan
    options: RunOptions

    @cached_property
    def layout(self) -> list[Shard]:
        """The shards, computed once: for a large model this takes seconds."""
        return shards(self.plan, self.options.shard_bytes)

    @cached_property
    def side_files(self) -> tuple[list[str], list[str]]:
        """Names of the source's files that are copied, and of those that are not."""
        also = self.options.also
        written = [name for name in also if name in WRITTEN]
        if written:
            raise OutputError(f"--also {written[0]}: nemoquant writes a file of that name; leave it out")
        return side_files(self.source.path, self.source.raw_config, also)

    @property
    def names(self) -> set[str]:
        """Names of all files that may be written."""
        return {shard.file for shard in self.layout} | {*self.side_files[0], *WRITTEN}

    def write(
        self,
        run: Unfinished,
        scales: Scales | None,
        changes: Changes,
        workers: AbstractContextManager[Workers],
        warnings: Sequence[str],
        progress: Progress,
        *,
        hashed: Callable[[], Units],
        scales_file: str | None = None,
    ) -> Written:
        """Write everything that ``run`` does not have yet into its folder, and verify it.

        The scales file is there already.

        Args:
            workers: encode the weights; entered when packing starts.
            warnings: those of the run so far; they go into card and manifest, together with new ones.
            changes: folds and solved weights.
            hashed: returns hashes of units of the source that packing must come to as well.
            scales_file: the file of another run that the scales are from; its source may be another one.
        Raises:
            CalibrationError, WeightError, SourceChangedError, VerificationError
        """
        folder = run.folder
        warnings = [*warnings, *self._pack(run, scales, changes, workers, progress)]
        packed = run.packed
        units = {name: packed[name] for name in units_of(row.name for row in self.plan.rows)}
        self._check_same(run, hashed(), units)
        if scales is not None and scales_file is not None:
            warnings += self._scales_warnings(scales, units, scales_file)
        for name, data in config_files(self.plan, self.source.raw_config).items():
            write_json_again(folder / name, data)
        weight_map = {entry.written: shard.file for shard in self.layout for entry in shard.entries}
        write_json_again(
            folder / INDEX, {"metadata": {"total_size": self.plan.bytes_out}, "weight_map": weight_map}
        )
        if changes.solved is not None and any(row.solved for row in self.plan.quantized):
            _write_text(folder / SOLVED, records.dump(self.plan, changes.solved.records))
        if self.plan.recipe.folds:
            (folder / FOLDS).unlink(missing_ok=True)
            save(folder / FOLDS, changes.folds)
        copied, skipped = self.side_files
        copy_side_files(self.source.path, copied, folder)
        told = change_sentences(changes.summary(), self.plan.recipe)
        text = card(
            self.source,
            self.plan,
            self.options.gpu,
            Told(_calibration_sentence(self.plan, scales), told, warnings, copied),
        )
        _write_text(folder / manifest.CARD, text)
        digests = {file: entry["sha256"] for file, entry in run.shards.items()}
        names = sorted(name for name in self.names - {manifest.FILE} if (folder / name).exists())
        files = {name: digests.get(name) or manifest.file_sha256(folder / name) for name in names}
        manifest.write_manifest(folder, self._manifest(scales, warnings, files, units))
        report = verify(folder, self.source, encode_again=False, progress=progress)
        self.source.checkpoint.check_unchanged()  # or what was written seems wrong
        if not report.ok:
            raise VerificationError(
                f"what was written is not what was planned: {'; '.join(report.problems[:3])}"
            )
        return Written(report.checked, skipped, warnings)

    def _check_same(self, run: Unfinished, hashed: Units, units: Units) -> None:
        changed = differing(hashed, units)
        if changed:
            run.forget(changed)
            raise SourceChangedError(
                f"{self.source.path} is not the same for calibration and packing, or on all nodes: "
                f"{told(changed, len(hashed))}; expected files that nobody writes to meanwhile, the same on "
                f"all nodes of a cluster"
            )

    def _scales_warnings(self, scales: Scales, units: Units, scales_file: str) -> list[str]:
        """A warning where scales of another run are of another source."""
        other = of_other_weights(self.source, scales.units, units)
        return [
            f"{scales_file} was made from other weights than {self.source.path}: {other}; its input scales "
            f"may not fit, calibrate again without --scales"
        ] * (other is not None)

    def _pack(
        self,
        run: Unfinished,
        scales: Scales | None,
        changes: Changes,
        workers: AbstractContextManager[Workers],
        progress: Progress,
    ) -> list[str]:
        """Write the missing shards; returns the warnings of all shards."""
        done = 0

        def packed(size: int) -> None:
            nonlocal done
            done += size
            progress("pack", done, self.plan.bytes_in, "")

        present = set(run.shards)  # compared with their hashes when the run was taken up
        with workers as entered:
            packer = Packer(self.plan, self.source.checkpoint, scales, changes, entered, packed)
            for shard in self.layout:
                if shard.file in present:
                    packed(sum(row.bytes_in for unit in shard.units for row in unit.rows))
                    continue
                (run.folder / shard.file).unlink(missing_ok=True)
                before = len(packer.zero_weights)
                digest = packer.write(run.folder / shard.file, shard)
                run.shards[shard.file] = {
                    "sha256": digest,
                    "zero_weights": packer.zero_weights[before:],
                    "lost": {
                        row.module: _counts(packer.lost[row.module])
                        for unit in shard.units
                        for row in unit.rows
                        if row.module in packer.lost
                    },
                    "units": packer.read_for(shard),
                }
                sync_folder(run.folder)  # the shard's name, before the state has it
                run.save()
        zero = [name for shard in self.layout for name in run.shards[shard.file]["zero_weights"]]
        lost = {
            module: Lost(**counts)
            for shard in self.layout
            for module, counts in run.shards[shard.file]["lost"].items()
        }
        formats = {row.module: row.format for row in self.plan.rows if row.format != "source"}
        return packer.warnings + _zero_warnings(self.plan, zero) + lost_warnings(lost, formats)

    def _manifest(
        self, scales: Scales | None, warnings: list[str], files: dict[str, str], units: Units
    ) -> dict[str, Any]:
        return {
            "schema": manifest.SCHEMA,
            "nemoquant": __version__,
            "source": {
                "config_sha256": manifest.config_sha256(self.source.raw_config),
                "tensor_table_sha256": manifest.tensor_table_sha256(self.source.checkpoint.tensors),
                "dtypes": manifest.pack_dtypes(self.source.table),
                "units": units,
            }
            | from_hub(self.source.path),
            "plan": self.plan.summary()
            | {"recipe": self.plan.recipe.dump(), "scale_groups": self.plan.scale_groups},
            "calibration": None if scales is None else scales.settings,
            "shard_bytes": self.options.shard_bytes,
            "warnings": [message(text) for text in warnings],
            "skipped_side_files": self.side_files[1],
            "files": files,
        }


def _counts(lost: Lost) -> LostState:
    return {
        "floored": lost.floored,
        "blocks": lost.blocks,
        "flushed": lost.flushed,
        "values": lost.values,
    }


def _zero_warnings(plan: Plan, modules: list[str]) -> list[str]:
    """What became of weights without a value that their format could scale."""
    blocks = {row.module for row in plan.quantized if row.number is not None and not row.number.global_scale}
    by_tensor, by_block = [m for m in modules if m not in blocks], [m for m in modules if m in blocks]
    found = []
    if by_tensor:
        found.append(
            f"{len(by_tensor)} weights are zero or underflow; codes set to 0, scales to 1.0 where no group "
            f"gives one: {listing(by_tensor)}"
        )
    if by_block:
        found.append(
            f"{len(by_block)} weights are zero; codes and block scales set to 0: {listing(by_block)}"
        )
    return found


def _write_text(path: Path, text: str) -> None:
    write_again(path, text.encode("utf-8"))


def _calibration_sentence(plan: Plan, scales: Scales | None) -> str:
    if scales is None:
        return "none was needed."
    s = scales.settings
    return (
        f"{in_markdown(s['rows'])} rows of {in_markdown(s['seq_len'])} tokens of {markdown_code(s['data'])}, "
        f"{in_markdown(s['dtype'])} compute; for {plan.calibrated_for}."
    )

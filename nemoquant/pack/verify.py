"""Verify: read a written checkpoint again and compare it with its plan, resolved from its own manifest.

1. the manifest is unchanged, every file in it exists and has its sha256; an unknown file gives a warning, and
   so does a model card that was edited; nothing is read through a link out of the folder
2. the recipe and the config give the plan whose hash the manifest names
3. names, dtypes, shapes and order of all tensors are those of the plan, the index agrees, data begins at a
   page
4. every scalar scale is finite and positive, every block scale is one that its format writes, and the scales
   of inputs and caches are those that follow from the scales file
5. both config files are those that the plan calls for, and the source's own keys are all there
6. with the source: its bytes have the hashes that the manifest has; unquantized tensors are equal bit for
   bit; quantized ones are encoded again and must give the same bytes
7. of a weight that was solved: its objective is not above that of the plain method; with the source: its
   error against the weight is the one that was noted (its codes do not follow from the weight alone: an exact
   repeat is the run repeated)

A fold is repeated from its file: what is compared is the folded weight.
"""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nemoquant.calibrate.derived import activation_scales, weight_scale
from nemoquant.calibrate.scales import FILE as SCALES_FILE
from nemoquant.calibrate.scales import Scales
from nemoquant.checkpoint.header import ALIGNMENT, read_header
from nemoquant.checkpoint.identity import (
    UnitHash,
    Units,
    differing,
    piece_hash,
    pieces,
    told,
    unit_name,
    units_of,
)
from nemoquant.checkpoint.intact import SHARD, SHOWN_EVERY, Hashing
from nemoquant.checkpoint.manifest import CARD, FILE, listed, read_manifest, tensor_table_sha256
from nemoquant.checkpoint.reader import INDEX, SINGLE, Checkpoint
from nemoquant.checkpoint.towers import towers
from nemoquant.errors import CheckpointError, NemoquantError, WeightError, listing
from nemoquant.files import MOST_TABLE_ENTRIES, lies_in, read_json
from nemoquant.formats.arithmetic import Encoded
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.layouts.modelopt import LEGACY, SECTION, quantization_sections, spelled_for_engines
from nemoquant.machine import usable_threads
from nemoquant.model.parse import load_config
from nemoquant.model.roles import tensor_table
from nemoquant.pack.encode import amax, copy, encode_again, error_again, slices
from nemoquant.pack.shards import Entry, Shard, shards
from nemoquant.planning.plan import Plan
from nemoquant.planning.recipe import parse_recipe
from nemoquant.planning.resolve import resolve
from nemoquant.planning.row import Row
from nemoquant.progress import Count, Progress, no_progress
from nemoquant.solve.files import FOLDS, SOLVED
from nemoquant.solve.folds.file import check as check_folds
from nemoquant.solve.folds.file import load as load_folds
from nemoquant.solve.folds.layer import NO_FOLDS, Folds
from nemoquant.solve.folds.transform import Transform
from nemoquant.solve.source import relative
from nemoquant.sources.source import Source

TOLERANCE = 1e-9  # of float64 sums in another order
ELSEWHERE = "is no regular file of this folder (a link out of it, or a device or pipe); nothing was read"


class Verification:
    """Result of verify: ``problems`` make it fail, ``warnings`` do not; ``checked`` counts checked items.

    ``edited`` are files that may be edited and were; each has a warning too.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.edited: list[str] = []
        self.checked: dict[str, int] = {
            "files": 0,
            "tensors": 0,
            "scales": 0,
            "compared_with_source": 0,
            "encoded_again": 0,
            "solved": 0,
        }

    @property
    def ok(self) -> bool:
        return not self.problems

    def add(self, other: "Verification") -> None:
        """Add another report's results to this one."""
        self.problems += other.problems
        self.warnings += other.warnings
        self.edited += other.edited
        self.checked = {key: count + other.checked[key] for key, count in self.checked.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "problems": self.problems,
            "warnings": self.warnings,
            "edited": self.edited,
            "checked": self.checked,
        }


def verify(
    out: Path, source: Source | None = None, *, encode_again: bool = True, progress: Progress = no_progress
) -> Verification:
    """Check the checkpoint in ``out``; problems are collected, not raised.

    Args:
        source: what the checkpoint was made from, for step 6; ``encode_again`` False leaves out the second
            half of that step.
        progress: called by this thread alone.
    Raises:
        CheckpointError: the checkpoint can't be checked at all, because its manifest can't be used.
        SourceChangedError, WeightError: of ``source``; what was found with it says nothing of the checkpoint.
    """
    report = Verification()
    if not _own(out, FILE):
        raise CheckpointError(f"{out / FILE} {ELSEWHERE}")
    manifest = read_manifest(out)
    report.problems += _elsewhere(out, manifest)
    if report.problems:
        return report
    files = [name for name in manifest["files"] if name != CARD]
    total = sum((out / name).stat().st_size for name in files if (out / name).exists())
    if source is not None:
        total += sum(info.nbytes for info in source.checkpoint.tensors.values())
    done, counting = 0, threading.Lock()

    def count(size: int) -> None:
        nonlocal done
        with counting:
            done += size

    def show() -> None:
        progress("verify", min(done, total), total, "")

    def compared(size: int) -> None:
        count(size)
        show()

    rest = Verification()
    digests = {out / name: listed(manifest, name) for name in files}
    with Hashing(digests, usable_threads(), count) as hashing:  # while the content is checked
        try:
            plan = _plan_again(out, manifest, rest)
            layout = shards(plan, manifest["shard_bytes"])
            _check_configs(out, plan, source, rest)
            changes = _changes(out, plan, rest)
            with Checkpoint(out) as checkpoint:
                if _check_tensors(out, layout, checkpoint, rest):
                    _check_scales(layout, checkpoint, _activation_scales(out, plan), rest)
                    if source is not None:
                        _compare(
                            manifest,
                            layout,
                            checkpoint,
                            source,
                            changes,
                            rest,
                            again=encode_again,
                            count=compared,
                        )
        except WeightError:
            raise  # of the source: nothing else is searched for NaN
        except NemoquantError as error:
            if source is not None:
                source.checkpoint.check_unchanged()  # or the checkpoint seems wrong
            rest.problems.append(str(error))
        while hashing.unfinished(SHOWN_EVERY):
            show()
        show()
        report.problems += hashing.problems().values()
    report.checked["files"] += len(manifest["files"])
    _check_card(out, manifest, report)
    for path in sorted(out.iterdir()):
        if path.name not in manifest["files"] and path.name != FILE:
            report.warnings.append(f"{path.name} is not in the manifest; nemoquant did not write it")
    report.add(rest)
    return report


def _own(out: Path, name: str) -> bool:
    """Whether a name leads to a regular file of this folder; so does one that there is not."""
    try:
        return lies_in(out, name)
    except RuntimeError:  # a circle of links
        return False
    except OSError:  # a link to nothing is refused; what else can't be read is said when it is read
        return not (out / name).is_symlink()


def _elsewhere(out: Path, manifest: dict[str, Any]) -> list[str]:
    """Files that verify would read, and that are no regular files of this folder; one of them ends it."""
    names = {*manifest["files"], "config.json", LEGACY, INDEX, SCALES_FILE, SOLVED, FOLDS, SINGLE}
    names |= {path.name for path in out.iterdir() if path.name.endswith(SHARD)}
    return [f"{name} {ELSEWHERE}" for name in sorted(names) if not _own(out, name)]


def _check_card(out: Path, manifest: dict[str, Any], report: Verification) -> None:
    """The model card is there to be edited: what became of it is said, and is no damage."""
    if CARD not in manifest["files"]:
        return
    with Hashing({out / CARD: listed(manifest, CARD)}, threads=1) as hashing:
        problems = hashing.problems()
    if problems and (out / CARD).exists():
        report.edited.append(CARD)
        report.warnings.append(f"{CARD} was edited: its sha256 is not the manifest's")
    else:
        report.warnings += problems.values()


def _plan_again(out: Path, manifest: dict[str, Any], report: Verification) -> Plan:
    config, _ = load_config(out)
    dtypes = manifest["source"]["dtypes"]
    table = [
        replace(spec, dtype=dtypes["others"].get(spec.name, dtypes["usual"])) for spec in tensor_table(config)
    ]
    if config.prefix:  # the config does not say what is beside the language model
        with Checkpoint(out) as checkpoint:
            table += towers(config, checkpoint.tensors)
    settings = manifest["plan"]
    plan = resolve(
        parse_recipe(settings["recipe"]), config, table, assumed=False, scale_groups=settings["scale_groups"]
    )
    if manifest["source"]["units"].keys() != units_of(spec.name for spec in table).keys():
        report.problems.append(f"{FILE} does not list the hashes of all of its source")
    if plan.sha256 != settings["sha256"]:
        report.problems.append(
            f"the recipe and config.json give the plan {plan.sha256[:12]}, the manifest names "
            f"{settings['sha256'][:12]}"
        )
    return plan


class Changes(NamedTuple):
    """Folds by tensor, and what was noted of each solved weight."""

    folds: Folds
    solved: dict[str, dict[str, Any]]


def _changes(out: Path, plan: Plan, report: Verification) -> Changes:
    """Read folds and notes, as far as the plan has them, and check the notes."""
    folds, solved = NO_FOLDS, {}
    if plan.recipe.folds:
        folds = load_folds(out / FOLDS)
        check_folds(out / FOLDS, folds, tensor_table(plan.config))
    if any(row.solved for row in plan.quantized):
        from nemoquant.solve.records import read

        solved = read(out / SOLVED, [row.name for row in plan.rows])
        lacking = [row.name for row in plan.quantized if row.solved and row.name not in solved]
        if lacking or len(solved) > sum(row.solved for row in plan.quantized):
            raise CheckpointError(
                f"{SOLVED} does not have the weights of the plan: it lacks {listing(lacking) or 'none'}, and "
                f"has {len(solved):,}"
            )
    for name, found in solved.items():
        if found["objective"] > found["plain"] * (1 + TOLERANCE):
            report.problems.append(
                f"{name}: {SOLVED} has the objective {found['objective']:.6g}, above that of the plain "
                f"method, {found['plain']:.6g}"
            )
    return Changes(folds, solved)


def _check_tensors(out: Path, layout: list[Shard], checkpoint: Checkpoint, report: Verification) -> bool:
    """Check name, dtype, shape, order and place of every tensor; True if the rest can be checked."""
    before = len(report.problems)
    for shard in layout:
        if not (out / shard.file).is_file():
            report.problems.append(f"{shard.file} is missing; the plan has {len(layout)} shards")
            continue
        tensors, _ = read_header(out / shard.file)
        stored = sorted(tensors.values(), key=lambda t: (t.start, t.end))
        expected = list(shard.entries)
        report.checked["tensors"] += len(stored)
        if [(t.name, t.dtype, t.shape) for t in stored] != [(e.written, e.dtype, e.shape) for e in expected]:
            report.problems.append(
                f"{shard.file}: {_first_difference({t.name: t for t in stored}, expected)}"
            )
        elif stored and stored[0].start % ALIGNMENT:
            report.problems.append(
                f"{shard.file}: data begins at byte {stored[0].start}, expected a multiple of {ALIGNMENT}"
            )
    index = _json(out / INDEX)
    if index.get("weight_map") != {e.written: shard.file for shard in layout for e in shard.entries}:
        report.problems.append(f"{INDEX}: its weight_map is not the plan's")
    total = sum(e.nbytes for shard in layout for e in shard.entries)
    if index.get("metadata") != {"total_size": total}:
        report.problems.append(
            f"{INDEX}: its metadata are {index.get('metadata')}, expected total_size {total}"
        )
    if set(checkpoint.tensors) != {e.name for shard in layout for e in shard.entries}:
        report.problems.append(f"{INDEX}: tensors missing or extra")
    return len(report.problems) == before


def _first_difference(stored: dict[str, Any], expected: list[Entry]) -> str:
    for e in expected:
        t = stored.get(e.written)
        if t is None:
            return f"{e.written} is missing"
        if (t.dtype, t.shape) != (e.dtype, e.shape):
            return f"{e.written} is {t.dtype} {list(t.shape)}, expected {e.dtype} {list(e.shape)}"
    extra = set(stored) - {e.written for e in expected}
    return f"{min(extra)} is not in the plan" if extra else "its tensors are in another order than the plan's"


def _activation_scales(out: Path, plan: Plan) -> dict[tuple[str, str], np.float32]:
    """(module, kind) -> scale of its input or cache, from the scales file."""
    if not plan.needs_calibration:
        return {}
    scales = Scales.load(out / SCALES_FILE)
    scales.check(plan, out / SCALES_FILE)
    expected = activation_scales(plan, scales)
    return {(m, "input_scale"): v for m, v in expected.inputs.items()} | {
        (m, "kv_scale"): v for m, v in expected.caches.items()
    }


def _check_scales(
    layout: list[Shard],
    checkpoint: Checkpoint,
    activations: dict[tuple[str, str], np.float32],
    report: Verification,
) -> None:
    for e in (e for shard in layout for e in shard.entries if e.kind not in ("source", "codes")):
        values = checkpoint.array(e.name)
        if e.kind == "block_scales" and e.row.format != "source":
            bad = ARITHMETIC[e.row.format].bad_scales(values)
        else:
            bad = int(np.count_nonzero(~(np.isfinite(values) & (values > 0))))
        if bad:
            report.problems.append(f"{e.name}: {bad} of {values.size} scales are not finite and positive")
        elif e.kind in ("input_scale", "kv_scale") and values[()] != (
            expected := activations[e.row.module, e.kind]
        ):
            report.problems.append(f"{e.name} is {values[()]}, {SCALES_FILE} gives {expected}")
        checkpoint.release([e.name])
        report.checked["scales"] += values.size


def _check_configs(out: Path, plan: Plan, source: Source | None, report: Verification) -> None:
    section, legacy = quantization_sections(plan)
    written = _json(out / "config.json")
    if written.pop(SECTION, None) != section:
        report.problems.append(f"config.json: `{SECTION}` is not what the plan calls for")
    if _json(out / LEGACY) != legacy:
        report.problems.append(f"{LEGACY} is not what the plan calls for")
    expected = written if source is None else spelled_for_engines(source.raw_config)
    if written != expected:
        changed = sorted(k for k in written.keys() | expected.keys() if written.get(k) != expected.get(k))
        report.problems.append(f"config.json: keys differ from the source's: {', '.join(changed)}")


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none, so that it differs from what is expected."""
    try:
        data = read_json(path, entries=MOST_TABLE_ENTRIES)
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _compare(
    manifest: dict[str, Any],
    layout: list[Shard],
    written: Checkpoint,
    source: Source,
    changes: Changes,
    report: Verification,
    *,
    again: bool,
    count: Count,
) -> None:
    """Compare every tensor with the source's; the experts of a layer in threads."""
    original = source.checkpoint
    if tensor_table_sha256(source.checkpoint.tensors) != manifest["source"]["tensor_table_sha256"]:
        report.problems.append(f"{source.path} is not the source: its tensor table is another one")
        return
    units = [unit for shard in layout for unit in shard.units]
    groups: dict[str, list[Row]] = {}
    for row in (row for unit in units for row in unit.rows if row.weight_group):
        groups.setdefault(row.weight_group or "", []).append(row)

    def check(entries: dict[str, dict[str, Entry]], row: Row) -> Compared:
        fold = changes.folds.get(row.name)
        if row.format == "source":
            return _equal_bytes(original, written, row, fold)
        if not again:
            return Compared(None, [])
        if row.solved:
            noted = changes.solved[row.name]["error"]
            return _error_again(row, noted, entries[row.name], original, written, fold)
        group = groups.get(row.weight_group or "", [row])
        return _encoded_again(row, group, entries[row.name], original, written, changes.folds)

    found: Units = {}
    with ThreadPoolExecutor(usable_threads()) as pool:
        for unit in units:
            entries: dict[str, dict[str, Entry]] = {}
            for e in unit.entries:
                entries.setdefault(e.row.name, {})[e.kind] = e
            digest, whole = UnitHash(), True
            for row, result in zip(unit.rows, pool.map(partial(check, entries), unit.rows), strict=True):
                if result.problem:
                    report.problems.append(result.problem)
                if row.format == "source" or again:
                    report.checked[_kind_of_check(row)] += 1
                    for piece in result.hashes:
                        digest.piece(piece)
                    digest.end_tensor()
                else:
                    whole = False
                original.release([row.name])
                count(row.bytes_in)
            if whole:
                found[unit_name(unit.rows[0].name)] = digest.hexdigest()
            written.release(e.name for e in unit.entries)
    original.check_unchanged()
    changed = differing(manifest["source"]["units"], found)
    if changed:
        report.problems.append(
            f"{source.path} is not the source: {told(changed, len(found))} from what it was made from"
        )


def _kind_of_check(row: Row) -> str:
    if row.format == "source":
        return "compared_with_source"
    return "solved" if row.solved else "encoded_again"


class Compared(NamedTuple):
    """What is wrong with one tensor, and the hashes of the source's pieces."""

    problem: str | None
    hashes: list[bytes]


def _equal_bytes(source: Checkpoint, written: Checkpoint, row: Row, fold: Transform | None) -> Compared:
    """Compares piece by piece, so that a large tensor does not stay in memory twice."""
    a, b, equal, hashes = source.raw(row.name), written.raw(row.name), True, []
    for begin, end in pieces(row.shape, row.bytes_in):
        expected = a[begin:end] if fold is None else copy(source, row, begin, end, fold).raw
        equal = equal and np.array_equal(expected, b[begin:end])
        hashes.append(piece_hash(a[begin:end]))
        source.release_bytes(row.name, begin, end)
        written.release_bytes(row.name, begin, end)
    same = "the same bytes" if fold is None else f"those that its fold in {FOLDS} makes"
    return Compared(None if equal else f"{row.name} differs from the source; expected {same}", hashes)


def _error_again(
    row: Row,
    noted: float,
    entries: dict[str, Entry],
    source: Checkpoint,
    written: Checkpoint,
    fold: Transform | None,
) -> Compared:
    """Whether solved codes are as far from the source's weight as was noted."""
    scale = np.float32(1)
    if "global_scale" in entries:
        scale = np.float32(written.array(entries["global_scale"].name)[()])
    codes = written.array(entries["codes"].name)
    blocks = written.array(entries["block_scales"].name) if "block_scales" in entries else None
    parts, hashes = [], []
    for part in slices(row):
        encoded = Encoded(codes[part], None if blocks is None else blocks[part])
        sums, piece = error_again(source, row, part, encoded, scale, fold)
        parts.append(sums)
        hashes.append(piece)
    found = relative(parts)
    close = math.isclose(found, noted, rel_tol=TOLERANCE, abs_tol=1e-300)
    what = f"{row.module}: its codes are {found:.9g} from the source's weight, {SOLVED} has {noted:.9g}"
    return Compared(None if close else what, hashes)


def _encoded_again(
    row: Row,
    group: list[Row],
    entries: dict[str, Entry],
    source: Checkpoint,
    written: Checkpoint,
    folds: Folds,
) -> Compared:
    """Whether the source's weight gives the stored scales and codes; rows of ``group`` share its scale."""
    scale, degenerate = weight_scale(
        row,
        max(
            amax(source, member, part, folds.get(member.name)) for member in group for part in slices(member)
        ),
    )
    equal = "global_scale" not in entries or written.array(entries["global_scale"].name)[()] == scale
    codes = written.array(entries["codes"].name)
    block_scales = written.array(entries["block_scales"].name) if "block_scales" in entries else None
    hashes = []
    for part in slices(row):
        (expected, expected_scales), piece = encode_again(
            source, row, part, scale, degenerate, folds.get(row.name)
        )
        hashes.append(piece)
        equal = equal and np.array_equal(codes[part], expected)
        if block_scales is not None and expected_scales is not None:
            equal = equal and np.array_equal(block_scales[part], expected_scales)
    what = f"{row.module}: encoding the source's weight again gives other bytes"
    return Compared(None if equal else what, hashes)

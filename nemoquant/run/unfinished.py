"""A run that can be continued: its state in ``OUT.partial``, and how the run ends.

    OUT.partial/nemoquant_resume/state.json    options; calibrated layers and their results; shards, sha256
    OUT.partial/nemoquant_resume/hidden.{0,1}  hidden states of the rows, before and after the current layer
    OUT.partial/nemoquant_resume/before.N      hidden states before layer N, where gradients are wanted
    OUT.partial/nemoquant_resume/gradient.N    gradients of the loss there, which take their place

``state.json`` is written to a temporary file and renamed, after each layer and each shard, so that a kill or
a power cut at any moment leaves the last one whole. What it names is on the disk before it is. Nothing else
is trusted: hidden states and shards are compared with the hashes in it before a run uses them, and the source
with those of what they were made from.

    fails before a layer or shard is finished   all that was made is removed
    finds NaN or Inf in the source              the same: a repaired source is another one
    fails, is interrupted or killed later       OUT.partial stays, --resume continues
    ends well                                   OUT.partial becomes OUT, and the folder in it is removed
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemoquant.calibrate.batch import MAX_NON_FINITE
from nemoquant.calibrate.scales import FILE as SCALES_FILE
from nemoquant.checkpoint import manifest
from nemoquant.checkpoint.folder import FOLDER, STATE, partial_of
from nemoquant.checkpoint.identity import Units
from nemoquant.checkpoint.intact import Hashing
from nemoquant.checkpoint.making import making
from nemoquant.errors import CheckpointError, OutputError, UsageError, WeightError, listing
from nemoquant.run.options import OPTIONS, Option
from nemoquant.run.state import (
    CalibrationState,
    GradientState,
    ShardState,
    identity_problem,
    read_state,
    write_state,
)

Identity = Mapping[str, Any]
FACTS = {  # what decides the output's bytes besides the options, with its name in messages
    "nemoquant": "nemoquant",
    "config": "SRC's config",
    "tensors": "SRC's tensors",
    "recipe": "the recipe",
}


class Unfinished:
    """The state of one run in its ``OUT.partial``; see the top of this file.

    Attributes:
        folder: where the output's files are written.
        identity: all that decides the output's bytes: ``FACTS``, and options by their fields of
            :class:`RunOptions`.
        gradients: how far the gradients of the loss are found, None before the first layer; see
            ``solve/backward.py``.
        calibration: the layers that were calibrated, None before the first; ``units`` in it are the hashes of
            what was read for them, ``scales_sha256`` that of the scales file once it is final.
        calibrated: whether the scales file is written and final.
        shards: those that are written, by file name; ``units`` are hashes of what each was made from.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.folder, self.identity = folder, dict(identity)
        self.gradients: GradientState | None = None
        self.calibration: CalibrationState | None = None
        self.calibrated = False
        self.shards: dict[str, ShardState] = {}

    @property
    def state(self) -> Path:
        """The folder for all that is not output."""
        return self.folder / FOLDER

    @property
    def worth_keeping(self) -> bool:
        return bool(self.shards) or self.calibration is not None or self.gradients is not None

    def save(self) -> None:
        """Write the state; a kill or a power cut leaves the new one or the one before."""
        write_state(
            self.state / STATE,
            {
                "identity": self.identity,  # type: ignore[typeddict-item]  # of any options
                "gradients": self.gradients,
                "calibration": self.calibration,
                "calibrated": self.calibrated,
                "shards": self.shards,
            },
        )

    def describe(self) -> str:
        """How far the run came, in a few words."""
        layers = (
            "calibrated"
            if self.calibrated
            else f"{self.calibration['layers']} layers calibrated"
            if self.calibration
            else f"gradients through {self.gradients['layers']} layers"
            if self.gradients
            else ""
        )
        shards = f"{len(self.shards)} shards written" if self.shards else ""
        return ", ".join(filter(None, (layers, shards))) or "nothing finished yet"

    def kept(self, error: BaseException) -> str:
        """What to say of it after an error; empty where nothing is worth keeping.

        After damaged weights nothing is: a repaired source is another one.
        """
        if not self.worth_keeping or isinstance(error, WeightError):
            return ""
        return f"{self.folder} is kept ({self.describe()}): --resume goes on from there"

    def keep_finished(self, needed: Mapping[str, Collection[str]], threads: int) -> None:
        """Keep the shards of an earlier run that are unchanged; the others are forgotten, and packed again.

        Args:
            needed: file -> units of the source that it is made from.
        """
        known = {
            file: entry
            for file, entry in self.shards.items()
            if file in needed and entry["units"].keys() >= set(needed[file])
        }
        with Hashing(
            {self.folder / file: [entry["sha256"]] for file, entry in known.items()}, threads
        ) as all_:
            damaged = all_.problems()
        self.shards = {file: entry for file, entry in known.items() if self.folder / file not in damaged}

    @property
    def packed(self) -> Units:
        """Hashes of all of the source that the shards were made from."""
        found: Units = {}
        for entry in self.shards.values():
            found |= entry["units"]
        return found

    @property
    def units(self) -> Units:
        """The same of the whole kept part; where both have a unit, its hash when it was calibrated."""
        found = self.packed
        for part in (self.gradients, self.calibration):
            found |= part["units"] if part else {}
        return found

    def forget(self, units: Collection[str]) -> None:
        """Drop the shards that were made from these units of the source; they are packed again."""
        self.shards = {
            file: entry for file, entry in self.shards.items() if entry["units"].keys().isdisjoint(units)
        }
        self.save()

    def check_calibration(self, layers: int, rows: int) -> None:
        """Make sure that the state is of a model of so many layers, and of so many rows.

        Raises:
            OutputError
        """
        for at, most in ((self.calibration, layers), (self.gradients, 2 * layers)):
            dead = at.get("dead_rows", ()) if at else ()
            if at and (at["layers"] > most or any(row >= rows for row in dead)):
                raise _unreadable(self.folder, "it has more layers or rows than this run")
            if len(set(dead)) > MAX_NON_FINITE * rows:
                raise _unreadable(self.folder, "more rows came to NaN or Inf than a run goes on with")


def _unreadable(folder: Path, why: object) -> OutputError:
    return OutputError(f"{folder / FOLDER / STATE} can't be read ({why}); remove {folder} and begin again")


def load(folder: Path) -> Unfinished | None:
    """The state in ``folder``, a run's OUT.partial; None where there is none.

    Raises:
        OutputError: it can't be read.
    """
    try:
        state = read_state(folder / FOLDER / STATE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(folder, getattr(error, "strerror", None) or error) from None
    run = Unfinished(folder, state["identity"])
    run.gradients, run.calibration = state["gradients"], state["calibration"]
    run.calibrated, run.shards = state["calibrated"], state["shards"]
    return run


def earlier(out: Path) -> Unfinished | None:
    """The state of an earlier run for ``--resume``: in OUT.partial, or of OUT where that run has finished.

    Raises:
        OutputError: it can't be read. CheckpointError: OUT's manifest can't be used.
    """
    found = load(partial_of(out))
    if found is not None or not (out / manifest.FILE).is_file():
        return found
    identity = _made_from(out)
    if wrong := identity_problem(identity):
        raise CheckpointError(f"{out / manifest.FILE} is not as nemoquant writes it: {wrong}; quantize again")
    found = Unfinished(out, identity)
    found.calibrated = True
    return found


def _made_from(out: Path) -> dict[str, Any]:
    """The identity of the run that made OUT, from its manifest and its scales file."""
    data = manifest.read_manifest(out)
    plan, source, calibration = data["plan"], data["source"], data["calibration"]
    identity = {
        "nemoquant": data["nemoquant"],
        "config": source["config_sha256"][:12],
        "tensors": source["tensor_table_sha256"][:12],
        "scale_groups": plan["scale_groups"],
        "recipe": f"{plan['recipe']['name']} ({plan['sha256'][:12]})",
        "shard_bytes": data["shard_bytes"],
    }
    if calibration is None:
        return identity
    try:
        digest = manifest.file_sha256(out / SCALES_FILE)
    except OSError as error:
        raise CheckpointError(
            f"{out / SCALES_FILE} cannot be read ({error.strerror}); expected the file that the run wrote: "
            f"remove {out} and begin again"
        ) from None
    # Scales that were calibrated and the same ones from a file make the same bytes.
    rows, length, tokens = calibration["rows"], calibration["seq_len"], calibration["tokens_sha256"]
    return identity | {
        "scales": digest[:12],
        "data": f"{rows} rows of {length} tokens of {calibration['data']} ({tokens[:12]})",
        "dtype": calibration["dtype"],
        "row_batch": calibration["row_batch"],
    }


def check_finished(run: Unfinished, identity: Identity, made: Mapping[str, Any]) -> None:
    """Make sure that a run with this identity would make the OUT that an earlier one has finished.

    Args:
        made: OUT's manifest.
    Raises:
        UsageError: names the options and inputs that differ. OutputError: a file is missing.
    """
    asked = {name: value for name, value in identity.items() if name in run.identity}
    run.identity = {name: run.identity[name] for name in asked}
    check_identity(run, asked)
    missing = [name for name in made["files"] if not (run.folder / name).is_file()]
    if missing:
        raise OutputError(
            f"{run.folder} lacks {listing(missing)}, which its manifest lists; remove it and begin again"
        )


def check_identity(found: Unfinished, identity: Identity) -> None:
    """Make sure that a run is continued with the options and inputs that it began with.

    Raises:
        UsageError: names each that differs, with both values.
    """
    changed = []
    for name in dict.fromkeys([*found.identity, *identity]):
        option = OPTIONS.get(name) or Option(None, FACTS.get(name, name), "fixed")
        may_change = option.resume == "free" or (option.resume == "once calibrated" and found.calibrated)
        was, now = found.identity.get(name), identity.get(name)
        if was != now and not may_change:
            changed.append(f"{option.flag} was {option.shown(was)} and is {option.shown(now)}")
    if changed:
        raise UsageError(
            f"{found.folder} was begun with other options: {'; '.join(changed)}; give the same ones, or "
            f"remove the folder"
        )


@contextmanager
def unfinished(
    out: Path, identity: Identity, known: Collection[str], *, resume: bool
) -> Iterator[Unfinished]:
    """Yields the run's state in OUT.partial; when the body ends well, OUT.partial becomes OUT.

    Args:
        known: names of the files that the run may write.
        resume: continue with the OUT.partial that exists, if it was begun with the same options; else none
            may exist.
    Raises:
        OutputError: OUT.partial can't be made or written, holds other files or is in use by another run; or
            OUT has appeared meanwhile.
        UsageError: other options than before.
        Interrupted: for a KeyboardInterrupt of the body, with how to continue.
    """
    with making(out, known, resume=resume) as made:
        run = load(made.folder)
        if run is None:
            if made.begun:
                raise OutputError(
                    f"{made.folder} has files but no {FOLDER}/{STATE}; no run can go on with it, remove it"
                )
            run = Unfinished(made.folder, identity)
            run.save()
        check_identity(run, identity)
        made.disposable, made.kept = True, run.kept
        made.drop_halves()
        yield run

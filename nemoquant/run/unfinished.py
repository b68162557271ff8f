"""A run that can be continued: its state in ``OUT.partial``, and how the run ends.

    OUT.partial/nemoquant_resume/state.json    options; calibrated layers and their results; shards, sha256
    OUT.partial/nemoquant_resume/hidden.{0,1}  hidden states of the rows, before and after the current layer

``state.json`` is written to a temporary file and renamed, after each layer and each shard, so that a kill at
any moment leaves the last one whole. Nothing else is trusted: hidden states and shards are compared with the
hashes in it before a run uses them, and the source with those of what they were made from.

    fails before a layer or shard is finished   all that was made is removed
    finds NaN or Inf in the source              the same: a repaired source is another one
    fails, is interrupted or killed later       OUT.partial stays, --resume continues
    ends well                                   OUT.partial becomes OUT, and the folder in it is removed
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nemoquant.checkpoint.folder import partial_of
from nemoquant.checkpoint.identity import Units
from nemoquant.checkpoint.manifest import file_sha256
from nemoquant.errors import Interrupted, NemoquantError, OutputError, UsageError, WeightError, listing
from nemoquant.files import replace_text
from nemoquant.run.options import OPTIONS, Option

FOLDER = "nemoquant_resume"
STATE = "state.json"
SCHEMA = 3

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
        calibration: JSON data of the layers that were calibrated, None before the first; ``units`` in it are
            the hashes of what was read for them, ``scales_sha256`` that of the scales file once it is final.
        calibrated: whether the scales file is written and final.
        shards: file name -> {"sha256", "zero_weights", "lost", "units": hashes of what it was made from}.
        verified: counts of the items that verify checked, once it passed.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.folder, self.identity = folder, dict(identity)
        self.calibration: dict[str, Any] | None = None
        self.calibrated = False
        self.shards: dict[str, dict[str, Any]] = {}
        self.verified: dict[str, Any] | None = None

    @property
    def state(self) -> Path:
        """The folder for all that is not output."""
        return self.folder / FOLDER

    @property
    def worth_keeping(self) -> bool:
        return bool(self.shards) or self.calibration is not None

    def save(self) -> None:
        """Write the state; a kill leaves the new one or the one before."""
        data = {k: v for k, v in vars(self).items() if k != "folder"}
        replace_text(self.state / STATE, json.dumps({"schema": SCHEMA} | data))

    def describe(self) -> str:
        """How far the run came, in a few words."""
        layers = (
            "calibrated"
            if self.calibrated
            else f"{self.calibration['layers']} layers calibrated"
            if self.calibration
            else ""
        )
        shards = f"{len(self.shards)} shards written" if self.shards else ""
        return ", ".join(filter(None, (layers, shards))) or "nothing finished yet"

    def finished_shards(self) -> dict[str, dict[str, Any]]:
        """Shards of an earlier run that are unchanged; the others are forgotten, and packed again."""
        self.shards = {
            file: entry
            for file, entry in self.shards.items()
            if (self.folder / file).is_file() and file_sha256(self.folder / file) == entry["sha256"]
        }
        return self.shards

    @property
    def units(self) -> Units:
        """Hashes of all of the source that the kept part was made from."""
        found: Units = dict(self.calibration["units"]) if self.calibration else {}
        for entry in self.shards.values():
            found |= entry["units"]
        return found


def load(folder: Path) -> Unfinished | None:
    """The state in ``folder``, a run's OUT.partial; None where there is none.

    Raises:
        OutputError: it can't be read.
    """
    file = folder / FOLDER / STATE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data.pop("schema") != SCHEMA:
            raise ValueError("of another version of nemoquant")
        run = Unfinished(folder, data["identity"])
        vars(run).update({key: data[key] for key in vars(run) if key != "folder"})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{file} can't be read ({error}); remove {folder} and begin again") from None
    return run


def earlier(out: Path) -> Unfinished | None:
    """The state of an earlier run for ``--resume``: in OUT.partial, or in OUT if it was killed at the end."""
    return load(partial_of(out)) or load(out)


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
            f"{found.folder} was begun with other options: {'; '.join(changed)}; give the same ones to "
            f"--resume, or remove the folder"
        )


def check_files(folder: Path, known: set[str]) -> None:
    """Make sure that an OUT.partial holds only files that a run writes.

    Raises:
        OutputError: names the other files.
    """
    strange = sorted(
        path.name for path in folder.iterdir() if path.name.removesuffix(".partial") not in known | {FOLDER}
    )
    if strange:
        raise OutputError(
            f"{folder} holds {listing(strange)}, which no run writes there; move it away, or choose another "
            f"output"
        )


@contextmanager
def unfinished(out: Path, identity: Identity, known: set[str], *, resume: bool) -> Iterator[Unfinished]:
    """Yields the run's state in OUT.partial; when the body ends well, OUT.partial becomes OUT.

    Args:
        known: names of the files that the run may write.
        resume: continue with the OUT.partial that exists, if it was begun with the same options; else it must
            not exist.
    Raises:
        OutputError: OUT.partial can't be made or written, holds other files or is in use by another run; or
            OUT has appeared meanwhile.
        UsageError: other options than before.
        Interrupted: for a KeyboardInterrupt of the body, with how to continue.
    """
    partial = partial_of(out)
    parents = [p for p in out.absolute().parents if not p.exists()]
    run: Unfinished | None = None
    ours = False  # whether this run made all that is in the folder
    try:
        if resume and partial.exists():
            check_files(partial, known)
            if any(partial.iterdir()) and not (partial / FOLDER).is_dir():
                raise OutputError(
                    f"{partial} has files but no {FOLDER}/{STATE}; no run can go on with it, remove it"
                )
        else:
            partial.mkdir(parents=True)
        (partial / FOLDER).mkdir(exist_ok=True)
        with _locked(partial / FOLDER):
            state = load(partial)
            if state is None:
                if len(list(partial.iterdir())) > 1:
                    raise OutputError(
                        f"{partial} has files but no {FOLDER}/{STATE}; no run can go on with it, remove it"
                    )
                ours = True  # made above, or by a run that was killed before it wrote anything
                state = Unfinished(partial, identity)
                state.save()
            check_identity(state, identity)
            for half in (*partial.glob("*.partial"), *partial.glob(f"{FOLDER}/*.partial")):
                half.unlink()
            run = state
            yield run
    except BaseException as error:
        keep = run.worth_keeping if run is not None else not ours
        if isinstance(error, WeightError):  # a repaired source is another one: nothing here is of it
            keep = False
        if not keep:
            shutil.rmtree(partial, ignore_errors=True)
        for folder in (partial / FOLDER, partial, *parents) if run is None else parents:
            with suppress(OSError):  # only what is empty; innermost first
                folder.rmdir()
        _add_kept(
            error,
            out,
            f"{partial} is kept ({run.describe()}): --resume goes on from there"
            if keep and run is not None
            else "nothing was kept, it would not be of the repaired source"
            if isinstance(error, WeightError)
            else "",
        )
        raise
    try:
        partial.rename(out)
    except OSError as error:
        raise OutputError(
            f"{partial} is finished and verified, but can't be renamed to {out} ({error.strerror}); make "
            f"room there, then --resume"
        ) from None
    finish(out)


def finish(out: Path) -> None:
    """Remove the state of the run from OUT; ``state.json`` last, so that a kill leaves it or nothing."""
    for path in sorted((out / FOLDER).iterdir(), key=lambda path: path.name == STATE):
        path.unlink()
    (out / FOLDER).rmdir()


def _add_kept(error: BaseException, out: Path, kept: str) -> None:
    """Add to an error what is left of the run; interrupts and system errors become nemoquant's own."""
    if isinstance(error, NemoquantError):
        error.kept = kept
    elif isinstance(error, KeyboardInterrupt | OSError):
        replacement: Interrupted | OutputError = Interrupted()
        if isinstance(error, OSError):
            replacement = OutputError(f"{out}: {error.strerror or error}; make room or choose another output")
        replacement.kept = kept or "nothing was kept"
        raise replacement from error
    elif kept:
        error.add_note(kept)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second run out; the system releases the lock however this process ends.

    Raises:
        OutputError: another run holds the lock.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"{folder.parent} is being written by another run; wait for it, or choose another output"
        ) from None
    else:
        yield
    finally:
        os.close(handle)

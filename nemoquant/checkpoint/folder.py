"""The output folder: ``OUT.partial`` while it is made (``making.py``), ``OUT`` once it is complete.

One run at a time is in it: who holds the lock of the folder ``nemoquant_resume`` in it. No link in it is
followed: a run that finds one there, or anything that no run makes, is refused.
"""

import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nemoquant.errors import OutputError, listing
from nemoquant.files import locked

FOLDER = "nemoquant_resume"  # in OUT.partial: all that is not output
STATE = "state.json"
HIDDEN = ("hidden.0", "hidden.1")
INPUTS = "inputs"  # those of the layer in work, where weights are solved for
STREAM = ("stream.0", "stream.1")  # hidden states of the quantized layers, where those are propagated
GRADED = "graded"  # gradients at the outputs of the layer in work, where errors count by the loss
REACHED = "reached"  # inputs of the layer in work on that stream
HALF = ".partial"  # end of the name of a file that is not whole yet
MARGIN = 64 << 20  # bytes of free disk beyond the tensors, for side files and the rest
BYTES_PER_TENSOR = 600  # in headers, index, config files and scales file


def solved_file(layer: int | None) -> str:
    """Name of the file of a layer's solved weights; None stands for the head."""
    return f"solved.{'head' if layer is None else layer}"


def folds_file(layer: int) -> str:
    """Name of the file of a layer's folds."""
    return f"folds.{layer}"


def before_file(layer: int) -> str:
    """Name of the file of the hidden states before a layer, until their gradients are known."""
    return f"before.{layer}"


def gradient_file(layer: int) -> str:
    """Name of the file of the loss's gradients at the hidden states before a layer."""
    return f"gradient.{layer}"


def is_inner(name: str) -> bool:
    """Whether a run writes a file of this name into ``FOLDER``."""
    whole = name.removesuffix(HALF)
    return whole in (STATE, INPUTS, REACHED, GRADED, *HIDDEN, *STREAM) or bool(
        re.fullmatch(r"(solved|folds|before|gradient)\.[0-9]{1,6}|solved\.head", whole)
    )


def partial_of(out: Path) -> Path:
    """The folder ``OUT.partial`` of ``out``."""
    return out.parent / (out.name + HALF)


def nearest_folder(path: Path) -> Path:
    """The nearest folder that exists: ``path`` itself, or one above it."""
    here = path.absolute()
    return next(p for p in (here, *here.parents) if p.is_dir())


def check_output(
    out: Path, source: Path, tensors: int, tensor_bytes: int, *, resume: bool | None = None
) -> None:
    """Make sure that ``out`` can be written.

    Args:
        resume: whether the partial folder of an earlier run may exist, whose bytes then count as room; None
            where no run could go on with it: then one is in the way only if another kind of run could.
    Raises:
        OutputError: it exists, overlaps the source, an earlier run left its partial folder or another one
            is in it, its folder is not writable, or the disk has no room for that many tensors and bytes.
    """
    target, origin = out.resolve(), source.resolve()
    for path in (target, partial_of(target)):
        if path == origin or path in origin.parents or origin in path.parents:
            raise OutputError(f"{out} overlaps the source {source}; expected a folder outside it")
    if out.exists() or out.is_symlink():
        if resume is None and not out.is_symlink():
            with suppress(OSError):  # only an empty one, of a run that was killed when all else was done
                (out / FOLDER).rmdir()
        raise OutputError(told_that_it_exists(out))
    bytes_there = _bytes_there(partial_of(out), resume)
    parent = nearest_folder(target)
    below = next(p for p in (target, *target.parents) if p.parent == parent)
    if below.exists():
        raise OutputError(f"{out}: {below} is not a folder; choose another output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: {parent} is not writable; choose another output")
    needed = tensor_bytes + BYTES_PER_TENSOR * tensors + MARGIN - bytes_there
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{out}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on its disk; make room or "
            f"choose another disk"
        )


def _bytes_there(partial: Path, resume: bool | None) -> int:
    """Bytes of the files that a run left in OUT.partial, which is not in the way; see ``check_output``."""
    if not os.path.lexists(partial):
        return 0
    try:
        check_folder(partial)
        if os.path.lexists(partial / FOLDER):
            with only_run(partial):
                pass
        if not begun(partial):
            return 0
        if not resume and not abandoned(partial, resume):
            raise OutputError(told_that_it_was_left(partial, resume))
        with os.scandir(partial) as entries:
            found = [entry.stat(follow_symlinks=False) for entry in entries]
    except FileNotFoundError:  # the run that was in it has ended meanwhile
        return 0
    return sum(status.st_size for status in found if stat.S_ISREG(status.st_mode))


def told_that_it_exists(out: Path) -> str:
    return f"{out} exists; expected a new folder, nothing is overwritten: remove it or choose another name"


def told_that_it_was_left(partial: Path, resume: bool | None) -> str:
    goes_on = "--resume goes on with it, or " if resume is not None and _has_state(partial) else ""
    return f"{partial} exists, left by a run that did not end; {goes_on}remove it, or choose another output"


def check_folder(folder: Path) -> None:
    """Make sure that this is a folder and no link to one: what is in it is changed and removed."""
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise OutputError(
            f"{folder} is a link or a file; expected a folder that a run made: move it away, or choose "
            f"another output"
        )


def begun(partial: Path) -> bool:
    """Whether a run left something in OUT.partial: one that was killed at once may leave empty folders."""
    inner = partial / FOLDER
    return bool(names_in(partial) - {FOLDER}) or (inner.is_dir() and not names_in(inner) <= {STATE + HALF})


def abandoned(partial: Path, resume: bool | None) -> bool:
    """Whether a run left what is there that nobody could go on with, such as a copy: it kept no state."""
    return resume is None and (partial / FOLDER).is_dir() and not _has_state(partial)


def _has_state(partial: Path) -> bool:
    return os.path.lexists(partial / FOLDER / STATE)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextmanager
def only_run(partial: Path) -> Iterator[None]:
    """Keeps a second run out of OUT.partial.

    Raises:
        OutputError: another run is in it, or ended just now.
    """
    inner = partial / FOLDER
    with ExitStack() as held:
        try:
            check_folder(inner)
            handle = held.enter_context(locked(inner, wait=False))
            gone = not os.path.samestat(os.fstat(handle), inner.lstat())
        except (BlockingIOError, FileNotFoundError):
            gone = True
        if gone:
            raise OutputError(
                f"{partial} is being written by another run; wait for it, or choose another output"
            )
        yield


def check_entries(folder: Path, is_file: Callable[[str], bool], folders: Collection[str]) -> None:
    """Make sure that a folder holds only files and folders of these names, no links."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    if strange := [entry.name for entry in found if not is_file(entry.name) and entry.name not in folders]:
        raise OutputError(
            f"{folder} holds {listing(strange)}, which no run writes there; move it away, or choose another "
            f"output"
        )
    for entry in found:
        right = entry.is_dir if entry.name in folders else entry.is_file
        if not right(follow_symlinks=False):
            raise OutputError(
                f"{entry.path} is a link, or not what a run writes under that name; move it away, or choose "
                f"another output"
            )

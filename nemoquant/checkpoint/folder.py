"""The output folder: ``OUT.partial`` while it is made, ``OUT`` once it is complete.

Only names that the run itself writes are ever removed, and only one run at a time is in it: who holds the
lock of the folder ``nemoquant_resume`` in it. No link in it is followed: a run that finds one there, or
anything that no run makes, is refused.
"""

import errno
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nemoquant.errors import Interrupted, NemoquantError, OutputError, listing
from nemoquant.files import locked, rename, sync_folder

FOLDER = "nemoquant_resume"  # in OUT.partial: all that is not output
STATE = "state.json"
HIDDEN = ("hidden.0", "hidden.1")
HALF = ".partial"  # end of the name of a file that is not whole yet
MARGIN = 64 << 20  # bytes of free disk beyond the tensors, for side files and the rest
BYTES_PER_TENSOR = 600  # in headers, index, config files and scales file


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
            where no run could go on with it.
    Raises:
        OutputError: it exists, overlaps the source, an earlier run left its partial folder or another one
            is in it, its folder is not writable, or the disk has no room for that many tensors and bytes.
    """
    target, origin = out.resolve(), source.resolve()
    for path in (target, partial_of(target)):
        if path == origin or path in origin.parents or origin in path.parents:
            raise OutputError(f"{out} overlaps the source {source}; expected a folder outside it")
    if out.exists() or out.is_symlink():
        raise OutputError(
            f"{out} exists; expected a new folder, nothing is overwritten: remove it or choose another name"
        )
    partial, bytes_there = partial_of(out), 0
    if os.path.lexists(partial):
        _check_folder(partial)
        if os.path.lexists(partial / FOLDER):
            with _only_run(partial):
                pass
        if _begun(partial):
            if not resume:
                raise OutputError(_left(partial, resume))
            with os.scandir(partial) as entries:
                sizes = (entry.stat(follow_symlinks=False) for entry in entries)
                bytes_there = sum(status.st_size for status in sizes if stat.S_ISREG(status.st_mode))
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


def _left(partial: Path, resume: bool | None) -> str:
    goes_on = "" if resume is None else "--resume goes on with it, or "
    return f"{partial} exists, left by a run that did not end; {goes_on}remove it, or choose another output"


def _check_folder(folder: Path) -> None:
    """Make sure that this is a folder and no link to one: what is in it is changed and removed."""
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise OutputError(
            f"{folder} is a link or a file; expected a folder that a run made: move it away, or choose "
            f"another output"
        )


def _begun(partial: Path) -> bool:
    """Whether a run left something in OUT.partial: one that was killed at once may leave empty folders."""
    inner = partial / FOLDER
    return bool(_names(partial) - {FOLDER}) or (inner.is_dir() and not _names(inner) <= {STATE + HALF})


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextmanager
def _only_run(partial: Path) -> Iterator[None]:
    """Keeps a second run out of OUT.partial.

    Raises:
        OutputError: another run is in it, or ended just now.
    """
    inner = partial / FOLDER
    _check_folder(inner)
    with ExitStack() as held:
        try:
            handle = held.enter_context(locked(inner, wait=False))
            gone = not os.path.samestat(os.fstat(handle), inner.lstat())
        except (BlockingIOError, FileNotFoundError):
            gone = True
        if gone:
            raise OutputError(
                f"{partial} is being written by another run; wait for it, or choose another output"
            )
        yield


class Making:
    """OUT.partial while it is made, for one run alone.

    Attributes:
        folder: OUT.partial.
        begun: whether an earlier run left something in it.
        disposable: whether all in it that is ours may be removed after an error, unless it is worth keeping.
        kept: error -> what there is that is worth keeping, in words for its message; empty for nothing.
    """

    def __init__(self, out: Path, files: Collection[str], folders: Collection[str]) -> None:
        self.out, self.folder = out, partial_of(out)
        self.begun = self.disposable = False
        self.kept: Callable[[BaseException], str] = lambda _: ""
        self._files = {name + end for name in files for end in ("", HALF)}
        self._folders = {name + end for name in folders for end in ("", HALF)}
        self._inner = {name + end for name in (STATE, *HIDDEN) for end in ("", HALF)}
        self._renaming = False

    def look(self, resume: bool | None) -> None:
        """Make sure that the folder is empty, or with ``resume`` holds only what a run makes.

        Raises:
            OutputError
        """
        self.begun = _begun(self.folder)
        if self.begun and not resume:
            raise OutputError(_left(self.folder, resume))
        _check_entries(self.folder, self._files, self._folders | {FOLDER})
        _check_entries(self.folder / FOLDER, self._inner, ())
        self.disposable = not self.begun

    def drop_halves(self) -> None:
        """Remove files that an earlier run was writing when it ended."""
        for folder, known in ((self.folder, self._files), (self.folder / FOLDER, self._inner)):
            for name in known & _names(folder):
                if name.endswith(HALF):
                    (folder / name).unlink()

    def finish(self) -> None:
        """OUT.partial becomes OUT, and what is not output is removed from it.

        Raises:
            OutputError
        """
        with suppress(OSError):  # only if nothing is in it
            (self.folder / FOLDER).rmdir()
        sync_folder(self.folder)
        self.disposable, self._renaming = False, True
        try:
            rename(self.folder, self.out)
        except OSError as error:
            raise OutputError(
                f"{self.folder} is finished and verified, but can't be renamed to {self.out} "
                f"({error.strerror}); make room there" + ", then rename it" * (not self.kept(error))
            ) from None
        clear(self.out)

    def give_up(self, error: BaseException) -> str:
        """After an error: remove what is ours and not worth keeping; returns what is left, in words."""
        if self._renaming and not os.path.lexists(self.folder):
            return whole(self.out)
        if kept := self.kept(error):
            return kept
        if not self.disposable:
            return f"{self.folder} is as it was" * (self.begun and not isinstance(error, NemoquantError))
        for folder, known in ((self.folder, self._files), (self.folder / FOLDER, self._inner)):
            with suppress(OSError):
                for name in known & _names(folder):
                    (folder / name).unlink()
        for name in (*self._folders, FOLDER, ""):
            with suppress(OSError):  # only what is empty
                (self.folder / name).rmdir()
        if os.path.lexists(self.folder):
            return f"nothing was kept; {self.folder} stays, others have put files into it"
        return "nothing was kept"


@contextmanager
def making(
    out: Path, files: Collection[str], folders: Collection[str] = (), *, resume: bool | None = None
) -> Iterator[Making]:
    """Yields OUT.partial, which becomes OUT when the body ends well; after an error it is removed or kept.

    Args:
        files: names of all that may be written into it.
        folders: names of the folders that may be made in it.
        resume: whether it may hold what an earlier run left; None where no run could go on with that.
    Raises:
        OutputError: it can't be made or written, holds something else, or another run is in it; or OUT has
            appeared meanwhile. Interrupted: for a KeyboardInterrupt of the body, with what is left.
    """
    made = Making(out, files, folders)
    parents = [path for path in made.folder.absolute().parents if not path.exists()]
    empty: list[Path] = []  # folders that were made here, innermost first
    with ExitStack() as held:
        try:
            for folder in (*reversed(parents), made.folder, made.folder / FOLDER):
                if folder.parent == made.folder:
                    _check_folder(made.folder)
                with suppress(FileExistsError):
                    folder.mkdir()
                    empty.insert(0, folder)
                    sync_folder(folder.parent)
            ours, empty = empty, []  # from here on another run may be in them
            held.enter_context(_only_run(made.folder))
            empty = ours
            made.look(resume)
            yield made
            made.finish()
        except BaseException as error:
            left = made.give_up(error)
            for folder in empty:
                with suppress(OSError):  # only what is empty
                    folder.rmdir()
            told = explained(error, out, left)
            if told is error:
                raise
            raise told from error


def explained(error: BaseException, out: Path, left: str) -> BaseException:
    """The error with what is left of the run; interrupts and system errors become nemoquant's own."""
    if isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted):
        error = Interrupted()
    elif isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        error = OutputError(
            f"{error.filename or out}: {error.strerror or error}; {'make room' if full else 'see to it'} or "
            f"choose another output"
        )
    if isinstance(error, NemoquantError | Interrupted):
        error.kept = left
    elif left:
        error.add_note(left)
    return error


@contextmanager
def ended(out: Path) -> Iterator[None]:
    """For what a command does once OUT has its name: its errors say that OUT is whole."""
    try:
        yield
    except BaseException as error:
        told = explained(error, out, whole(out))
        if told is error:
            raise
        raise told from error


def clear(out: Path) -> None:
    """Remove what is not output from OUT, which is whole; the state last.

    Raises:
        OutputError: something can't be removed, or was made by nobody of ours.
    """
    inner = out / FOLDER
    if not os.path.lexists(inner):
        return
    try:
        _check_folder(inner)
        for name in (*HIDDEN, STATE):
            for end in (HALF, ""):
                (inner / (name + end)).unlink(missing_ok=True)
        inner.rmdir()
        sync_folder(out)
    except OSError as error:
        raise OutputError(
            f"{whole(out)}, but {inner} in it can't be removed ({error.strerror}); remove it"
        ) from None


def whole(out: Path) -> str:
    """What to say of OUT after an error, once it has its name."""
    return f"{out} is whole"


def _check_entries(folder: Path, files: Collection[str], folders: Collection[str]) -> None:
    """Make sure that a folder holds only files and folders of these names, no links."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    if strange := [entry.name for entry in found if entry.name not in files and entry.name not in folders]:
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

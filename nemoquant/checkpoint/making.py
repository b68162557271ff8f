"""Making OUT in OUT.partial: one run at a time, and what is left of it when it ends.

After an error only what is not worth keeping is removed, and of that only names that the run writes.
"""

import errno
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nemoquant.checkpoint.folder import (
    FOLDER,
    HALF,
    STATE,
    abandoned,
    begun,
    check_entries,
    check_folder,
    is_inner,
    names_in,
    only_run,
    partial_of,
    told_that_it_exists,
    told_that_it_was_left,
)
from nemoquant.errors import Interrupted, NemoquantError, OutputError
from nemoquant.files import sync_folder


class Making:
    """OUT.partial while it is made, for one run alone.

    Attributes:
        folder: OUT.partial.
        begun: whether an earlier run left something in it.
        disposable: whether all in it that is ours may be removed after an error, unless it is worth keeping.
        finished: whether it holds all of OUT, and lacks only the name.
        kept: error -> what there is that is worth keeping, in words for its message; empty for nothing.
    """

    def __init__(self, out: Path, files: Collection[str], folders: Collection[str]) -> None:
        self.out, self.folder = out, partial_of(out)
        self.begun = self.disposable = self.finished = False
        self.kept: Callable[[BaseException], str] = lambda _: ""
        self._files = {name + end for name in files for end in ("", HALF)}
        self._folders = {name + end for name in folders for end in ("", HALF)}

    def look(self, resume: bool | None, *, held_before: bool) -> None:
        """Make sure that the folder is empty, or with ``resume`` holds only what a run makes.

        Args:
            held_before: whether an earlier run had made the folder that is locked.
        Raises:
            OutputError
        """
        if os.path.lexists(self.out):  # made since it was looked for, by a run that has ended
            raise OutputError(told_that_it_exists(self.out))
        self.begun = begun(self.folder)
        useless = self.begun and held_before and abandoned(self.folder, resume)
        if self.begun and not resume and not useless:
            raise OutputError(told_that_it_was_left(self.folder, resume))
        check_entries(self.folder, self._files.__contains__, self._folders | {FOLDER})
        check_entries(self.folder / FOLDER, is_inner, ())
        if useless:
            self._remove_files()
            self.begun = False
        self.disposable = not self.begun

    def drop_halves(self) -> None:
        """Remove files that an earlier run was writing when it ended."""
        for path in self._ours():
            if path.name.endswith(HALF):
                path.unlink()

    def _remove_files(self) -> None:
        for path in self._ours():
            with suppress(IsADirectoryError):
                path.unlink()

    def _ours(self) -> list[Path]:
        """The files here that a run writes."""
        inner = self.folder / FOLDER
        ours = [self.folder / name for name in names_in(self.folder) if name in self._files]
        return ours + [inner / name for name in names_in(inner) if is_inner(name)]

    def finish(self) -> None:
        """OUT.partial becomes OUT, and what is not output is removed from it.

        Raises:
            OutputError
        """
        sync_folder(self.folder)
        self.disposable, self.finished = False, True
        try:
            self.folder.rename(self.out)
        except OSError as error:
            raise OutputError(
                f"{self.folder} is finished and verified, but can't be renamed to {self.out} "
                f"({error.strerror}); make room there"
                + ", then rename it, or give the command again"
                * (not self.kept(error))
            ) from None
        sync_folder(self.out.parent)
        clear(self.out)

    def give_up(self, error: BaseException) -> str:
        """After an error: remove what is ours and not worth keeping; returns what is left, in words."""
        if self.finished and not os.path.lexists(self.folder):
            return whole(self.out)
        if kept := self.kept(error):
            return kept
        if not self.disposable:
            return f"{self.folder} is as it was" * (self.begun and not isinstance(error, NemoquantError))
        with suppress(OSError):
            self._remove_files()
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
                    check_folder(made.folder)
                with suppress(FileExistsError):
                    folder.mkdir()
                    empty.insert(0, folder)
                    sync_folder(folder.parent)
            ours, empty = empty, []  # from here on another run may be in them
            held.enter_context(only_run(made.folder))
            empty = ours
            made.look(resume, held_before=made.folder / FOLDER not in empty)
            yield made
            made.finish()
        except BaseException as error:
            left = made.give_up(error)
            for folder in () if made.finished else empty:  # a next run knows by FOLDER that it may begin anew
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
        check_folder(inner)
        for name in sorted(filter(is_inner, names_in(inner)), key=lambda name: name.startswith(STATE)):
            (inner / name).unlink(missing_ok=True)
        inner.rmdir()
        sync_folder(out)
    except OSError as error:
        raise OutputError(
            f"{whole(out)}, but {inner} in it can't be removed ({error.strerror}); remove it"
        ) from None


def whole(out: Path) -> str:
    """What to say of OUT after an error, once it has its name."""
    return f"{out} is whole"

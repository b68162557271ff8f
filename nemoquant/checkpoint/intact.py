"""Whether a checkpoint is what its manifest lists: what is checked when, and what is remembered of it.

    opening, inspect    settings, index and side files by their sha256; shards by their size, which the header
                        gives, with the tensors that the index names
    generate, export    all shards too, once: a stamp outside the checkpoint spares the next time, as long as
                        size, times and inode of every shard are the same; what was loaded is looked at again
    diff                all shards, in the background while layers are computed
    verify              everything, always
    before something is settings again, and that every shard is still the file that was hashed
    written into it

The model card may be edited; graphs are checked where one is loaded. Folders without a manifest, which other
tools wrote, have nothing that they could be held against.
"""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from nemoquant.checkpoint.manifest import CARD, FILE, file_sha256, listed, read_if_there
from nemoquant.checkpoint.reader import INDEX, Checkpoint
from nemoquant.errors import CheckpointError, listing
from nemoquant.files import read_json, replace_bytes
from nemoquant.machine import usable_threads
from nemoquant.progress import Count, Progress, no_progress
from nemoquant.units import size

SHARD, GRAPH = ".safetensors", ".onnx"
REQUIRED = ("config.json", INDEX)
SHOWN_EVERY = 0.2  # seconds between reports while waiting
SETTLED = 2.0  # seconds: a file that was written less long ago could change again without a new time
MOST_STAMP = 16 << 20  # bytes of a stamp; one of a thousand shards has 0.2 MB
KEPT = 100  # stamps, those that were used last
STAMP = re.compile(r"[0-9a-f]{32}\.json(\.partial)?")  # its name; a killed process leaves the second kind

Say = Callable[[str], None]


def silent(text: str) -> None:
    """A Say that says nothing."""


class Cancelled(Exception):
    """Raised in a thread that hashes, once its result is no longer wanted."""


class Identity(tuple[int, int, int, int]):
    """Size, times of change and inode of a file: another file, or other content, has another one.

    Unlike the facts that are looked at within a run (``reader.FileFacts``) it has the time that nobody can
    set back, because it is kept; and no device, which another boot may number otherwise.
    """

    @classmethod
    def of(cls, path: Path) -> "Identity":
        found = path.stat()
        return cls((found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino))

    @property
    def changed(self) -> float:
        """When it changed last, in seconds."""
        return max(self[1], self[2]) / 1e9


class Hashing:
    """Files hashed in threads and held against what a manifest lists; leaving the block ends them soon.

    Attributes:
        seen: file -> what it was when it was hashed, for those that are intact so far.
    """

    def __init__(
        self,
        files: Mapping[Path, Iterable[str | None]],
        threads: int,
        count: Count = lambda size: None,
    ) -> None:
        """Begin to hash.

        Args:
            files: file -> its possible sha256; None among them says that it may be absent.
            count: called by the threads with the size of each piece.
        """
        self.seen: dict[Path, Identity] = {}
        self._count, self._stop = count, threading.Event()
        self._pool = ThreadPoolExecutor(threads)
        self._results: dict[Path, Future[str | None]] = {
            path: self._pool.submit(self._problem, path, list(digests)) for path, digests in files.items()
        }

    def __enter__(self) -> "Hashing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def unfinished(self, seconds: float) -> bool:
        """Wait for all files, but no longer than that; returns whether some are left."""
        return bool(wait(self._results.values(), seconds).not_done)

    def found(self) -> dict[Path, str]:
        """What is wrong with the files that were hashed so far."""
        done = ((path, result.result()) for path, result in self._results.items() if result.done())
        return {path: text for path, text in done if text is not None}

    def problems(self) -> dict[Path, str]:
        """Wait for all files; returns what is wrong with them, in their order."""
        all_ = ((path, result.result()) for path, result in self._results.items())
        return {path: text for path, text in all_ if text is not None}

    def _piece(self, nbytes: int) -> None:
        if self._stop.is_set():
            raise Cancelled
        self._count(nbytes)

    def _problem(self, path: Path, digests: list[str | None]) -> str | None:
        try:
            before = Identity.of(path)
            digest = file_sha256(path, self._piece)
            if digest not in digests:
                return f"{path.name} was changed: its sha256 is not the manifest's"
            if Identity.of(path) != before:
                return f"{path.name} changes while it is read"
        except FileNotFoundError:
            return None if None in digests else f"{path.name} is missing; the manifest lists it"
        except OSError as error:
            return f"{path.name} cannot be read ({error.strerror})"
        self.seen[path] = before
        return None


class Intact:
    """A folder that was what its manifest lists when its shards were hashed.

    Attributes:
        shards: name -> sha256, of every shard that the manifest lists.
        read: whether they were hashed just now; not where a stamp spared that.
    """

    def __init__(
        self, folder: Path, shards: Mapping[str, str], seen: Mapping[str, Identity], *, read: bool = True
    ) -> None:
        self.folder, self.shards, self.seen, self.read = folder, shards, seen, read

    @classmethod
    def copy(cls, folder: Path, data: Mapping[str, Any]) -> "Intact":
        """A folder that was just made of shards that were hashed; ``data`` is its manifest."""
        names = shards(data)
        return cls(folder, names, {name: Identity.of(folder / name) for name in names}, read=False)

    def check(self, data: Mapping[str, Any]) -> None:
        """Make sure that it still is, before something is signed into it; ``data`` is its manifest now.

        Raises:
            CheckpointError: a file is another one, or the manifest lists another one.
        """
        check_settings(self.folder, data)
        other = [FILE] if shards(data) != self.shards else []
        self._refuse(self._changed() + other, "nothing was written into it")

    def check_unchanged(self) -> None:
        """Make sure that what was read after the hashing are still the same shards.

        Raises:
            CheckpointError: a file is another one.
        """
        self._refuse(self._changed(), "what was computed with it is thrown away")

    def _changed(self) -> list[str]:
        return [name for name, seen in self.seen.items() if _identity(self.folder / name) != seen]

    def _refuse(self, changed: list[str], outcome: str) -> None:
        if changed:
            raise CheckpointError(
                f"{self.folder}: {listing(changed)} changed since the checkpoint was read; {outcome}, "
                f"`nemoquant verify {self.folder}` says what it is now"
            )


def _identity(path: Path) -> Identity | None:
    try:
        return Identity.of(path)
    except OSError:
        return None


def shards(data: Mapping[str, Any]) -> dict[str, str]:
    """The shards that a manifest lists, with their sha256."""
    return {name: digest for name, digest in data["files"].items() if name.endswith(SHARD)}


def damaged(folder: Path, problems: list[str]) -> CheckpointError:
    """The refusal of a damaged checkpoint."""
    return CheckpointError(
        f"{folder} is damaged: {listing(problems)}; expected what its {FILE} lists: copy it there again, or "
        f"quantize again (`nemoquant verify {folder}` checks everything)"
    )


def check_settings(folder: Path, data: Mapping[str, Any]) -> None:
    """Hold all listed files but shards, graphs and the card against the manifest: config, index, side files.

    Raises:
        CheckpointError: one is missing or was changed, or the manifest lacks one that every checkpoint has.
    """
    absent = [name for name in REQUIRED if name not in data["files"]]
    if absent:
        raise CheckpointError(f"{folder / FILE} does not list {listing(absent)}; quantize again")
    names = [name for name in data["files"] if name != CARD and not name.endswith((SHARD, GRAPH))]
    with Hashing({folder / name: listed(data, name) for name in names}, threads=1) as hashing:
        problems = hashing.problems()
    if problems:
        raise damaged(folder, list(problems.values()))


def open_settings(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder whose small files are what it lists; None where there is none.

    Before anything else is read: what is wrong with a file is told by its sha256, not by what it would do.

    Raises:
        CheckpointError: see :func:`check_settings` and ``manifest.read_manifest``.
    """
    data = read_if_there(folder)
    if data is not None:
        check_settings(folder, data)
    return data


def unlisted(folder: Path, data: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """A warning for each of these files that is there and not in the manifest."""
    strange = [name for name in names if os.path.lexists(folder / name) and not listed(data, name)]
    return [f"{folder / name} is used and is not in {FILE}: nemoquant did not write it" for name in strange]


def check_listed(checkpoint: Checkpoint, data: Mapping[str, Any]) -> None:
    """Make sure that the manifest lists every shard that is read.

    Raises:
        CheckpointError: it lacks one.
    """
    read = {info.file.name for info in checkpoint.tensors.values()}
    strange = sorted(read - data["files"].keys())
    if strange:
        raise CheckpointError(
            f"{checkpoint.path / FILE} does not list {listing(strange)}, which {INDEX} names; quantize again"
        )


def check_graph(path: Path, data: Mapping[str, Any]) -> None:
    """Hold a graph that the manifest lists against it.

    Raises:
        CheckpointError: it was changed.
    """
    if path.exists() and path.name in data["files"]:
        with Hashing({path: listed(data, path.name)}, threads=1) as hashing:
            problems = hashing.problems()
        if problems:
            raise CheckpointError(f"{path.parent}: {problems[path]}; export it again")


def hash_once(
    folder: Path,
    data: Mapping[str, Any],
    say: Say = silent,
    progress: Progress = no_progress,
    threads: int | None = None,
) -> Intact:
    """Hash every shard, unless they were hashed before and are the same files as then.

    Args:
        say: told before it begins how much is read.
        threads: None is all that this process may use.
    Raises:
        CheckpointError: a shard is missing or was changed.
    """
    expected = shards(data)
    now = {name: _identity(folder / name) for name in expected}
    if None not in now.values() and _stamped(_content(expected, now)):
        same = {name: seen for name, seen in now.items() if seen is not None}
        return Intact(folder, expected, same, read=False)
    missing = [f"{name} is missing; the manifest lists it" for name, seen in now.items() if seen is None]
    if missing:
        raise damaged(folder, missing)
    total = sum(seen[0] for seen in now.values() if seen is not None)
    say(f"{folder}: reading its shards, {size(total)}, to hold them against {FILE}")
    with Reading({folder: data}, threads or usable_threads()) as reading:
        return reading.finish(progress)[folder]


class Reading:
    """All shards of some checkpoints, hashed in the background. Leaving the block ends that soon."""

    def __init__(
        self,
        folders: Mapping[Path, Mapping[str, Any]],
        threads: int = 1,
        known: Iterable[Intact] = (),
    ) -> None:
        """Begin; ``folders`` are the checkpoints with their manifests.

        Args:
            known: of those whose shards were read just now they are looked at again in the end, and not read.
        """
        self.folders = {folder: shards(data) for folder, data in folders.items()}
        self._began = time.time()
        self._done, self._lock = 0, threading.Lock()
        hashed = [one for one in known if one.read and one.shards == self.folders.get(one.folder)]
        self._seen = {one.folder / name: seen for one in hashed for name, seen in one.seen.items()}
        files = {
            folder / name: [digest]
            for folder, names in self.folders.items()
            for name, digest in names.items()
            if folder / name not in self._seen
        }
        self._total = sum(seen[0] for path in files if (seen := _identity(path)) is not None)
        self._hashing = Hashing(files, threads, self._count)

    def __enter__(self) -> "Reading":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hashing.__exit__(kind, value, trace)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes

    def check(self) -> None:
        """Look at what is known by now, without waiting.

        Raises:
            CheckpointError: a shard is damaged.
        """
        self._raise(self._hashing.found())

    def finish(self, progress: Progress = no_progress) -> dict[Path, Intact]:
        """Wait for the rest, and leave stamps.

        Args:
            progress: called while there is something to wait for, as the stage "hash".
        Raises:
            CheckpointError: a shard is damaged, or was changed after it was hashed.
        """
        report = progress if self._hashing.unfinished(0) else no_progress
        while self._hashing.unfinished(SHOWN_EVERY):
            self.check()
            report("hash", self._done, self._total, "")
        self._raise(self._hashing.problems())
        seen = self._seen | self._hashing.seen
        self._raise(
            {path: f"{path.name} was changed meanwhile" for path in seen if _identity(path) != seen[path]}
        )
        report("hash", self._total, self._total, "")
        intact = {}
        for folder, names in self.folders.items():
            own = {name: seen[folder / name] for name in names}
            _leave(names, own, self._began)
            intact[folder] = Intact(folder, names, own)
        return intact

    def _raise(self, problems: Mapping[Path, str]) -> None:
        for folder in self.folders:
            here = [text for path, text in problems.items() if path.parent == folder]
            if here:
                raise damaged(folder, here)


def stamp_folder() -> Path:
    """Where stamps are kept: in the user's cache, because a checkpoint may be read-only, and is published."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemoquant/intact"


def _stamp(content: dict[str, Any]) -> Path | None:
    """The file that says that shards were hashed; None where there is no place for it.

    Its name says of which files, not where they are: a folder that is renamed holds the same ones.
    """
    try:
        return stamp_folder() / f"{hashlib.sha256(_text(content)).hexdigest()[:32]}.json"
    except RuntimeError:  # the user has no home folder
        return None


def _content(names: Mapping[str, str], seen: Mapping[str, Identity | None]) -> dict[str, Any]:
    """What a stamp holds: file -> sha256, size, times, inode. One that was read must be equal to it."""
    return {name: [digest, *(seen[name] or ())] for name, digest in names.items()}


def _text(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _stamped(content: dict[str, Any]) -> bool:
    stamp = _stamp(content)
    try:
        if stamp is None or read_json(stamp, MOST_STAMP) != content:
            return False
    except (OSError, ValueError):
        return False
    with suppress(OSError):
        os.utime(stamp)  # the time of its last use is now
    return True


def _leave(names: Mapping[str, str], seen: Mapping[str, Identity], began: float) -> None:
    """Write the stamp where that is possible; without one the shards are hashed again next time."""
    content = _content(names, seen)
    stamp = _stamp(content)
    if stamp is None or any(began - identity.changed < SETTLED for identity in seen.values()):
        return
    with suppress(OSError):
        stamp.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(stamp, _text(content))
        stamps = [path for path in stamp.parent.iterdir() if STAMP.fullmatch(path.name)]
        for old in sorted(stamps, key=lambda path: path.lstat().st_mtime_ns, reverse=True)[KEPT:]:
            old.unlink(missing_ok=True)

"""Files from anywhere, read within bounds; files of ours, written so that a power cut leaves old or new ones.

Reading: a file must be a regular one and no larger than its kind ever is. A device or a pipe would be read
for ever, and a file of gigabytes would fill the memory before its parser could say what is wrong.

Writing: the data reach the disk before the name does, and the name before anything that counts on it.
"""

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

MOST_JSON = 256 << 20  # bytes: a manifest or an index of a large model has some megabytes
MOST_SETTINGS = 16 << 20  # bytes of a config, a recipe, a template: real ones have kilobytes
MOST_ENTRIES = 1_000_000  # of lists and objects in a JSON file; real ones have a tenth of that, at most
MOST_TABLE_ENTRIES = 4_000_000  # where each tensor of a large model, or each token, has some
MOST_DEPTH = 64  # of lists and objects in each other; no file has ten. Deeper ones would exhaust the stack
COPY_BYTES = 8 << 20
MOST_NAME = 255  # bytes: most disks take no longer name
# Ends the name under which a file that a user named is written first: nobody has a file of their own there.
UNFINISHED = ".nemoquant-partial"


def open_regular(path: Path, *, follow: bool = True, write: bool = False) -> int:
    """A descriptor of a regular file that is there, for reading.

    Args:
        follow: whether ``path`` may be a symbolic link, as in hub caches.
        write: for writing too.
    Raises:
        OSError: it can't be opened, is not a regular file, or is a link that must not be followed.
    """
    # Not blocking: opening a FIFO would wait for a writer, before it could be seen what it is.
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    flags |= os.O_RDWR if write else os.O_RDONLY
    handle = os.open(path, flags)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, "not a regular file", str(path))
    return handle


def read_bytes(path: Path, most: int, *, follow: bool = True) -> bytes:
    """A regular file of at most ``most`` bytes, whole.

    Raises:
        OSError: see :func:`open_regular`.
        ValueError: it is larger.
    """
    with os.fdopen(open_regular(path, follow=follow), "rb") as f:
        data = f.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes, the most that such a file may have")
    return data


def read_text(path: Path, most: int = MOST_SETTINGS, *, follow: bool = True) -> str:
    """A regular UTF-8 file of at most ``most`` bytes; a byte order mark is dropped.

    Raises:
        OSError: see :func:`open_regular`.
        ValueError: it is larger, or not UTF-8.
    """
    return read_bytes(path, most, follow=follow).decode("utf-8-sig")


def parse_json(text: str, *, entries: int = MOST_ENTRIES) -> Any:
    """JSON whose strings can be written again, without a key twice in an object.

    Args:
        entries: of all its lists and objects, at most.
    Raises:
        ValueError: for anything else: nesting without end, too many entries, lone surrogates
            and numbers of thousands of digits, too.
    """
    # Counted before they are made: each is some tens of times as large in memory as in the file.
    if sum(text.count(mark) for mark in ",[{") > entries:
        raise ValueError(f"it has more than {entries:,} entries, the most that such a file may have")
    try:
        data = json.loads(text, object_pairs_hook=_once)
        if "\\u" in text:  # only an escape can bring a lone surrogate: UTF-8 has none
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except UnicodeEncodeError:
        raise ValueError("a string in it has half of a surrogate pair, which is no character") from None
    _check_depth(data)
    return data


def read_json(path: Path, most: int = MOST_JSON, *, entries: int = MOST_ENTRIES, follow: bool = True) -> Any:
    """A JSON file; raises OSError and ValueError as :func:`read_text` and :func:`parse_json`."""
    return parse_json(read_text(path, most, follow=follow), entries=entries)


_TOO_DEEP = f"it is nested too deeply; expected at most {MOST_DEPTH} lists and objects in each other"


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(MOST_DEPTH):
        inside = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [v for values in inside for v in values if isinstance(v, dict | list)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"duplicate key {name[:200]!r}")
            seen.add(name)
    return result


def plain_name(name: object) -> bool:
    """Whether this is the name of a file directly in a folder: it can't lead anywhere else."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and len(name.encode("utf-8", "surrogatepass")) < 256
        and not any(c in "/\\" or not c.isprintable() for c in name)
    )


def lies_in(folder: Path, name: str) -> bool:
    """Whether a name in a folder leads to a regular file of that folder, and nowhere else.

    A link may lead to another file in the folder or below it, or to the blobs of the hub cache that it is a
    snapshot of (``snapshots/REVISION/NAME -> ../../blobs/HASH``).

    Raises:
        FileNotFoundError: there is nothing of that name, or its link leads to nothing.
    """
    inside, target = folder.resolve(strict=True), (folder / name).resolve(strict=True)
    places = [inside]
    if inside.parent.name == "snapshots":
        places.append(inside.parent.parent / "blobs")
    return any(place in target.parents for place in places) and stat.S_ISREG(target.lstat().st_mode)


_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EROFS)  # a file system has no such call


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk.

    File systems that know no such thing are left alone, and folders that may be written but not read.

    Raises:
        OSError: the disk failed; a name may be lost in a power cut.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise OSError(error.errno, error.strerror, str(folder)) from None
    finally:
        os.close(handle)


def rename(source: Path, target: Path) -> None:
    """Rename, and wait until the new name is on the disk; the content must be there already."""
    source.rename(target)
    sync_folder(target.parent)


def close_synced(file: IO[bytes]) -> None:
    """Close a file that was written, once its content is on the disk; its name perhaps is not yet."""
    with file:
        file.flush()
        os.fsync(file.fileno())


def write_new(path: Path, data: bytes) -> None:
    """Write a new file; its content is on the disk, its name perhaps not yet.

    Raises:
        FileExistsError: something has that name, a symbolic link too.
    """
    with path.open("xb") as f:
        f.write(data)
        close_synced(f)


def write_again(path: Path, data: bytes) -> None:
    """:func:`write_new`, in place of what an earlier run left under that name; for folders not read yet."""
    path.unlink(missing_ok=True)
    write_new(path, data)


def write_json_again(path: Path, data: Mapping[str, Any]) -> None:
    """:func:`write_again` of JSON, as config files and indexes have it."""
    write_again(path, (json.dumps(data, indent=2) + "\n").encode())


def copy_again(source: Path, target: Path) -> None:
    """A copy of a regular file, written as by :func:`write_again`; ``source`` may be a link.

    Raises:
        OSError: see :func:`open_regular`; or it can't be written.
    """
    target.unlink(missing_ok=True)
    with os.fdopen(open_regular(source), "rb") as read, target.open("xb") as written:
        shutil.copyfileobj(read, written, COPY_BYTES)
        close_synced(written)


def open_own(path: Path) -> int:
    """A descriptor of a file that is changed in place, made where there is none.

    Raises:
        OSError: it is a link, has a second name elsewhere, or is no regular file: another file would be
            changed.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(handle)
        raise OSError(None, "not a regular file with one name", str(path))
    return handle


def replace_bytes(path: Path, data: bytes, half: str = ".partial") -> None:
    """Write a file whole or not at all: first under another name in its folder, then renamed.

    A symbolic link under either name is replaced, never followed.

    Args:
        half: end of the other name.
    """
    partial = path.parent / (path.name + half)
    try:
        write_again(partial, data)
        rename(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def replace_text(path: Path, text: str) -> None:
    """:func:`replace_bytes` of UTF-8."""
    replace_bytes(path, text.encode("utf-8"))


def is_stream(path: Path) -> bool:
    """Whether a path is a character device or a pipe, or a link to one: ``/dev/null``, ``/dev/stdout``."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


def why_not_written(path: Path) -> str | None:
    """Why :func:`write_named` must not write a file, said before the work; None where it may."""
    if len(os.fsencode(path.name)) + len(UNFINISHED) > MOST_NAME:
        return f"its name is too long; expected at most {MOST_NAME - len(UNFINISHED)} bytes"
    if is_stream(path):
        return None if os.access(path, os.W_OK) else "it can't be written; choose another place"
    if path.is_symlink():
        return "it is a link, which would be replaced; name the file that it leads to"
    if path.exists() and not path.is_file():
        return "it is no file; expected a file, a pipe or a device such as /dev/null"
    return None


def write_named(path: Path, data: bytes) -> None:
    """Write a file that a user named: replaced whole or not at all; what is a stream is written to."""
    if is_stream(path):
        with path.open("wb") as f:
            f.write(data)
    else:
        replace_bytes(path, data, UNFINISHED)


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[int]:
    """Holds the lock of a folder; the system releases it however this process ends. Yields its descriptor.

    Args:
        wait: until another process releases it.
    Raises:
        BlockingIOError: another process holds it, and ``wait`` is False.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield handle
    finally:
        os.close(handle)

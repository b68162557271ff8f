"""Who a source is: the hash of every unit's bytes, taken while they are read anyway.

A unit is one tensor, or all routed experts of one layer and projection. Its hash depends on the bytes of its
tensors alone, not on the files that hold them:

    piece    XXH3-128 of some rows of a tensor, as many as fit PIECE_BYTES: what is read and encoded at a time
    tensor   XXH3-128 of the hashes of its pieces
    unit     XXH3-128 of the hashes of its tensors, in the order of the tensor table

XXH3 (the library xxhash) runs at the speed of memory, where sha256 would take longer than encoding. It is no
defence against someone who makes two models with the same hash on purpose.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import xxhash

from nemoquant.checkpoint.header import TensorInfo
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.errors import CheckpointError, listing
from nemoquant.files import open_regular
from nemoquant.model import names
from nemoquant.model.nested import TOWER
from nemoquant.model.roles import TensorSpec
from nemoquant.progress import Count

PIECE_BYTES = 8 << 20

Units = dict[str, str]
"""Name of a unit -> its hash, 32 hex digits."""


def piece_rows(rows: int, nbytes: int) -> int:
    """Rows of one piece of a tensor of ``rows`` rows and ``nbytes`` bytes; its last piece may have fewer."""
    return max(1, PIECE_BYTES // max(1, nbytes // max(1, rows)))


def pieces(shape: Sequence[int], nbytes: int) -> Iterator[tuple[int, int]]:
    """The pieces of a tensor as ranges of its bytes; none of an empty tensor."""
    if nbytes:
        rows = shape[0] if shape else 1
        row_bytes = nbytes // rows
        step = piece_rows(rows, nbytes) * row_bytes
        for begin in range(0, nbytes, step):
            yield begin, min(begin + step, nbytes)


def piece_hash(data: Any) -> bytes:
    """Hash of a piece, from a C-contiguous array or another buffer."""
    return xxhash.xxh3_128_digest(memoryview(data).cast("B"))


def tensor_hash(data: Any) -> str:
    """Hash of a C-contiguous array that is in memory whole, 32 hex digits."""
    return piece_hash(data).hex()


def unit_name(tensor: str) -> str:
    """``....experts.7.up_proj.weight`` -> ``....experts.up_proj.weight``; others are units of their own."""
    module = tensor.removesuffix(".weight")
    return names.stack_of(module) + tensor[len(module) :]


def units_of(tensors: Iterable[str]) -> dict[str, list[str]]:
    """Unit -> its tensors, both in the order of ``tensors``."""
    units: dict[str, list[str]] = {}
    for name in tensors:
        units.setdefault(unit_name(name), []).append(name)
    return units


class UnitHash:
    """The hash of one unit, from the hashes of its pieces in order."""

    def __init__(self) -> None:
        self._unit, self._tensor = xxhash.xxh3_128(), xxhash.xxh3_128()

    def piece(self, digest: bytes) -> None:
        """Add the next piece of the current tensor."""
        self._tensor.update(digest)

    def end_tensor(self) -> None:
        self._unit.update(self._tensor.digest())
        self._tensor.reset()

    def hexdigest(self) -> str:
        return self._unit.hexdigest()


def hash_unit(checkpoint: Checkpoint, tensors: Iterable[str], count: Count = lambda size: None) -> str:
    """Read a unit and hash it; ``count`` is called with the bytes of each piece.

    It reads into a buffer instead of mapping, so that it does not drop pages that another thread computes on.

    Raises:
        CheckpointError: a file can't be read, or is shorter than its header says.
    """
    unit, buffer = UnitHash(), bytearray(0)
    for name in tensors:
        info = checkpoint.tensors[name]
        with _opened(info.file) as file:
            for begin, end in pieces(info.shape, info.nbytes):
                if len(buffer) < end - begin:
                    buffer = bytearray(end - begin)
                view = memoryview(buffer)[: end - begin]
                _read(file, info, begin, view)
                unit.piece(piece_hash(view))
                count(end - begin)
        unit.end_tensor()
    return unit.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        file = open_regular(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        yield file
    finally:
        os.close(file)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({error.strerror}); expected a readable source")


def _read(file: int, info: TensorInfo, begin: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        try:
            got = os.preadv(file, [view[done:]], info.start + begin + done)
        except OSError as error:
            raise _unreadable(info.file, error) from None
        if not got:
            raise CheckpointError(
                f"{info.file} ends within the tensor {info.name}; expected {info.end:,} bytes at least: it "
                f"was cut while it was read, download it again"
            )
        done += got


def hash_units(
    checkpoint: Checkpoint,
    units: Mapping[str, Sequence[str]],
    threads: int,
    count: Count = lambda size: None,
) -> Units:
    """Read and hash whole units in threads; raises as :func:`hash_unit`."""
    stop = Event()
    with ThreadPoolExecutor(threads, "hash") as pool:
        try:
            counted = _until(stop, count)
            hashes = pool.map(lambda tensors: hash_unit(checkpoint, tensors, counted), units.values())
            return dict(zip(units, hashes, strict=True))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


class _Stopped(Exception):
    """Ends a thread whose hashes are no longer wanted: a unit can have gigabytes."""


def _until(stop: Event, count: Count) -> Count:
    """``count``, which ends the thread that calls it once ``stop`` is set."""

    def counted(nbytes: int) -> None:
        if stop.is_set():
            raise _Stopped
        count(nbytes)

    return counted


class Ahead:
    """Hashes groups of tensors, such as layers, in a thread: each while another one is computed on.

    The bytes are then in the page cache for both. Use as a context manager.
    """

    def __init__(self, checkpoint: Checkpoint, groups: Mapping[Any, Iterable[str]]) -> None:
        """``groups``: key -> names of its tensors, in the order in which they will be asked for."""
        self._checkpoint, self._groups = checkpoint, {key: units_of(group) for key, group in groups.items()}
        self._keys = list(self._groups)
        self._begun: dict[Any, Future[Units]] = {}
        self._pool, self._stop = ThreadPoolExecutor(1, "hash"), Event()

    def begin(self, key: Any) -> None:
        """Start hashing a group, if it has not begun."""
        if key not in self._begun:
            units, count = self._groups[key], _until(self._stop, lambda nbytes: None)
            self._begun[key] = self._pool.submit(
                lambda: {name: hash_unit(self._checkpoint, tensors, count) for name, tensors in units.items()}
            )

    def take(self, key: Any) -> Units:
        """The hashes of a group's units; the next group begins meanwhile. Raises as :func:`hash_unit`."""
        self.begin(key)
        place = self._keys.index(key) + 1
        if place < len(self._keys):
            self.begin(self._keys[place])
        return self._begun[key].result()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)


def differing(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Units of both whose hashes differ."""
    return [name for name, digest in expected.items() if name in found and found[name] != digest]


def told(units: Sequence[str], of: int) -> str:
    """``2 of 40 tensors or groups of experts differ (a, b)``."""
    return f"{len(units)} of {of} tensors or groups of experts differ ({listing(units)})"


def calibrated_groups(table: Iterable[TensorSpec], *, head: bool = False) -> dict[int | str, list[str]]:
    """The groups that calibration reads: of :func:`source_groups` all but head, MTP modules and towers.

    ``head``: with the head, which gradients of the loss come from.
    """
    unread = {"mtp", TOWER} if head else {"head", "mtp", TOWER}
    return {key: group for key, group in source_groups(table).items() if key not in unread}


def source_groups(table: Iterable[TensorSpec]) -> dict[int | str, list[str]]:
    """The tensors of a model by where a pass over it reads them.

    ``begin`` has the embeddings, layers have their numbers, then come ``norm``, ``head``, ``mtp`` with all
    multi-token-prediction modules, and ``tower`` with what is not the language model's.
    """
    groups: dict[int | str, list[str]] = {}
    for spec in table:
        if spec.role.startswith("mtp."):
            key: int | str = "mtp"
        elif spec.layer is not None:
            key = spec.layer
        else:
            key = {"embedding": "begin", "norm": "norm", TOWER: TOWER}.get(spec.role, "head")
        groups.setdefault(key, []).append(spec.name)
    return groups

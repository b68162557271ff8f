"""A checkpoint on disk: headers validated, tensors under their published names, bytes mapped and released.

Names of other tools are translated by ``spellings.py``.
"""

import mmap
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nemoquant.checkpoint.header import ITEM_SIZE, MAX_TENSORS, TensorInfo, read_header
from nemoquant.checkpoint.lost_pages import Watched
from nemoquant.checkpoint.spellings import is_no_weight, published, root_of
from nemoquant.errors import (
    CheckpointError,
    HeaderError,
    SourceChangedError,
    brief,
    listing,
)
from nemoquant.files import MOST_TABLE_ENTRIES, plain_name, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "U8": np.uint8, "F8_E4M3": np.uint8}
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named in mmap from Python 3.13 on


class Checkpoint:
    """The tensors of a folder. Use as a context manager, or call :meth:`close`.

    Leaving the context without an error calls :meth:`check_unchanged`: nobody goes on with what was read from
    files that changed.

    Attributes:
        path: the folder.
        tensors: published name -> :class:`TensorInfo`, all shards together.
        aliases: published name -> name in the file, for the names that were translated.
        root: what the names of layers begin with in the file, ``backbone`` in published ones.
        left_out: names of what is in the file and no weight.
        done: set by who has looked for changes after all was read: the end of the block does not look again.
    """

    def __init__(self, path: Path) -> None:
        """Read and validate all headers.

        Raises:
            CheckpointError: the folder or the index is not usable.
            HeaderError: a shard's header is not valid.
        """
        self.path, self.done = path, False
        self.aliases: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._watched: dict[Path, Watched] = {}
        self._lock = threading.Lock()
        self._facts: dict[Path, FileFacts] = {}
        infos = _all_tensors(path, self._facts)
        self.root = root_of((info.name for info in infos), path)
        self.left_out = [info.name for info in infos if is_no_weight(info.name, self.root)]
        left_out = set(self.left_out)
        for info in infos:
            if info.name in left_out:
                continue
            for name, part in published(info, self.root):
                if len(self.tensors) == MAX_TENSORS:
                    raise CheckpointError(f"{path} has too many tensors; expected at most {MAX_TENSORS:,}")
                if name in self.tensors:
                    raise CheckpointError(
                        f"{path}: two tensors are named {brief(name)} (one in {part.file.name}); expected "
                        f"each once"
                    )
                self.tensors[name] = part
                if name != info.name:
                    self.aliases[name] = info.name

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self.done:
                self.check_unchanged()
        finally:
            self.close()

    def close(self) -> None:
        """Drop all maps; a map stays open as long as an array still uses it."""
        self._maps.clear()
        self._watched.clear()

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, mapped, uint8, 1-D. Writing to them would not reach the file.

        Raises:
            SourceChangedError: the file is not the one that was opened; see :meth:`check_unchanged`.
        """
        info = self.tensors[name]
        with self._lock:  # threads must share one map, or release() would miss the other's pages
            if info.file not in self._maps:
                with _opened(info.file) as f:
                    self._check(
                        info.file, os.fstat(f.fileno())
                    )  # a map of what was cut would end within a tensor
                    # Private and writable, because torch warns about read-only memory. Without a reservation,
                    # because with one the system would refuse a file that is larger than memory.
                    self._maps[info.file] = mmap.mmap(
                        f.fileno(),
                        0,
                        flags=mmap.MAP_PRIVATE | MAP_NORESERVE,
                        prot=mmap.PROT_READ | mmap.PROT_WRITE,
                    )
                    self._watched[info.file] = Watched(self._maps[info.file])
        return np.frombuffer(self._maps[info.file], np.uint8, info.nbytes, info.start)

    def check_unchanged(self) -> None:
        """Make sure that the files are those that were opened, and that every page could be read.

        By size, time of the last change, and inode: what was computed before this call is of the opened
        files, unless someone sets the time back.

        Raises:
            SourceChangedError: names the file and what happened to it.
        """
        for file in self._facts:
            try:
                status = file.stat()
            except OSError as error:
                raise _gone(file, error) from None
            self._check(file, status)
        for file, watched in list(self._watched.items()):
            if watched.lost:
                raise SourceChangedError(
                    f"{file} could not be read: some of it was gone when it was needed; it was "
                    f"cut for a while, or its disk fails: make sure that it is whole, then run again"
                )

    def _check(self, file: Path, status: os.stat_result) -> None:
        """Compare what a file is now with what it was when it was opened."""
        facts, now = self._facts[file], FileFacts.of(status)
        if now.nbytes != facts.nbytes:
            raise _changed(file, f"it had {facts.nbytes:,} bytes and has {now.nbytes:,}")
        if now != facts:
            replaced = (now.device, now.inode) != (facts.device, facts.inode)
            raise _changed(
                file, "another file has its name now" if replaced else "it was written to meanwhile"
            )

    def array(self, name: str) -> npt.NDArray[Any]:
        """A tensor as a mapped numpy array; BF16 as uint16 bit patterns, F8_E4M3 as uint8 codes.

        Raises:
            CheckpointError: its dtype is not in ``NUMPY``.
        """
        info = self.tensors[name]
        if info.dtype not in NUMPY:
            raise CheckpointError(
                f"{info.file.name}: tensor {brief(name)} has dtype {info.dtype}; expected one of "
                f"{', '.join(NUMPY)}"
            )
        data = self.raw(name)
        if info.start % ITEM_SIZE[info.dtype]:  # allowed by safetensors, but kernels need aligned data
            data = data.copy()
        return data.view(NUMPY[info.dtype]).reshape(info.shape)

    def release(self, names: Iterable[str]) -> None:
        """Let the system drop the pages of these tensors, which count as resident memory until then."""
        for name in names:
            self.release_bytes(name, 0, self.tensors[name].nbytes)

    def release_bytes(self, name: str, begin: int, end: int) -> None:
        """Let the system drop the pages of the bytes from ``begin`` to ``end`` of a tensor.

        Pages at the edges hold bytes of its neighbours too, and are read again when these are used.
        """
        info = self.tensors[name]
        if info.file in self._maps and end > begin:
            page = (info.start + begin) // mmap.PAGESIZE * mmap.PAGESIZE
            self._maps[info.file].madvise(mmap.MADV_DONTNEED, page, info.start + end - page)


@dataclass(frozen=True)
class FileFacts:
    """What tells whether a file is still the same: cheap to ask, and never written down."""

    nbytes: int
    modified_ns: int
    device: int
    inode: int

    @staticmethod
    def of(status: os.stat_result) -> "FileFacts":
        return FileFacts(status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise _gone(file, error) from None


def _gone(file: Path, error: OSError) -> SourceChangedError:
    return _changed(file, f"it can't be opened any more ({error.strerror})")


def _changed(file: Path, how: str) -> SourceChangedError:
    return SourceChangedError(
        f"{file} changed while it was read: {how}; expected files that nobody writes to meanwhile, wait "
        f"until they are complete and run again"
    )


def _all_tensors(path: Path, facts: dict[Path, FileFacts]) -> list[TensorInfo]:
    """The tensors of all shards; ``facts`` receives those of each shard, taken before it is read."""
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder; expected a checkpoint folder with config.json and safetensors files"
        )
    index = path / INDEX
    if not index.exists():
        if not (path / SINGLE).exists():
            raise CheckpointError(
                f"{path} has neither {INDEX} nor {SINGLE}; expected a checkpoint in safetensors format"
                f"{_instead(path)}"
            )
        _check_one_set(path, SINGLE, {SINGLE})
        facts[path / SINGLE] = FileFacts.of((path / SINGLE).stat())
        return list(read_header(path / SINGLE)[0].values())
    weight_map = _read_index(index)
    _check_one_set(path, INDEX, set(weight_map.values()))
    result: list[TensorInfo] = []
    shard_of: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        if not (path / shard).is_file():
            raise CheckpointError(f"{path / shard} does not exist, but {INDEX} names it; download the shard")
        facts[path / shard] = FileFacts.of((path / shard).stat())
        for name, info in read_header(path / shard)[0].items():
            if name in shard_of:
                raise HeaderError(
                    f"tensor {brief(name)} is in {shard_of[name]} and in {shard}; expected it once"
                )
            shard_of[name] = shard
            result.append(info)
    wrong = [name for name, shard in weight_map.items() if shard_of.get(name) != shard]
    extra = [name for name in shard_of if name not in weight_map]
    if wrong or extra:
        raise CheckpointError(
            f"{index} does not fit its shards: "
            + (f"not where it says: {listing(wrong)}" if wrong else f"not in it: {listing(extra)}")
        )
    return result


def _instead(path: Path) -> str:
    """The end of a message about a folder without weights: what is there in their place, and what to do."""
    names = sorted(file.name for file in path.iterdir())
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return f"; if {listing(found)} is the whole model, rename it to {SINGLE}"
    if found:
        return f"; it has {listing(found, 3)}, and no index says which tensor is where: download {INDEX}"
    found = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf", ".npz"))]
    if found:
        return (
            f"; it has {listing(found, 3)}: download the safetensors files, or save the model again as such"
        )
    return ""


def _check_one_set(path: Path, chosen: str, named: set[str]) -> None:
    """Make sure that a folder has no other weights than those of ``chosen``, an index or a single file.

    Which ones are meant nobody could tell: transformers takes ``model.safetensors`` before an index, engines
    take the index, or all files.
    """
    others = sorted(file.name for file in path.glob("model*.safetensors") if file.name not in named)
    if others:
        raise CheckpointError(
            f"{path} has two sets of weights: {chosen}, and {listing(others)}, which "
            f"{'it does not name' if chosen == INDEX else 'no index names'}; expected one set, move away "
            f"what is not meant"
        )


def _read_index(index: Path) -> dict[str, str]:
    try:
        content = read_json(index, entries=MOST_TABLE_ENTRIES)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{index} cannot be read ({error}); expected JSON with a `weight_map`"
        ) from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(
            f"{index} has the weight_map {brief(weight_map)}; expected an object of file names by tensor"
        )
    for shard in set(weight_map.values()):
        if not (plain_name(shard) and shard.endswith(".safetensors")):
            raise CheckpointError(
                f"{index} names the shard {brief(shard)}; expected a plain file name ending in "
                f".safetensors: put the shards beside the index, and their plain names into it"
            )
    return weight_map

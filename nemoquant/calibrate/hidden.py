"""Hidden states of the calibration rows, which wait between layers: in memory, or in two files.

A layer reads what the layer before it wrote. With files, input and output of a layer lie in different files,
so that an interrupted layer can be run again; what a layer wrote is on the disk before a run's state can name
it. The page cache serves them, and memory does not grow with the number of rows.
"""

import errno
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nemoquant.checkpoint.folder import HIDDEN
from nemoquant.checkpoint.manifest import file_sha256
from nemoquant.files import open_own, sync_folder


class HiddenStates(Protocol):
    """[rows, length, hidden] in the compute dtype."""

    def read(self, rows: Sequence[int]) -> Tensor:
        """The states of some rows [len(rows), length, hidden] before the current layer; a copy."""

    def write(self, rows: Sequence[int], states: Tensor) -> None:
        """Store the current layer's output for some rows. Rows come in ascending order."""

    def turn(self) -> None:
        """The current layer is finished: ``read`` returns its output from now on."""


class InMemory:
    """One tensor: a row is read before it is written, and no other row needs it."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self._states = torch.empty(shape, dtype=dtype)

    def read(self, rows: Sequence[int]) -> Tensor:
        return self._states[list(rows)]

    def write(self, rows: Sequence[int], states: Tensor) -> None:
        self._states[list(rows)] = states.to("cpu")

    def turn(self) -> None:
        pass


class RowFile:
    """A file of rows [rows, length, hidden]; those that were never written are zeros.

    Raises OSError where it can't be read or written.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.path, self._shape, self._dtype = path, shape, dtype
        self._row = shape[1] * shape[2] * dtype.itemsize
        self._file = open_own(path)
        os.ftruncate(self._file, shape[0] * self._row)

    def read(self, rows: Sequence[int]) -> Tensor:
        """Some rows [len(rows), length, hidden]; a copy."""
        states = torch.empty((len(rows), *self._shape[1:]), dtype=self._dtype)
        for row, state in zip(rows, states, strict=True):
            _fill(self._file, state, row * self._row, self.path)
        return states

    def write(self, rows: Sequence[int], states: Tensor) -> None:
        for row, state in zip(rows, states.to("cpu").contiguous(), strict=True):
            view, end = _bytes(state), (row + 1) * self._row
            while view:
                view = view[os.pwrite(self._file, view, end - len(view)) :]

    def keep(self) -> str:
        """What was written is on the disk when this returns; the sha256 of all of it."""
        os.fsync(self._file)
        return file_sha256(self.path)

    def close(self) -> None:
        os.close(self._file)


class InFiles:
    """Two files in a folder: one is read, the other is written.

    Attributes:
        current: number of the file that is read.
        sha256: of what the last finished layer wrote, row after row.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        current: int = 0,
        names: Sequence[str] = HIDDEN,
    ) -> None:
        self.shape, self.dtype, self.current, self.sha256 = shape, dtype, current, ""
        self._row = shape[1] * shape[2] * dtype.itemsize
        self._paths = [folder / name for name in names]
        self._files = [open_own(path) for path in self._paths]
        sync_folder(folder)
        self._digest = hashlib.sha256()

    def read(self, rows: Sequence[int]) -> Tensor:
        return self._read(rows, self.current)

    def before(self, rows: Sequence[int]) -> Tensor:
        """The states of some rows as they came into the layer that was finished last; a copy."""
        return self._read(rows, 1 - self.current)

    def _read(self, rows: Sequence[int], file: int) -> Tensor:
        states = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        for row, state in zip(rows, states, strict=True):
            _fill(self._files[file], state, row * self._row, self._paths[file])
        return states

    def write(self, rows: Sequence[int], states: Tensor) -> None:
        for row, state in zip(rows, states.to("cpu").contiguous(), strict=True):
            view = _bytes(state)
            self._digest.update(view)
            while view:
                view = view[
                    os.pwrite(self._files[1 - self.current], view, (row + 1) * self._row - len(view)) :
                ]

    def turn(self) -> None:
        self.current = 1 - self.current
        os.fsync(self._files[self.current])
        self.sha256, self._digest = self._digest.hexdigest(), hashlib.sha256()

    def holds(self, rows: Sequence[int], sha256: str) -> bool:
        """Whether these rows in the current file have this hash."""
        digest = hashlib.sha256()
        try:
            for row in rows:
                digest.update(_bytes(self.read([row])))
        except OSError:
            return False
        return digest.hexdigest() == sha256

    def close(self) -> None:
        for file in self._files:
            os.close(file)


def _fill(file: int, state: Tensor, at: int, path: Path) -> None:
    """Read a row."""
    view = _bytes(state)
    end = at + len(view)
    while view:  # one call moves 2 GiB at most
        got = os.preadv(file, [view], end - len(view))
        if not got:
            raise OSError(errno.EIO, f"it ends within the row at byte {at}", str(path))
        view = view[got:]


def _bytes(states: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return states.view(torch.uint8).numpy().data.cast("B")

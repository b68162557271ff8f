"""The inputs of a layer's GEMMs in a file, for those who need more of them than their maxima.

One file in OUT.partial holds one layer's inputs, as they were computed. It is written by the observer of each
batch, because the inputs of all experts of a layer would take far more memory than the batch itself; what it
collects is only where they lie. (So it can't be sent to another machine.) The page cache serves the file; the
next layer overwrites it.
"""

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nemoquant.calibrate.batch import PIECE_BYTES
from nemoquant.files import open_own
from nemoquant.formats.rounding import Floats


class Place(NamedTuple):
    """Where some rows of an input lie: byte offset, number of rows, width, dtype."""

    offset: int
    rows: int
    width: int
    dtype: torch.dtype


class InputFile:
    """The file. ``wanted`` are the taps that are kept; without a path it has no name, and lies in memory."""

    def __init__(self, path: Path | None, wanted: Collection[str]) -> None:
        self.path, self.wanted = path, wanted
        self._file = os.memfd_create("inputs") if path is None else open_own(path)
        self._end = 0
        self._places: dict[str, list[Place]] = {}

    def append(self, x: Tensor) -> Place:
        """Write an input [tokens, width]; raises OSError where the disk is full."""
        values = x.detach().contiguous().cpu()
        place = Place(self._end, values.shape[0], values.shape[1], values.dtype)
        view = values.view(torch.uint8).numpy().reshape(-1).data if values.numel() else memoryview(b"")
        while view:
            written = os.pwrite(self._file, view, self._end)
            self._end, view = self._end + written, view[written:]
        return place

    def keep(self, places: Iterable[tuple[str, Place]]) -> None:
        """Add what an observer collected; batches come in order."""
        for name, place in places:
            self._places.setdefault(name, []).append(place)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        """The inputs that were kept."""
        return list(self._places)

    def tokens(self, name: str) -> int:
        """Rows of an input."""
        return sum(place.rows for place in self._places.get(name, ()))

    def pieces(self, name: str, widest: int = 0) -> Iterator[Floats]:
        """An input in its order, float32 [some rows, width] at a time; its own memory.

        ``widest``: of another input, if that is wider, so that pieces of both have as many rows.

        Raises:
            OSError: the file can't be read, or it became shorter.
        """
        for offset, rows, width, dtype in self._places.get(name, ()):
            step = max(1, PIECE_BYTES // (4 * max(width, widest)))
            for first in range(0, rows, step):
                count = min(step, rows - first)
                at = offset + first * width * dtype.itemsize
                piece: Floats = self._read(Place(at, count, width, dtype)).float().numpy()
                yield piece

    def batches(self, name: str) -> Iterator[Tensor]:
        """An input as it was computed, [tokens, width] of one batch after the other. Raises as above."""
        return map(self._read, self._places.get(name, ()))

    def _read(self, place: Place) -> Tensor:
        values = torch.empty(place.rows, place.width, dtype=place.dtype)
        at, view = place.offset, values.view(torch.uint8).numpy().reshape(-1).data
        while view:
            got = os.preadv(self._file, [view], at)
            if not got:
                raise OSError(5, "it ends too early", str(self.path))
            at, view = at + got, view[got:]
        return values

    def clear(self) -> None:
        """Forget the layer: the next one begins at the front."""
        self._places, self._end = {}, 0
        os.ftruncate(self._file, 0)

    def close(self) -> None:
        os.close(self._file)
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class InputObserver:
    """Writes the inputs that a file wants."""

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._places: list[tuple[str, Place]] = []

    def observe(self, name: str, x: Tensor) -> Tensor:
        if name in self._file.wanted:
            self._places.append((name, self._file.append(x)))
        return x

    def collect(self) -> list[tuple[str, Place]]:
        return self._places

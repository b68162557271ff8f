"""Write one safetensors file from front to back, with its sha256 computed on the way.

The header comes first, then the bytes of the tensors in order. When the file is closed it is on the disk.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from nemoquant.checkpoint.background import Background
from nemoquant.checkpoint.header import ITEM_SIZE, encode_header
from nemoquant.files import close_synced

METADATA = {"format": "pt"}


def nothing() -> None:
    """Do nothing: the default for what follows a write."""


class ShardWriter:
    """Writes the given tensors (name, dtype, shape) in their order, exactly as many bytes as they have.

    Use as a context manager; leaving it without an error checks the number of bytes. ``sha256`` is that of
    the file, once it is closed. With ``background``, hashing and writing are two threads, each with a short
    queue; arrays must then not change until their ``then`` was called.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str] = METADATA,
        *,
        background: bool = False,
    ) -> None:
        header = encode_header(list(tensors), metadata)
        self.path = path
        self.sha256 = ""
        self._left = sum(math.prod(shape) * ITEM_SIZE[dtype] for _, dtype, shape in tensors)
        self._digest = hashlib.sha256(header)
        self._file = path.open("xb")
        self._file.write(header)
        self._stages = (Background("hash"), Background("write")) if background else ()

    def write(self, data: npt.NDArray[np.generic], then: Callable[[], None] = nothing) -> None:
        """Append the bytes of a C-contiguous array.

        ``then`` is called once they are no longer needed, with ``background`` in a thread.
        """
        view = data.reshape(-1).view(np.uint8)
        self._left -= view.size
        assert self._left >= 0, f"{self.path.name}: more bytes than its header announces"
        if not self._stages:
            self._digest.update(view.data)
            self._append(view, then)
            return
        hashing, writing = self._stages

        def hashed() -> None:
            self._digest.update(view.data)
            writing.put(lambda: self._append(view, then))

        hashing.put(hashed)

    def _append(self, view: npt.NDArray[np.uint8], then: Callable[[], None]) -> None:
        self._file.write(view.data)
        then()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for stage in self._stages:
                stage.end(cancel=kind is not None)
            if kind is None:
                for stage in self._stages:
                    stage.check()
                assert self._left == 0, f"{self.path.name}: {self._left} bytes are missing"
                close_synced(self._file)
                self.sha256 = self._digest.hexdigest()
        finally:
            self._file.close()

"""Write one safetensors file from front to back: header first, then the tensors' bytes in order, hashed on the way."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from nemoquant.checkpoint.header import ITEM_SIZE, encode_header

METADATA = {"format": "pt"}


class ShardWriter:
    """Writes the tensors given (name, dtype, shape) in their order; every byte must come, and no more.

    Use as a context manager; leaving it without an error checks the count. ``sha256`` is the file's, once it is closed.
    """

    def __init__(
        self, path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] = METADATA
    ) -> None:
        header = encode_header(list(tensors), metadata)
        self.path = path
        self.sha256 = ""
        self._left = sum(math.prod(shape) * ITEM_SIZE[dtype] for _, dtype, shape in tensors)
        self._digest = hashlib.sha256(header)
        self._file = path.open("xb")
        self._file.write(header)

    def write(self, data: npt.NDArray[np.generic]) -> None:
        """Append the bytes of a C-contiguous array."""
        view = data.reshape(-1).view(np.uint8)
        self._left -= view.size
        assert self._left >= 0, f"{self.path.name}: more bytes than its header announces"
        self._digest.update(view.data)
        self._file.write(view.data)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if kind is None:
            assert self._left == 0, f"{self.path.name}: {self._left} bytes are missing"
            self.sha256 = self._digest.hexdigest()

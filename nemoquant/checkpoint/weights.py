"""A layer's weights as torch tensors over the mapped file: read on demand, soon dropped from memory."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from nemoquant.checkpoint.reader import Checkpoint

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
HELD_BYTES = 64 << 20  # of mapped pages, before those of earlier tensors are released


class LayerWeights(Mapping[str, Tensor]):
    """The tensors under a prefix, by their names relative to it; only for floating source dtypes.

    A tensor stays valid after its pages were released: when it is used, they are read again from the page
    cache.
    """

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        self.checkpoint, self.prefix = checkpoint, prefix
        self._held: dict[str, int] = {}

    def __getitem__(self, name: str) -> Tensor:
        full = self.prefix + name
        return torch.from_numpy(self.hold(full)).view(TORCH[self.checkpoint.tensors[full].dtype])

    def hold(self, name: str) -> npt.NDArray[Any]:
        """A tensor by its full name, as the checkpoint maps it; its pages are released with the others."""
        nbytes = self.checkpoint.tensors[name].nbytes
        if sum(self._held.values()) + nbytes > HELD_BYTES:
            self.release()
        self._held[name] = nbytes
        return self.checkpoint.array(name)

    def __iter__(self) -> Iterator[str]:
        return (n.removeprefix(self.prefix) for n in self.checkpoint.tensors if n.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def release(self) -> None:
        """Release the pages of all tensors that were looked up."""
        self.checkpoint.release(self._held)
        self._held.clear()

"""Calibration rows that are computed together: number, length, dtype, and the sizes that follow.

Importing this module loads no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

RowBatch = int | Mapping[str, int]  # rows at once, of all layers or by kind of layer
ITEM_SIZE = {"float32": 4, "bfloat16": 2}
MAX_NON_FINITE = 0.1  # share of rows that may be left out
PIECE_BYTES = 16 << 20  # of an input, float32, that a reader of `inputs.py` gets at once
HIDDEN_FILES = 2  # hidden states before and after the layer in work


@dataclass(frozen=True)
class Batch:
    """``rows`` rows of ``length`` tokens, computed in ``dtype`` (``float32`` or ``bfloat16``)."""

    rows: int
    length: int
    dtype: str

    @property
    def item_size(self) -> int:
        """Bytes of an element."""
        return ITEM_SIZE[self.dtype]

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def of(self, rows: int) -> "Batch":
        """The same batch with another number of rows."""
        return replace(self, rows=rows)

    def hidden_bytes(self, hidden_size: int) -> int:
        """Disk for the hidden states of these rows during calibration, both files together, in bytes."""
        return HIDDEN_FILES * self.tokens * hidden_size * self.item_size


def rows_of(row_batch: RowBatch, kind: str) -> int:
    """Rows at once in one kind of layer."""
    return row_batch if isinstance(row_batch, int) else row_batch[kind]


def compute_dtype(device: str) -> str:
    """``bfloat16`` where the machine multiplies it directly, else ``float32``."""
    import torch

    direct = device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if direct else "float32"

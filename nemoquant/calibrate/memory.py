"""Memory that a batch of rows takes in a layer, and the number of rows that may go through at once.

The figures count the tensors that the reference model holds at its peak, in bytes a token; tests compare
them with measured peaks. Mapped weights are not counted here: see ``weight_bytes``.
"""

import math

from nemoquant.calibrate.batch import Batch
from nemoquant.checkpoint.weights import HELD_BYTES
from nemoquant.model.config import LayerKind, NemotronHConfig
from nemoquant.model.kinds import KINDS
from nemoquant.model.taps import CAST_ELEMENTS

MOST_TOKENS = 1 << 15  # with more, products are no faster, and the page cache needs the memory

BACKWARD = 6  # memory of a row on the way back through a layer, over that forward; measured 1.2 to 6


def batch_bytes(config: NemotronHConfig, kind: LayerKind, batch: Batch, beside: int = 0) -> int:
    """Peak bytes of a batch in a layer of ``kind``, the largest one where they differ.

    ``beside``: bytes a token that the run holds meanwhile.
    """
    item = batch.item_size
    # x, its norm, the block's output, their sum; one byte for the mask of finite values
    stream = config.hidden_size * (4 * item + 1) + beside
    needed = (KINDS[kind].batch_bytes(own, item) for own in config.variants(kind))
    return max(batch.tokens * (token + stream) + batch.rows * row for token, row in needed)


def backward_rows(rows: int) -> int:
    """Rows at once on the way back through a layer, where so many go forward: what they take is kept."""
    return max(1, rows // BACKWARD)


def back_bytes(config: NemotronHConfig, kind: LayerKind, batch: Batch) -> int:
    """Peak bytes of a batch on the way back through a layer of ``kind``, with the part of a weight that is
    copied at a time."""
    return BACKWARD * batch_bytes(config, kind, batch) + 2 * min(CAST_ELEMENTS, largest_weight(config))


def weight_bytes(config: NemotronHConfig, item: int) -> int:
    """Bytes of weights that may be resident at once.

    These are mapped weights held between two releases, the largest matrix of a layer, and, where the compute
    dtype differs from the file's, the part that is converted at a time.
    """
    largest = largest_weight(config)
    return HELD_BYTES + 2 * largest + (item * min(CAST_ELEMENTS, largest) if item != 2 else 0)


def largest_weight(config: NemotronHConfig) -> int:
    """Elements of the largest matrix of any layer."""
    return max(
        math.prod(entry.shape)
        for kind in set(config.layers)
        for own in config.variants(kind)
        for entry in KINDS[kind].tensors(own)
        if entry.role in KINDS[kind].linear
    )


def pick_row_batch(config: NemotronHConfig, batch: Batch, limit: int, beside: int = 0) -> dict[str, int]:
    """Rows of ``batch`` at once for each kind of layer, at least 1; they take at most ``limit`` bytes.

    ``beside``: as for :func:`batch_bytes`.
    """
    most = max(1, min(batch.rows, MOST_TOKENS // batch.length))
    return {
        kind: max(1, min(most, limit // batch_bytes(config, kind, batch.of(1), beside)))
        for kind in sorted(set(config.layers))
    }

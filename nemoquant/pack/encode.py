"""From a source tensor's bytes to codes: chunks of rows, so that scratch memory does not follow the tensor's size."""

from typing import Any

import numpy as np
import numpy.typing as npt

from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.errors import WeightError
from nemoquant.formats import fp8, nvfp4
from nemoquant.formats.amax import amax as bits_amax
from nemoquant.planning.plan import Row

CHUNK_BYTES = 8 << 20  # of source, read and encoded at a time

Array = npt.NDArray[Any]
Encoded = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8] | None]


def slices(row: Row) -> list[slice]:
    """Rows of a weight [out, in], ``CHUNK_BYTES`` at a time."""
    step = max(1, CHUNK_BYTES // max(1, row.bytes_in // row.shape[0]))
    return [slice(start, min(start + step, row.shape[0])) for start in range(0, row.shape[0], step)]


def read(checkpoint: Checkpoint, row: Row, part: slice) -> Array:
    """Some rows of a weight as the kernels take them: bf16 bit patterns or float32, mapped where the source has these."""
    array = checkpoint.array(row.name)[part]
    return array.astype(np.float32) if array.dtype == np.float16 else array


def amax(checkpoint: Checkpoint, row: Row, part: slice) -> np.float32:
    """max |w| of some rows.

    Raises:
        WeightError: NaN or Inf among them.
    """
    return check_finite(row.name, bits_amax(read(checkpoint, row, part)))


def check_finite(name: str, value: np.float32) -> np.float32:
    """``value``, a maximum, as it is; raises WeightError where it tells of NaN or Inf."""
    if not np.isfinite(value):
        what = "NaN" if np.isnan(value) else "Inf"
        raise WeightError(f"{name} has {what}; expected finite weights, the source is damaged: download or convert it again")
    return value


def encode(checkpoint: Checkpoint, row: Row, part: slice, scale: np.float32, degenerate: bool) -> Encoded:
    """Codes of some rows, and their block scales for NVFP4; a degenerate weight becomes zeros."""
    weight = read(checkpoint, row, part)
    shape = (weight.shape[0], weight.shape[1])
    if row.format == "fp8":
        return (fp8.zeros(shape) if degenerate else fp8.encode(weight, scale)), None
    assert row.scale_method is not None
    return nvfp4.zeros(shape) if degenerate else nvfp4.encode(weight, scale, row.scale_method)

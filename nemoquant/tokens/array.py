"""Token ids in an .npy file."""

import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nemoquant.errors import CalibrationError

MOST_IDS = 1 << 26  # 512 MiB as int64: thousands of rows of the longest that are used


def read_array(path: Path) -> npt.NDArray[np.int64]:
    """The integers [rows, length] of an .npy file, as int64.

    The file is mapped: numpy would first make room for as many values as the header of the file says.

    Raises:
        CalibrationError: it can't be read, or holds something else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numpy, on headers that Python 2 has written
            array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # the header is a Python expression: reading it can raise anything
        raise CalibrationError(
            f"{path} cannot be read as a numpy array ({' '.join(str(error).split())[:200]}); expected "
            f"integers [rows, length]"
        ) from None
    if array.ndim != 2 or not array.size or array.dtype.kind not in "iu":
        raise CalibrationError(
            f"{path} holds {array.dtype} of shape {list(array.shape)}; expected integers [rows, length]"
        )
    if array.size > MOST_IDS:
        raise CalibrationError(
            f"{path} holds {array.size:,} token ids of shape {list(array.shape)}; expected at "
            f"most {MOST_IDS:,}"
        )
    return np.array(array, np.int64)

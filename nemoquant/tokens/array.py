"""Token ids in an .npy or .npz file."""

import math
import os
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nemoquant.errors import CalibrationError, listing
from nemoquant.files import open_regular
from nemoquant.tokens.columns import MASK, OPTION
from nemoquant.tokens.kinds import ending

MOST_IDS = 1 << 26  # 512 MiB as int64: thousands of rows of the longest that are used
MOST_ARRAYS = 1000  # in an .npz
HEADER = 1 << 16  # bytes: numpy writes a hundred


class Arrays(NamedTuple):
    """Token ids [rows, length] or [tokens], and which of them count; None: all do."""

    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_] | None = None

    @property
    def are_rows(self) -> bool:
        """Whether they are rows already, all of them whole."""
        return self.ids.ndim == 2 and self.mask is None


def read_arrays(path: Path, names: Sequence[str] = ()) -> Arrays:
    """The integers of an .npy file, or of an .npz file under ``input_ids`` with their ``attention_mask``.

    Args:
        names: the one that the user named, of an .npz.
    Raises:
        CalibrationError: it can't be read, or holds something else.
    """
    if ending(path) == ".npy":
        if names:
            raise CalibrationError(f"{path} is one array and has no {listing(names)}; leave out {OPTION}")
        return Arrays(read_array(path))
    try:
        with os.fdopen(open_regular(path), "rb") as file, zipfile.ZipFile(file) as packed:
            return _packed(packed, path, names)
    except CalibrationError:
        raise
    except Exception as error:  # a header is a Python expression, a zip file anything
        raise CalibrationError(
            f"{path} cannot be read as numpy arrays ({' '.join(str(error).split())[:200]}); expected "
            f"integers [rows, length] as input_ids"
        ) from None


def _packed(packed: zipfile.ZipFile, path: Path, names: Sequence[str]) -> Arrays:
    if len(names) > 1:
        raise CalibrationError(f"{path} holds token ids; expected one name of {OPTION}, got {listing(names)}")
    inside = {info.filename.removesuffix(".npy"): info for info in packed.infolist()[:MOST_ARRAYS]}
    others = [name for name in inside if name != MASK]
    wanted = names[0] if names else "input_ids" if "input_ids" in inside or len(others) != 1 else others[0]
    if wanted not in inside:
        raise CalibrationError(
            f"{path} holds {listing(sorted(inside)) or 'nothing'} and no {wanted}; expected integers [rows, "
            f"length] as input_ids, or name them by --calib-column"
        )
    ids = _checked(_member(packed, inside[wanted]), path, wanted)
    if MASK not in inside:
        return Arrays(ids)
    mask = _member(packed, inside[MASK])
    if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
        raise CalibrationError(
            f"{path} holds {MASK} of shape {list(mask.shape)} for {wanted} of {list(ids.shape)}; "
            f"expected 0 or 1 each"
        )
    return Arrays(ids, None if mask.all() else mask.astype(bool))


def _member(packed: zipfile.ZipFile, info: zipfile.ZipInfo) -> npt.NDArray[Any]:
    """An array of an .npz; no more is unpacked, and no memory given, than its header says within bounds."""
    with packed.open(info) as file:
        version = np.lib.format.read_magic(file)
        of_numpy = np.lib.format
        header = of_numpy.read_array_header_1_0 if version[0] == 1 else of_numpy.read_array_header_2_0
        shape, in_columns, dtype = header(file, max_header_size=HEADER)
        count = math.prod(shape)
        if dtype.kind not in "iub" or not 0 <= count <= MOST_IDS:
            raise ValueError(
                f"{info.filename} has {count:,} values of {dtype}, not at most {MOST_IDS:,} integers"
            )
        return np.frombuffer(_exactly(file, count * dtype.itemsize), dtype).reshape(
            shape, order="F" if in_columns else "C"
        )


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ValueError(f"it ends after {len(data):,} of {size:,} bytes")
    return data


def read_array(path: Path) -> npt.NDArray[np.int64]:
    """The integers [rows, length], or [tokens], of an .npy file, as int64.

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
    return _checked(array, path, "")


def _checked(array: npt.NDArray[Any], path: Path, name: str) -> npt.NDArray[np.int64]:
    what = f"{name} of " if name else ""
    if array.ndim not in (1, 2) or not array.size or array.dtype.kind not in "iu":
        raise CalibrationError(
            f"{path} holds {what}{array.dtype} of shape {list(array.shape)}; expected integers [rows, length]"
        )
    if array.size > MOST_IDS:
        raise CalibrationError(
            f"{path} holds {array.size:,} token ids of shape {list(array.shape)}; expected at "
            f"most {MOST_IDS:,}"
        )
    return np.array(array, np.int64)


def are_rows(path: Path, names: Sequence[str] = ()) -> bool:
    """Whether a file says its rows and their length itself; False where it can't be read."""
    if ending(path) not in (".npy", ".npz"):
        return False
    try:
        return read_arrays(path, names).are_rows
    except CalibrationError:
        return False

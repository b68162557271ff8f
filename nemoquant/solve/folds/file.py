"""The folds of a model as one safetensors file, ``nemoquant_folds.st``.

    <tensor>|rows       I8 [out]         <tensor>|left     F32 [out, out]
    <tensor>|columns    I8 [in]          <tensor>|right    F32 [in, in]

All experts of a layer share an array: it is stored once, and the metadata name for each other part the one
whose array it has. A part is missing where it would change nothing.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoquant.checkpoint.header import TensorInfo, read_header
from nemoquant.checkpoint.writer import ShardWriter
from nemoquant.errors import CheckpointError, brief
from nemoquant.files import open_regular
from nemoquant.model.roles import TensorSpec
from nemoquant.solve.folds.layer import Folds
from nemoquant.solve.folds.transform import Transform

PARTS = {"rows": ("I8", 1), "columns": ("I8", 1), "left": ("F32", 2), "right": ("F32", 2)}
NUMPY = {"I8": np.int8, "F32": np.float32}
MARK = "|"
MOST_BYTES = 4 << 30  # Super's have 0.4 GB
AGAIN = "write it again, or take the file from where it was made"


def save(path: Path, folds: Mapping[str, Transform]) -> str:
    """Write a new file, on the disk when this returns; its sha256.

    Raises:
        FileExistsError: there is one.
    """
    first: dict[int, str] = {}  # by the array's identity
    arrays: dict[str, NDArray[Any]] = {}
    same: dict[str, str] = {}
    for name, transform in sorted(folds.items()):
        for part in PARTS:
            array = getattr(transform, part)
            if array is None:
                continue
            key = f"{name}{MARK}{part}"
            if id(array) in first:
                same[key] = first[id(array)]
            else:
                first[id(array)], arrays[key] = key, array
    tensors = [(key, PARTS[_part(key)][0], array.shape) for key, array in arrays.items()]
    with ShardWriter(path, tensors, same) as writer:
        for array in arrays.values():
            writer.write(np.ascontiguousarray(array))
    return writer.sha256


def load(path: Path) -> Folds:
    """The folds of a file; parts that share an array share it again.

    Raises:
        HeaderError: it is no safetensors file.
        CheckpointError: it holds anything but folds: an unknown part, a wrong dtype or shape, a matrix with
            NaN or Inf, or more than 4 GiB.
    """
    infos, same = read_header(path)
    if (size := sum(info.nbytes for info in infos.values())) > MOST_BYTES:
        raise CheckpointError(
            f"{path.name}: {size:,} bytes of folds; expected at most {MOST_BYTES:,}: {AGAIN}"
        )
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with os.fdopen(open_regular(path), "rb") as f:
            for key, info in infos.items():
                _check(path, info)
                f.seek(info.start)
                data = f.read(info.nbytes)
                if len(data) != info.nbytes:
                    raise CheckpointError(f"{path.name} was cut while it was read; {AGAIN}")
                arrays[key] = np.frombuffer(data, NUMPY[info.dtype]).reshape(info.shape)
                _check_values(path, key, arrays[key])
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}); {AGAIN}") from None
    for key, other in same.items():
        if key in infos or other not in infos:
            raise CheckpointError(
                f"{path.name}: metadata say that {brief(key)} is {brief(other)}; expected a part that is not "
                f"stored, and the name of one that is: {AGAIN}"
            )
        arrays[key] = arrays[other]
    parts: dict[str, dict[str, NDArray[Any]]] = {}
    for key, array in arrays.items():
        if not _fits(key, array):
            raise CheckpointError(
                f"{path.name}: {brief(key)} has an array of {array.dtype} {list(array.shape)}; expected "
                f"<tensor>|rows or |columns of int8 [n], or |left or |right of float32 [n, n]: {AGAIN}"
            )
        parts.setdefault(key.rpartition(MARK)[0], {})[_part(key)] = array
    return {name: Transform(**given) for name, given in parts.items()}


def check(path: Path, folds: Mapping[str, Transform], table: list[TensorSpec]) -> None:
    """Make sure that folds are of tensors that the model has, in their shapes.

    Raises:
        CheckpointError: names the first that is not.
    """
    shapes = {spec.name: spec.shape for spec in table}
    for name, fold in folds.items():
        shape = shapes.get(name)
        if shape is None:
            raise CheckpointError(
                f"{path.name} has a fold of {brief(name)}, which this model does not have; expected folds "
                f"made for it: {AGAIN}"
            )
        for part in PARTS:
            array = getattr(fold, part)
            axis = -1 if part in ("columns", "right") else 0
            if array is not None and (array.shape[0] != shape[axis] or (len(shape) != 2 and part != "rows")):
                raise CheckpointError(
                    f"{path.name}: {brief(name + MARK + part)} has shape {list(array.shape)}, but the tensor "
                    f"has {list(shape)}; expected folds made for this model: {AGAIN}"
                )


def _part(key: str) -> str:
    return key.rpartition(MARK)[2]


def _fits(key: str, array: NDArray[Any]) -> bool:
    name, _, part = key.rpartition(MARK)
    if not name or part not in PARTS:
        return False
    dtype, dimensions = PARTS[part]
    return array.dtype == NUMPY[dtype] and array.ndim == dimensions and len(set(array.shape)) == 1


def _check(path: Path, info: TensorInfo) -> None:
    """Before its bytes are read."""
    if info.dtype not in NUMPY:
        raise CheckpointError(
            f"{path.name}: {brief(info.name)} has dtype {info.dtype}; expected I8 exponents or an F32 "
            f"matrix: {AGAIN}"
        )


def _check_values(path: Path, key: str, array: NDArray[Any]) -> None:
    if array.dtype != np.float32:
        return
    if not np.isfinite(array).all():
        raise CheckpointError(f"{path.name}: {brief(key)} holds NaN or Inf; expected finite numbers: {AGAIN}")

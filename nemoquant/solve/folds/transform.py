"""What a fold does to one tensor: powers of two for rows and columns, and a matrix on either side.

    W' = 2^rows * (left @ W @ right) * 2^columns            W [out, in], rows [out], columns [in]

Both exponents are added, so a fold that divides columns has negative ``columns``. Powers of two alone change
exponents, so that the result is the source's dtype and exact; where it would not be, the fold is refused.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Exponents = NDArray[np.int8]
Matrix = NDArray[np.float32]

# Rows that are computed at a time, counted from the first row of the weight: a part is then made by the same
# products as the whole, so that not even the order of sums differs.
BLOCK_ROWS = 256
ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Transform:
    """``W' = 2^rows * (left @ W @ right) * 2^columns``; None stands for no change.

    Attributes:
        rows: int8 exponents [out].
        columns: int8 exponents [in]; a tensor of one dimension has rows only.
        left: float32 [out, out].
        right: float32 [in, in].
    """

    rows: Exponents | None = None
    columns: Exponents | None = None
    left: Matrix | None = None
    right: Matrix | None = None

    @property
    def is_identity(self) -> bool:
        """Whether no tensor is changed."""
        powers = (self.rows, self.columns)
        return self._is_exact_kind and not any(e is not None and e.any() for e in powers)

    @property
    def _is_exact_kind(self) -> bool:
        return self.left is None and self.right is None

    def then(self, after: "Transform") -> "Transform":
        """This one, and then ``after``, as one.

        A matrix takes up the powers of two that were applied to its side before it.

        Raises:
            ValueError: both have a matrix on one side, or exponents do not fit int8.
        """
        return Transform(
            _sum(None if after.left is not None else self.rows, after.rows),
            _sum(None if after.right is not None else self.columns, after.columns),
            _side(self.left, after.left, self.rows, axis=0),
            _side(self.right, after.right, self.columns, axis=1),
        )

    def exact(self, weight: NDArray[Any]) -> bool:
        """Whether :meth:`apply` keeps each value of ``weight`` within its dtype.

        Powers of two alone leave it exact then.

        Raises:
            ValueError: another dtype, or shapes that do not match.
        """
        blocks = self._blocks(weight, range(weight.shape[0]))
        try:
            for block in blocks:
                _narrow(self._scaled(weight, block), self._dtype(weight), exact=self._is_exact_kind)
        except ValueError:
            return False
        return True

    def apply(self, weight: NDArray[Any], part: slice = ALL) -> NDArray[Any]:
        """The rows ``part`` of the changed weight.

        Args:
            weight: the whole tensor [out, in] or [out], uint16 (bf16 patterns), float16 or float32.
            part: consecutive rows of the result.
        Returns:
            A new array of the dtype of ``weight``: exact without matrices, with ``left`` rounded once from
            float64. With ``right`` it is float32, rounded once from float64.
        Raises:
            ValueError: another dtype, shapes that do not match, or a value that leaves the dtype's range: a
                finite one that would become infinite, or, without matrices, one that would lose bits.
        """
        wanted = range(weight.shape[0])[part]
        if wanted.step != 1:
            raise ValueError(f"part: got {part}, expected consecutive rows")
        dtype = self._dtype(weight)
        result = np.empty((len(wanted), *weight.shape[1:]), dtype)
        for block in self._blocks(weight, wanted):
            begin, end = max(block.start, wanted.start), min(block.stop, wanted.stop)
            kept = self._scaled(weight, block)[begin - block.start : end - block.start]
            result[begin - wanted.start : end - wanted.start] = _narrow(
                kept, dtype, exact=self._is_exact_kind
            )
        return result

    def _blocks(self, weight: NDArray[Any], wanted: range) -> list[slice]:
        """Blocks of rows that cover ``wanted``, all at multiples of ``BLOCK_ROWS``."""
        self._check(weight)
        rows = weight.shape[0]
        first = wanted.start // BLOCK_ROWS * BLOCK_ROWS
        return [slice(at, min(at + BLOCK_ROWS, rows)) for at in range(first, wanted.stop, BLOCK_ROWS)]

    def _scaled(self, weight: NDArray[Any], rows: slice) -> NDArray[np.float64]:
        """The changed rows before they are rounded."""
        if self.left is None:
            values = widen(weight[rows])
        else:
            values = self.left[rows].astype(np.float64) @ widen(weight)
        if self.right is not None:
            values = values @ self.right.astype(np.float64)
        if self.rows is not None:
            values = values * _powers(self.rows[rows]).reshape(-1, *(1,) * (weight.ndim - 1))
        if self.columns is not None:
            values = values * _powers(self.columns)
        return values

    def _dtype(self, weight: NDArray[Any]) -> np.dtype[Any]:
        return weight.dtype if self.right is None else np.dtype(np.float32)

    def _check(self, weight: NDArray[Any]) -> None:
        if weight.dtype not in (np.uint16, np.float16, np.float32):
            raise ValueError(
                f"weight: got dtype {weight.dtype}, expected uint16 (bf16 bit patterns), float16 or float32"
            )
        if weight.ndim not in (1, 2):
            raise ValueError(f"weight: got shape {weight.shape}, expected [out, in] or [out]")
        rows, columns = weight.shape[0], weight.shape[1] if weight.ndim == 2 else None
        parts = {
            "rows": (self.rows, (rows,)),
            "columns": (self.columns, (columns,)),
            "left": (self.left, (rows, rows)),
            "right": (self.right, (columns, columns)),
        }
        for name, (array, shape) in parts.items():
            if array is not None and array.shape != shape:
                raise ValueError(
                    f"weight: got shape {weight.shape}, which the fold's {name} of shape {array.shape} does "
                    f"not fit; was the fold made for another tensor?"
                )


def _powers(exponents: Exponents) -> NDArray[np.float64]:
    return np.ldexp(1.0, exponents.astype(np.int32))


def _sum(first: Exponents | None, second: Exponents | None) -> Exponents | None:
    if first is None or second is None:
        return second if first is None else first
    return exponents_of(first.astype(np.int16) + second)


def exponents_of(values: NDArray[np.integer[Any]]) -> Exponents:
    """``values`` as int8. Raises ValueError where they do not fit."""
    if values.size and (values.min() < -128 or values.max() > 127):
        raise ValueError(f"exponents: got {values.min()} to {values.max()}, expected -128 to 127")
    return values.astype(np.int8)


def _side(first: Matrix | None, second: Matrix | None, powers: Exponents | None, axis: int) -> Matrix | None:
    """The matrix of one side after both; ``powers`` stand between them. ``axis``: 0 is the left side."""
    if first is None or second is None:
        if second is None or powers is None:
            return first if second is None else second
        scale = _powers(powers)
        return (second * (scale if axis == 0 else scale[:, None])).astype(np.float32)
    raise ValueError("two folds have a matrix on one side of a weight; expected one")


def widen(weight: NDArray[Any]) -> NDArray[np.float64]:
    """The values of a weight; uint16 are bf16 patterns."""
    if weight.dtype == np.uint16:
        weight = (weight.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return weight.astype(np.float64)


def _narrow(values: NDArray[np.float64], dtype: np.dtype[Any], *, exact: bool) -> NDArray[Any]:
    """``values`` rounded once to ``dtype``; uint16 stands for bf16.

    Raises:
        ValueError: a finite value becomes infinite; with ``exact``, one changes at all.
    """
    with np.errstate(over="ignore", under="ignore"):
        result = bf16_of(values) if dtype == np.uint16 else values.astype(dtype)
    back = widen(result)
    lost = np.isfinite(values) & ((back != values) if exact else np.isinf(back))
    if lost.any():
        name = "bfloat16" if dtype == np.uint16 else dtype.name
        raise ValueError(
            f"{np.count_nonzero(lost):,} of {values.size:,} folded values leave the range of {name}, the "
            f"first is {values[lost][0]:.3g}; expected a fold that keeps them"
        )
    return result


def bf16_of(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    """float64 to bf16 bit patterns, rounded once to nearest even.

    By way of float32 rounded to odd: its 16 bits more keep which side of a midpoint a value is on (Boldo and
    Melquiond 2008, "Emulation of FMA and correctly rounded sums").
    """
    with np.errstate(over="ignore", under="ignore"):
        near = values.astype(np.float32)
    bits = near.view(np.uint32)
    inexact = near != values
    toward_zero = bits - (inexact & (np.abs(near) > np.abs(values)))
    odd = np.where(np.isnan(values), bits, toward_zero | inexact).astype(np.uint32)
    rounded = (odd + np.uint32(0x7FFF) + ((odd >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # rounding up would carry a NaN's payload into its sign
    result: NDArray[np.uint16] = np.where(
        np.isnan(values), (bits >> np.uint32(16)) | np.uint32(0x40), rounded
    ).astype(np.uint16)
    return result

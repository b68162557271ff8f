"""What the kernels share. Arrays are [in, rows]: rows of the weight are independent, and a vector's lanes."""

import numpy as np
from numpy.typing import NDArray

from nemoquant.formats import e2m1, e4m3
from nemoquant.formats.rounding import Codes, Floats
from nemoquant.solve.kernels import contracted_kernel, kernel

Steps = NDArray[np.int32]
"""Block scales of a trial: as wide as a float, so that choosing among both becomes vectors."""

ROWS = 512
"""Rows of the weight at a time: a block of all of them stays in the first-level cache."""

PANEL = 128
"""Inputs between two products of matrices: those do most of the work, and a panel fits in the second-level
cache."""

_encode_e2m1 = e2m1.encode_one
_nearest_e2m1 = e2m1.nearest
_encode_e4m3 = e4m3.encode_one
_value_e4m3 = e4m3.value_of


@contracted_kernel
def add_products(total: Floats, factors: Floats, rows: Floats) -> None:
    """``total[l] += sum_k factors[k] * rows[k, l]``; four at a time, for fewer loads and stores."""
    count = factors.shape[0]
    k = 0
    while k + 4 <= count:
        f0, f1, f2, f3 = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
        r0, r1, r2, r3 = rows[k], rows[k + 1], rows[k + 2], rows[k + 3]
        for lane in range(total.shape[0]):
            near = np.float32(f0 * r0[lane] + f1 * r1[lane])
            total[lane] = np.float32(
                total[lane] + np.float32(near + np.float32(f2 * r2[lane] + f3 * r3[lane]))
            )
        k += 4
    while k < count:
        f0, r0 = factors[k], rows[k]
        for lane in range(total.shape[0]):
            total[lane] = np.float32(total[lane] + f0 * r0[lane])
        k += 1


@kernel
def round_lanes(targets: Floats, scales: Floats, four: bool, codes: Codes, values: Floats) -> None:
    """The codes of ``e(fp32(target / scale))`` and what they decode to; all are [rows]."""
    if four:
        for lane in range(targets.shape[0]):
            quotient = np.float32(targets[lane] / scales[lane])
            codes[lane] = _encode_e2m1(quotient)
            magnitude = np.float32(_nearest_e2m1(np.float32(abs(quotient))) * scales[lane])
            values[lane] = -magnitude if quotient < np.float32(0) else magnitude
    else:
        for lane in range(targets.shape[0]):
            code = _encode_e4m3(np.float32(targets[lane] / scales[lane]))
            codes[lane] = code
            values[lane] = np.float32(_value_e4m3(code) * scales[lane])


@kernel
def nearest_lanes(targets: Floats, scales: Floats, four: bool, values: Floats) -> None:
    """The values of :func:`round_lanes` without the codes, which take longer: bytes among floats."""
    if four:
        for lane in range(targets.shape[0]):
            quotient = np.float32(targets[lane] / scales[lane])
            magnitude = np.float32(_nearest_e2m1(np.float32(abs(quotient))) * scales[lane])
            values[lane] = -magnitude if quotient < np.float32(0) else magnitude
    else:
        for lane in range(targets.shape[0]):
            code = _encode_e4m3(np.float32(targets[lane] / scales[lane]))
            values[lane] = np.float32(_value_e4m3(code) * scales[lane])


@kernel
def copy_lanes(source: Floats, target: Floats) -> None:
    """``target[:] = source``, which numba makes no vectors of."""
    for lane in range(source.shape[0]):
        target[lane] = source[lane]


@kernel
def look_up(table: Floats, codes: Codes | Steps, numbers: Floats) -> None:
    """``numbers[l] = table[codes[l]]``."""
    for lane in range(codes.shape[0]):
        numbers[lane] = table[codes[lane]]


@kernel
def neighbours(own: Steps, step: int, first: int, last: int, tried: Steps) -> None:
    """``tried = own + step``, within first and last; all are [rows]."""
    for lane in range(own.shape[0]):
        tried[lane] = min(max(np.int32(own[lane] + np.int32(step)), np.int32(first)), np.int32(last))

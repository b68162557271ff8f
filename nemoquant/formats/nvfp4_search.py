"""The exact search for the block scales with the least error.

fp32 estimates with a proven bound exclude most scales; the few that remain are compared in float64.

The error E(d) of a block under scale d is by definition a float64 sum in index order. The estimate uses
``m * (1 / d)`` instead of ``m / d``, so near a midpoint it may choose the other neighbour, and it adds up in
fp32. With u = 2^-24, and t the difference of one value:

    quotient      off by 2 u at most, and the definition's by u: near a midpoint, which is at most 5, t
                  changes by at most 20 u d
    difference    code * d rounds by up to 6 u d, the subtraction by u t
    square, sum   17 u E

    |estimate - E| <= sum of 2 |t| (26.1 u d + u |t|) + 17 u E
                   <= 209 u d sqrt(E) + 19 u E <= 105 u d^2 + 124 u E

because the sum of 16 |t| is at most 4 sqrt(E). ``_SLACK = 256 u`` times (d^2 + the estimate) is at least
twice that bound. It also bounds the distance from F(d), the error in exact arithmetic with each value at its
nearest code. So a scale cannot win if its estimate minus its slack exceeds another's estimate plus slack.

Values and scales are multiplied by one power of two, which follows from the global scale and keeps squares
from underflow and overflow. Where they overflow nevertheless, they are Inf or NaN, and exclude no scale.
"""

import numpy as np
from numpy.typing import NDArray

from nemoquant.formats import e2m1, e4m3
from nemoquant.formats.blocks import Bits, Halves, Words, spread, twice
from nemoquant.formats.nvfp4_blocks import BLOCK, TILE, scale_codes
from nemoquant.formats.rounding import (
    SMALLEST_NORMAL,
    Codes,
    Floats,
    bits_of,
    contracted_kernel,
    float_of,
    kernel,
    widen,
)

Doubles = NDArray[np.float64]

_E4M3 = e4m3.VALUES
_ONE = e4m3.ONE
_SMALLEST = np.float32(e4m3.SMALLEST)
_LAST = e4m3.LARGEST_CODE  # 126: the codes 1 to 126 are the positive finite values, in ascending order
_nearest_e2m1 = e2m1.nearest

_BELOW = 5  # how many scales of the window are below the scale of method max
_WINDOW = 32  # scales in the window
_LANES = 16  # float32 numbers in a vector
# Block scales tried at once in float64, one vector; also how many codes later the E4M3 value has doubled.
_STEP = 8
_SLACK = np.float32(2.0**-16)
_ANCHOR = np.uint32(22 << 23)  # added to float32 bits, it multiplies by 2^22


# Estimates.


@kernel
def _unit(global_scale: np.float32) -> np.float32:
    """The power of two that brings the global scale to [1, 2).

    Near that interval, where the power would not be a normal float32.
    """
    exponent = min(max(np.uint32(bits_of(global_scale) >> np.uint32(23)), np.uint32(1)), np.uint32(253))
    return float_of(np.uint32(np.uint32(np.uint32(254) - exponent) << np.uint32(23)))


@kernel
def _scales(global_scale: np.float32, unit: np.float32, scales: Floats, table: Floats) -> None:
    """Fill both tables of E4M3 codes.

    ``scales`` [127] holds d; ``table`` [3, 127] holds, in units, d, 1 / d and the slack that d adds.
    """
    for code in range(_LAST + 1):
        scales[code] = np.float32(_E4M3[code] * global_scale)
        scale = np.float32(np.float64(scales[code]) * np.float64(unit))
        table[0, code] = scale
        table[1, code] = np.float32(1) / scale
        table[2, code] = np.float32(np.float32(scale * scale) * _SLACK)


@kernel
def _values(bits: Bits, shift: np.uint32, unit: np.float32, values: Floats) -> None:
    """Flat magnitudes, in units."""
    for i in range(bits.shape[0]):
        values[i] = np.float32(abs(widen(bits[i], shift)) * unit)


@contracted_kernel
def _square(value: np.float32, reciprocal: np.float32, scale: np.float32) -> np.float32:
    """The squared error of one magnitude, estimated.

    The anchor is that of ``e2m1.nearest``, here computed from the exponent.
    """
    quotient = np.float32(value * reciprocal)
    quotient = quotient if quotient < np.float32(6) else np.float32(6)
    binade = np.uint32(max(bits_of(quotient), np.uint32(0x3F800000)) & np.uint32(0x7F800000))
    anchor = float_of(np.uint32(binade + _ANCHOR))
    code = np.float32(np.float32(quotient + anchor) - anchor)
    difference = np.float32(value - code * scale)
    return np.float32(difference * difference)


@contracted_kernel
def _bounds(values: Floats, firsts: Codes, table: Floats, lower: Floats, upper: Floats) -> None:
    """Bounds of block b's error with scale ``firsts[b] + k`` in row b, column k of ``lower`` and ``upper``.

    The scales are the vector's lanes, and the loop over the block is unrolled. ``table`` as in ``_scales``;
    ``lower`` and ``upper``, [2 n, 16], have two rows per block, because LLVM vectorizes well for exactly 16.
    """
    for row in range(2 * firsts.shape[0]):
        b, first = row >> 1, firsts[row >> 1] + ((row & 1) << 4)
        for k in range(_LANES):
            scale, reciprocal, error = table[0, first + k], table[1, first + k], np.float32(0)
            for i in range(BLOCK):
                error = np.float32(error + _square(values[b, i], reciprocal, scale))
            slack = np.float32(error * _SLACK + table[2, first + k])
            lower[row, k], upper[row, k] = np.float32(error - slack), np.float32(error + slack)


@kernel
def _smaller_of_pairs(pairs: Words, smaller: Halves) -> None:
    for i in range(smaller.shape[0]):
        smaller[i] = min(np.uint32(pairs[i] & np.uint64(0xFFFFFFFF)), np.uint32(pairs[i] >> np.uint64(32)))


@kernel
def _least(pairs: Words, words: Words, least: Halves) -> None:
    """The least of each block's 32 numbers, compared by their bits.

    The numbers are not negative, or they are NaN, which counts as large.

    Args:
        pairs: [16 n], the numbers in pairs.
        words: scratch [16 n].
        least: [n].
    """
    n, middle = least.shape[0], words.shape[0] // 2
    halves = words.view(np.uint32)
    _smaller_of_pairs(pairs, halves[: 16 * n])
    _smaller_of_pairs(words[: 8 * n], halves[2 * middle : 2 * middle + 8 * n])
    _smaller_of_pairs(words[middle : middle + 4 * n], halves[: 4 * n])
    _smaller_of_pairs(words[: 2 * n], halves[2 * middle : 2 * middle + 2 * n])
    _smaller_of_pairs(words[middle : middle + n], least)


@kernel
def _winners(
    lower: Floats, ceilings: Halves, doubled: Words, scratch: Words, limits: Words, wins: Codes
) -> None:
    """``wins[32 b + k]`` = 1 where scale k of block b can win, else 0.

    It can where its lower bound does not exceed the block's least upper bound, and where either is NaN.
    """
    twice(ceilings, doubled)
    spread(doubled.view(np.uint32), scratch, limits)
    limit = limits.view(np.float32)
    for k in range(wins.shape[0]):
        wins[k] = np.uint8(0) if lower[k] > limit[k] else np.uint8(1)


# The definition, in float64.


@kernel
def _errors(magnitudes: Floats, scales: Floats, errors: Doubles) -> None:
    """``errors[k]`` = the error of a block with ``scales[k]``, exactly as defined.

    Signs do not matter, because rounding is symmetric. The scales are the vector's lanes (the loop over the
    block is unrolled), so each lane keeps the order of its sum.
    """
    for k in range(scales.shape[0]):
        scale = scales[k]
        error = np.float64(0)
        for i in range(BLOCK):
            code = _nearest_e2m1(np.float32(magnitudes[i] / scale))
            difference = np.float64(magnitudes[i]) - np.float64(code) * np.float64(scale)
            error += difference * difference
        errors[k] = error


@kernel
def _error_below(magnitudes: Floats, scale: np.float32) -> np.float64:
    """A lower bound of the error of this scale *and of every larger one*.

    A magnitude of at most d / 4 rounds to zero, and its error is its square. The full sum has these terms
    too, in the same order, and rounded addition is monotone: leaving out the other terms cannot make the sum
    larger, not even by one bit.
    """
    quarter = np.float64(0.25) * np.float64(scale)
    error = np.float64(0)
    for i in range(BLOCK):
        magnitude = np.float64(magnitudes[i])
        error += magnitude * magnitude if magnitude <= quarter else np.float64(0)
    return error


@kernel
def _search(magnitudes: Floats, amax: np.float32, center: int, scales: Floats, errors: Doubles) -> np.uint8:
    """The E4M3 code with the least error of all 126; ties to the smaller.

    ``scales[code]`` is d, ``center`` the code of method max. The search goes outwards from the center, a
    vector of codes at a time, and stops in each direction where a bound proves that no further scale can win.
    Downwards, the largest value is clipped and alone costs (amax - 6 d)^2, more with every smaller d;
    upwards, the bound is ``_error_below``. A smaller scale wins ties, hence ``>`` downwards and ``>=``
    upwards.
    """
    first = max(center - 3, 1)
    last = min(first + _STEP - 1, _LAST)
    best, least = first, np.float64(np.inf)
    _errors(magnitudes, scales[first : last + 1], errors)
    for k in range(last + 1 - first):
        better = errors[k] < least
        best, least = (first + k if better else best), (errors[k] if better else least)

    while first > 1:
        high = first - 1
        clipped = np.float64(amax) - np.float64(6) * np.float64(scales[high])
        if clipped > np.float64(0) and clipped * clipped > least:
            break
        first = max(high - _STEP + 1, 1)
        _errors(magnitudes, scales[first : high + 1], errors)
        for k in range(high - first, -1, -1):
            better = errors[k] <= least
            best, least = (first + k if better else best), (errors[k] if better else least)

    while last < _LAST:
        low = last + 1
        if _error_below(magnitudes, scales[low]) >= least:
            break
        last = min(low + _STEP - 1, _LAST)
        _errors(magnitudes, scales[low : last + 1], errors)
        for k in range(last + 1 - low):
            better = errors[k] < least
            best, least = (low + k if better else best), (errors[k] if better else least)
    return np.uint8(best)


# The choices.


@kernel
def _proven(
    first: int, upper: np.uint64, amax: np.float32, ceiling: np.float32, scales: Floats, unit: np.float32
) -> bool:
    """Whether no scale outside a window can win.

    ``upper``: the flags of ``_winners`` for the window's upper eight scales, one byte each; ``ceiling``: the
    block's least upper bound, in units.

    Below the window, amax is clipped and alone costs (amax - 6 d)^2, more with every smaller d.

    Above the window, amax is below 3.5 d, so no value becomes more than 3 d. But 0, 0.5, 1, 1.5, 2 and 3
    times d are also E2M1 values times d / 2, the scale eight codes before, and so F(d) >= F(d / 2). If none
    of the window's upper eight scales can win, none above can.
    """
    if first > 1:
        clipped = (np.float64(amax) - np.float64(6) * np.float64(scales[first - 1])) * np.float64(unit)
        if not (clipped > np.float64(0) and clipped * clipped > np.float64(ceiling)):
            return False
    return upper == np.uint64(0) or first + _WINDOW > _LAST


@kernel
def _least_of(magnitudes: Floats, first: int, wins: Codes, scales: Floats, errors: Doubles) -> np.uint8:
    """The code with the least error among those of a window whose flag is set; ties to the smaller."""
    best, least = first, np.float64(np.inf)
    for k in range(_WINDOW):
        if wins[k] != 0:
            _errors(magnitudes, scales[first + k : first + k + 1], errors)
            best, least = (first + k, errors[0]) if errors[0] < least else (best, least)
    return np.uint8(best)


@kernel
def choose_least_error(
    bits: Bits, shift: np.uint32, largest: Bits, global_scale: np.float32, codes: Codes
) -> None:
    """``codes[b]`` = the block scale of block b by method mse.

    Args:
        bits: [n, 16], patterns of the weight.
        largest: [n], the pattern of each block's largest magnitude.
        codes: [n]; on entry the block scales of method max.
    """
    scales, table = np.empty(_LAST + 1, np.float32), np.empty((3, _LAST + 1), np.float32)
    unit = _unit(global_scale)
    _scales(global_scale, unit, scales, table)
    # Below the normal numbers d is rounded, and is not twice the d of eight codes before.
    doubles = scales[_STEP] >= SMALLEST_NORMAL

    values, firsts, ceilings = (
        np.empty(TILE * BLOCK, np.float32),
        np.empty(TILE, np.uint8),
        np.empty(TILE, np.float32),
    )
    lower, upper = np.empty((2 * TILE, _LANES), np.float32), np.empty((2 * TILE, _LANES), np.float32)
    scratch, doubled, wins = (
        np.empty(TILE * _LANES, np.uint64),
        np.empty(TILE, np.uint64),
        np.empty(TILE * _WINDOW, np.uint8),
    )
    pairs, least, words = (
        upper.view(np.uint64).reshape(-1),
        ceilings.view(np.uint32),
        wins.view(np.uint64).reshape(-1, 4),
    )
    magnitudes, errors = np.empty(BLOCK, np.float32), np.empty(_STEP, np.float64)

    for start in range(0, codes.shape[0], TILE):
        n = min(TILE, codes.shape[0] - start)
        _values(bits[start : start + n].reshape(-1), shift, unit, values[: n * BLOCK])
        for b in range(n):
            firsts[b] = min(max(int(codes[start + b]) - _BELOW, 1), _LAST + 1 - _WINDOW)
        _bounds(values.reshape(-1, BLOCK), firsts[:n], table, lower, upper)
        _least(pairs[: n * _LANES], scratch, least[:n])
        # The limits are written to pairs, the memory of upper, which is no longer needed.
        _winners(lower.reshape(-1), least[:n], doubled[:n], scratch, pairs, wins[: n * _WINDOW])

        for b in range(n):
            if largest[start + b] == 0:
                continue
            amax, first = widen(largest[start + b], shift), int(firsts[b])
            count, place = np.uint64(0), np.uint64(0)
            # Flags are bytes: the products bring their sum, and the place of a single one, to the upper byte.
            for w in range(4):
                count += np.uint64(np.uint64(words[b, w] * np.uint64(0x0101010101010101)) >> np.uint64(56))
                place += np.uint64(np.uint64(words[b, w] * np.uint64(0x0001020304050607)) >> np.uint64(56))
                place += np.uint64(8 * w) if words[b, w] != 0 else np.uint64(0)
            proven = doubles and _proven(first, words[b, 3], amax, ceilings[b], scales, unit)
            if proven and count == np.uint64(1):
                codes[start + b] = np.uint8(first + int(place))
            else:
                for i in range(BLOCK):
                    magnitudes[i] = abs(widen(bits[start + b, i], shift))
                if proven:
                    codes[start + b] = _least_of(
                        magnitudes, first, wins[b * _WINDOW : (b + 1) * _WINDOW], scales, errors
                    )
                else:
                    codes[start + b] = _search(magnitudes, amax, int(codes[start + b]), scales, errors)


@kernel
def _look_up(row: Floats, codes: Codes, numbers: Floats) -> None:
    """``numbers[b] = row[codes[b]]``."""
    for b in range(codes.shape[0]):
        numbers[b] = row[codes[b]]


@contracted_kernel
def _squares(values: Floats, reciprocals: Floats, scales: Floats, squares: Floats) -> None:
    """The estimated squared errors of flat magnitudes, each with its own scale: one long loop for vectors."""
    for i in range(squares.shape[0]):
        squares[i] = _square(values[i], reciprocals[i], scales[i])


@kernel
def _sums_of_pairs(pairs: Words, sums: Floats) -> None:
    for i in range(sums.shape[0]):
        low, high = (
            float_of(np.uint32(pairs[i] & np.uint64(0xFFFFFFFF))),
            float_of(np.uint32(pairs[i] >> np.uint64(32))),
        )
        sums[i] = np.float32(low + high)


@kernel
def _sums(pairs: Words, words: Words, sums: Floats) -> None:
    """The sum of each block's 16 numbers.

    ``pairs`` [8 n] holds the numbers in pairs; ``words`` [8 n] is scratch; ``sums`` [n].
    """
    n, middle = sums.shape[0], words.shape[0] // 2
    floats = words.view(np.float32)
    _sums_of_pairs(pairs, floats[: 8 * n])
    _sums_of_pairs(words[: 4 * n], floats[2 * middle : 2 * middle + 4 * n])
    _sums_of_pairs(words[middle : middle + 2 * n], floats[: 2 * n])
    _sums_of_pairs(words[:n], sums)


@kernel
def choose_four_over_six(
    bits: Bits, shift: np.uint32, largest: Bits, global_scale: np.float32, codes: Codes
) -> None:
    """``codes[b]`` = the block scale of block b by method four_over_six.

    On entry it is the scale for M = 6; the one for M = 4 replaces it where that has less error. Arguments as
    in ``choose_least_error``.
    """
    scales, table = np.empty(_LAST + 1, np.float32), np.empty((3, _LAST + 1), np.float32)
    unit = _unit(global_scale)
    _scales(global_scale, unit, scales, table)
    onto = np.float32(np.float32(6) * global_scale)

    values, squares = np.empty(TILE * BLOCK, np.float32), np.empty(TILE * BLOCK, np.float32)
    lanes, reciprocals = np.empty(TILE * BLOCK, np.float32), np.empty(TILE * BLOCK, np.float32)
    pairs, scratch, fours = (
        squares.view(np.uint64),
        np.empty(TILE * BLOCK // 2, np.uint64),
        np.empty(TILE, np.uint8),
    )
    error_six, error_four = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    magnitudes, errors, pair = np.empty(BLOCK, np.float32), np.empty(2, np.float64), np.empty(2, np.float32)

    for start in range(0, codes.shape[0], TILE):
        n = min(TILE, codes.shape[0] - start)
        sixes = codes[start : start + n]
        _values(bits[start : start + n].reshape(-1), shift, unit, values[: n * BLOCK])
        scale_codes(
            largest[start : start + n],
            shift,
            np.float32(1.5),
            onto=onto,
            least=_SMALLEST,
            zeros=np.uint8(_ONE),
            codes=fours,
        )
        for choice, sums in ((sixes, error_six), (fours[:n], error_four)):
            for row, spread_row in ((table[0], lanes), (table[1], reciprocals)):
                _look_up(row, choice, sums)
                spread(sums[:n].view(np.uint32), scratch, spread_row.view(np.uint64))
            _squares(values, reciprocals, lanes, squares[: n * BLOCK])
            _sums(pairs[: n * BLOCK // 2], scratch, sums[:n])
        for b in range(n):
            six, four = sixes[b], fours[b]
            slack_six = np.float32(error_six[b] * _SLACK + table[2, six])
            slack_four = np.float32(error_four[b] * _SLACK + table[2, four])
            if np.float32(error_four[b] - slack_four) > np.float32(error_six[b] + slack_six):
                continue
            if np.float32(error_four[b] + slack_four) < np.float32(error_six[b] - slack_six):
                sixes[b] = four
                continue
            for i in range(BLOCK):
                magnitudes[i] = abs(widen(bits[start + b, i], shift))
            pair[0], pair[1] = scales[six], scales[four]
            _errors(magnitudes, pair, errors)
            sixes[b] = four if errors[1] < errors[0] else six

"""Largest magnitudes of blocks, and numbers repeated for each element of one, in loops that become vectors.

Magnitudes are compared as bit patterns, which keep their order: Inf is above all numbers, NaN above Inf.
"""

import numpy as np
from numpy.typing import NDArray

from nemoquant.formats.rounding import kernel

Bits = NDArray[np.unsignedinteger]
Halves = NDArray[np.uint32]
Words = NDArray[np.uint64]

# By dtype of a pattern: the word that holds the patterns of two elements.
PAIR = {np.dtype(np.uint16): np.uint32, np.dtype(np.uint32): np.uint64}


@kernel
def larger_of_pairs(pairs: Bits, larger: Bits) -> None:
    """``larger[i]`` = the larger magnitude of the two patterns in the word ``pairs[i]``."""
    word, part = pairs.dtype.type, larger.dtype.type
    width = word(8 * larger.itemsize)
    mask = word((word(1) << word(width - word(1))) - word(1))
    for i in range(larger.shape[0]):
        low = word(pairs[i] & mask)
        high = word(word(pairs[i] >> width) & mask)
        larger[i] = part(max(low, high))


@kernel
def largest(pairs: Bits, words: Bits, scratch: Bits, magnitudes: Bits) -> None:
    """``magnitudes[b]`` = the pattern of the largest magnitude of block b, of 16 elements.

    In four steps, each of which keeps the larger of two. Integers are compared: with floats, NaN would make
    the order matter, and the loop would not become vectors.

    Args:
        pairs: [8 n] words of two elements, of n blocks.
        words, scratch: [>= 8 n] of the pairs' dtype, and the same memory as single elements.
        magnitudes: [n], of the elements' dtype.
    """
    n = magnitudes.shape[0]
    larger_of_pairs(pairs, scratch[: 8 * n])
    half = scratch.shape[0] // 2
    larger_of_pairs(words[: 4 * n], scratch[half : half + 4 * n])
    larger_of_pairs(words[half // 2 : half // 2 + 2 * n], scratch[: 2 * n])
    larger_of_pairs(words[:n], magnitudes)


@kernel
def twice(numbers: Halves, pairs: Words) -> None:
    """Write each number two times."""
    for i in range(pairs.shape[0]):
        number = np.uint64(numbers[i])
        pairs[i] = np.uint64(number | np.uint64(number << np.uint64(32)))


@kernel
def spread(numbers: Halves, scratch: Words, pairs: Words) -> None:
    """Write each of [n] numbers 16 times, by doubling four times, so that all loops become vectors.

    ``scratch`` [>= 4 n], ``pairs`` [>= 8 n].
    """
    n = numbers.shape[0]
    twice(numbers, scratch[:n])
    twice(scratch.view(np.uint32)[: 2 * n], pairs[: 2 * n])
    twice(pairs.view(np.uint32)[: 4 * n], scratch[: 4 * n])
    twice(scratch.view(np.uint32)[: 8 * n], pairs[: 8 * n])

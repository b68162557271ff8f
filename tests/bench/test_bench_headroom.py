"""What bench.headroom says of inputs and of generated text, and which rows bench.enough takes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.enough import unlike
from bench.headroom import Blocks, loops, repeated


def test_repeated_4_grams():
    assert repeated(np.arange(100)) == 0
    assert repeated(np.array([1, 2, 3, 4, 5, 1, 2, 3, 4])) == pytest.approx(1 / 6)
    assert repeated(np.zeros(103, np.int64)) == 0.99


@pytest.mark.parametrize(("period", "found"), [(1, True), (3, True), (42, True), (43, False)])
def test_a_loop_is_what_repeats_three_times(period, found):
    beginning, end = np.arange(1000, 1400), np.resize(np.arange(period), 128)
    assert loops(np.concatenate([beginning, end])) is found


def test_text_that_only_quotes_itself_once_is_no_loop():
    assert not loops(np.concatenate([np.arange(300), np.arange(64), np.arange(100)]))


def test_blocks_beyond_what_a_scale_can_hold_are_counted():
    """With the input scale 1 a block holds 6 x 448; its own scale is a sixth of its largest value."""
    largest = torch.tensor([2688.0, 2689, 6 * 2**-6, 6 * 2**-6.1, 6 * 2**-10, 6 * 2**-9.9, 0])
    x = torch.zeros(7, 16)
    x[:, 5] = -largest
    opened = SimpleNamespace(
        inputs={"four": ("nvfp4", np.float32(1)), "eight": ("fp8", np.float32(1))},
        tap=lambda: lambda name, x: x + (name == "four"),
    )
    blocks = Blocks(opened)
    assert torch.equal(blocks.tap("four", x), x + 1)
    for name in ("eight", "none"):
        assert torch.equal(blocks.tap(name, x), x)
    assert blocks.json() == {
        "saturated": 1 / 6,
        "small": 3 / 6,
        "zeroed": 1 / 6,
        "reach": pytest.approx(2689 / 2688),
    }


def test_rows_that_are_in_the_other_text_are_left_out():
    known = np.arange(4096).reshape(8, 512)
    other = np.arange(10_000, 10_512)
    mixed = np.concatenate([other[:300], known[0, :212]])
    assert unlike(np.stack([known[3], other, mixed]), known).tolist() == [other.tolist()]

"""Reading and writing sizes and durations."""

import click
import pytest

from nemoquant.cli.shared import Bytes
from nemoquant.units import duration, size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4G", 4e9),
        ("4GB", 4e9),
        ("500M", 5e8),
        ("1.5g", 1.5e9),
        ("2GiB", 2**31),
        ("1000", 1000),
        ("2 TB", 2e12),
        ("64k", 64e3),
    ],
)
def test_sizes(text, count):
    assert Bytes().convert(text, None, None) == count


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "4X", "4Gb", "1e9", "4 G B"])
def test_sizes_that_are_none(text):
    with pytest.raises(click.BadParameter, match="is no size; expected one such as 4G, 500M or 2GiB"):
        Bytes().convert(text, None, None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 0 s"), (200.4, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("count", [0, 999, 1000, 1_500_000, 5 * 10**9, 247_222_108_160, 2 * 10**12])
def test_sizes_for_people(count):
    shown = {
        0: "0 B",
        999: "999 B",
        1000: "1.00 kB",
        1_500_000: "1.50 MB",
        5 * 10**9: "5.00 GB",
        247_222_108_160: "247.22 GB",
        2 * 10**12: "2.00 TB",
    }
    assert size(count) == shown[count]

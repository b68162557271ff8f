"""Where shards end: after whole units, at most at their limit; a unit above the limit gets its own shard."""

import pytest

from nemoquant.api import plan
from nemoquant.pack.shards import shards, units


@pytest.fixture
def made(source):
    return plan(source, "nvfp4")


def files(plan, limit):
    return [len(shard.units) for shard in shards(plan, limit)]


def test_a_shard_exactly_at_its_limit_is_not_cut(made):
    """With a limit one byte lower, the last unit begins the next shard."""
    sizes = [unit.nbytes for unit in units(made)]
    whole = sum(sizes)
    assert files(made, whole) == [len(sizes)]
    assert files(made, whole - 1) == [len(sizes) - 1, 1]
    two = sizes[0] + sizes[1]
    assert files(made, two)[0] == 2
    assert files(made, two - 1)[0] == 1


def test_a_unit_beyond_the_limit_has_a_shard_of_its_own(made):
    sizes = [unit.nbytes for unit in units(made)]
    assert files(made, 1) == [1] * len(sizes)
    found = shards(made, max(sizes) - 1)
    beyond = [shard for shard in found if any(unit.nbytes == max(sizes) for unit in shard.units)]
    assert len(beyond) == sizes.count(max(sizes))
    assert all(len(shard.units) == 1 for shard in beyond)


def test_nothing_is_lost_and_names_count(made):
    for limit in (1, 10_000, 100_000, 10**9):
        found = shards(made, limit)
        assert [unit for shard in found for unit in shard.units] == list(units(made))
        assert [shard.file for shard in found] == [
            f"model-{i:05d}-of-{len(found):05d}.safetensors" for i in range(1, len(found) + 1)
        ]
        assert all(
            len(shard.units) == 1 or sum(unit.nbytes for unit in shard.units) <= limit for shard in found
        )

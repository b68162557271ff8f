"""Whether a source is the one that an earlier run read: its bytes are read and hashed again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock

from nemoquant.checkpoint.identity import (
    Ahead,
    Units,
    calibrated_groups,
    differing,
    hash_units,
    told,
    units_of,
)
from nemoquant.errors import UsageError
from nemoquant.progress import Progress
from nemoquant.sources.source import Source
from nemoquant.units import size


def check(
    source: Source,
    folder: Path,
    expected: Mapping[str, str],
    threads: int,
    *,
    say: Callable[[str], None],
    progress: Progress,
) -> None:
    """Read again what is in ``folder``, of an earlier run, was made from: it must be of this source.

    Args:
        expected: hashes of the units that the earlier run read.
        say: told how much is read.
    Raises:
        UsageError: names the units that differ.
    """
    units = {name: tensors for name, tensors in _units(source).items() if name in expected}
    say(f"hashing {size(_bytes(source, units))} of {source.path} again, which it was made from")
    changed = differing(expected, _hash(source, units, threads, progress))
    if changed:
        raise UsageError(
            f"{folder} was begun with other weights than {source.path} has now: "
            f"{told(changed, len(expected))}; give the source that it was begun with, or remove the folder "
            f"and begin again"
        )


@contextmanager
def hashing_rest(
    source: Source, known: Mapping[str, str], say: Callable[[str], None]
) -> Iterator[Callable[[], Units]]:
    """Hashes all units that ``known`` lacks in a thread, for a cluster, whose nodes read their own copies.

    Yields what waits for them and returns them.

    Args:
        say: told how much is read.
    """
    units = {name: tensors for name, tensors in _units(source).items() if name not in known}
    say(f"hashing {size(_bytes(source, units))} of {source.path} meanwhile, for the nodes to be held against")
    tensors = [tensor for unit in units.values() for tensor in unit]
    with Ahead(source.checkpoint, {"rest": tensors}) as ahead:
        ahead.begin("rest")
        yield partial(ahead.take, "rest")


def of_other_weights(source: Source, scales: Mapping[str, str], units: Mapping[str, str]) -> str | None:
    """Where scales were calibrated on other weights than these, which, in words.

    Args:
        scales: hashes of the units that were calibrated.
        units: hashes of all units of the source.
    """
    groups = calibrated_groups(source.table).values()
    wanted = units_of(tensor for group in groups for tensor in group)
    changed = [name for name in wanted if scales.get(name) != units[name]]
    return told(changed, len(wanted)) if changed else None


def _hash(source: Source, units: Mapping[str, list[str]], threads: int, progress: Progress) -> Units:
    done, total, counting = 0, _bytes(source, units), Lock()

    def count(nbytes: int) -> None:
        nonlocal done
        with counting:
            done += nbytes
            progress("hash", done, total, "")

    hashes = hash_units(source.checkpoint, units, threads, count)
    source.checkpoint.check_unchanged()
    return hashes


def _bytes(source: Source, units: Mapping[str, list[str]]) -> int:
    return sum(source.checkpoint.tensors[tensor].nbytes for unit in units.values() for tensor in unit)


def _units(source: Source) -> dict[str, list[str]]:
    return units_of(spec.name for spec in source.table)

"""Whether a source is the one that an earlier run read: its bytes are read and hashed again."""

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock

from nemoquant.checkpoint.identity import Units, differing, hash_units, told, units_of
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


def hash_rest(
    source: Source,
    known: Mapping[str, str],
    threads: int,
    *,
    say: Callable[[str], None],
    progress: Progress,
) -> Units:
    """Hashes of all units that ``known`` lacks, for a cluster, whose nodes read their own copies.

    Args:
        say: told how much is read.
    """
    units = {name: tensors for name, tensors in _units(source).items() if name not in known}
    say(f"hashing {size(_bytes(source, units))} of {source.path}, for the nodes to be held against")
    return _hash(source, units, threads, progress)


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

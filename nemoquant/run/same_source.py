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
    checkpoint = source.checkpoint
    units = {name: tensors for name, tensors in _units(source).items() if name in expected}
    total = sum(checkpoint.tensors[tensor].nbytes for unit in units.values() for tensor in unit)
    say(f"hashing {size(total)} of {source.path} again, which it was made from")
    done, counting = 0, Lock()

    def count(nbytes: int) -> None:
        nonlocal done
        with counting:
            done += nbytes
            progress("hash", done, total, "")

    changed = differing(expected, hash_units(checkpoint, units, threads, count))
    checkpoint.check_unchanged()
    if changed:
        raise UsageError(
            f"{folder} was begun with other weights than {source.path} has now: "
            f"{told(changed, len(expected))}; give the source that it was begun with, or remove the folder "
            f"and begin again"
        )


def hash_rest(source: Source, known: Mapping[str, str], threads: int) -> Units:
    """Hashes of all units that ``known`` lacks."""
    units = {name: tensors for name, tensors in _units(source).items() if name not in known}
    return hash_units(source.checkpoint, units, threads)


def _units(source: Source) -> dict[str, list[str]]:
    return units_of(spec.name for spec in source.table)

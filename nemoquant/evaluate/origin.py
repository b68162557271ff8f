"""Whether candidates and a reference cache were made from this very source, byte for byte.

The source is hashed layer by layer while the diff computes on it, and compared with the hashes that the
others have.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from nemoquant.checkpoint.identity import Ahead, Units, differing, source_groups, told
from nemoquant.errors import CheckpointError
from nemoquant.evaluate.candidate import CandidateCheckpoint
from nemoquant.sources.source import Source


class Origin:
    """Hashes a source in step with a diff. Use as a context manager.

    Attributes:
        units: hashes of the units that the diff has come past.
    """

    def __init__(self, source: Source, candidates: Iterable[CandidateCheckpoint], *, always: bool) -> None:
        """Hash nothing where no candidate has hashes to compare with, unless ``always``."""
        self._source = source
        self._candidates = [candidate for candidate in candidates if candidate.manifest is not None]
        self._groups = source_groups(source.table) if self._candidates or always else {}
        self._ahead = Ahead(source.checkpoint, self._groups)
        self._cached: tuple[Path, Mapping[str, str]] | None = None
        self.units: Units = {}

    def of_cache(self, cache: Path, units: Mapping[str, str]) -> None:
        """Compare with the hashes in a reference cache too."""
        self._cached = cache, units

    def begin(self, key: int | str) -> None:
        """Start hashing a group of tensors, see ``identity.source_groups``."""
        if key in self._groups:
            self._ahead.begin(key)

    def passed(self, *keys: int | str) -> None:
        """These groups, whose reading has begun, must be those that everything else was made from.

        Raises:
            CheckpointError: names what was made from another source, and the units that differ.
        """
        for key in keys:
            if key in self._groups:
                self.units |= self._ahead.take(key)
        self.check_unchanged()
        if self._cached is not None:
            cache, units = self._cached
            self._compare(
                str(cache),
                units,
                "expected a reference cache of this source, give another file or remove this one",
            )
        for candidate in self._candidates:
            assert candidate.manifest is not None
            self._compare(
                str(candidate.path),
                candidate.manifest["source"]["units"],
                "give the source that it was made from",
            )

    def check_unchanged(self) -> None:
        """What was read and hashed so far is of the files that were opened, of the source and of candidates.

        Raises:
            SourceChangedError: names the file.
        """
        self._source.checkpoint.check_unchanged()
        for candidate in self._candidates:
            candidate.checkpoint.check_unchanged()

    def _compare(self, what: str, units: Mapping[str, str], advice: str) -> None:
        changed = differing(units, self.units)
        if changed:
            raise CheckpointError(
                f"{what} was made from another source than {self._source.path}: "
                f"{told(changed, len(self.units))}; {advice}"
            )

    def __enter__(self) -> "Origin":
        return self

    def __exit__(self, *error: object) -> None:
        self._ahead.__exit__(*error)

"""What a conversion gives back; a file of its own, because the rest of the room is slow to load."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nemoquant.converting import Target
from nemoquant.notebook import html_table
from nemoquant.units import size


@dataclass(frozen=True, repr=False)
class Converted:
    """Result of ``convert``.

    Attributes:
        out: the new folder.
        to: what it was converted to.
        layout: the layout of the checkpoint that was converted.
        tensors: how many were written.
        bytes_in, bytes_out: bytes of tensors, before and after.
        decoded: number of weights that were decoded, by their format; empty where codes stay.
        notes: what changed in the numbers, one sentence each.
        warnings: one sentence each.
        verified: counts of what was checked before ``out`` got its name; empty in a dry run.
        skipped_files: files of the source that were not copied.
    """

    out: Path
    to: Target
    layout: str
    tensors: int
    bytes_in: int
    bytes_out: int
    decoded: Mapping[str, int]
    notes: list[str]
    warnings: list[str]
    verified: dict[str, int]
    skipped_files: list[str] = field(default_factory=list)

    def _summary(self) -> str:
        return f"{self.to}, {size(self.bytes_in)} -> {size(self.bytes_out)} of tensors"

    def __repr__(self) -> str:
        return f"Converted({str(self.out)!r}: {self._summary()})"

    def _repr_html_(self) -> str:
        rows = [("changed", text) for text in self.notes] + [("warning", text) for text in self.warnings]
        return html_table(f"{self.out}: {self._summary()}", (), rows)

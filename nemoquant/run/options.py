"""What a quantize run can be told, as data."""

import os
from dataclasses import dataclass

from nemoquant.errors import UsageError
from nemoquant.formats import Device

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate on, and how.

    Attributes:
        data: .txt, .jsonl, .parquet or .npy; None is the shipped text.
        rows, seq_len: how much of it; ignored for .npy, which says so itself.
        scales: the scales file of an earlier run, instead of calibrating.
        device: ``cpu`` or ``cuda``, of calibration and of packing, whose bytes are the same on either.
        dtype: ``float32`` or ``bfloat16``; None is bfloat16 where the machine multiplies it directly.
        row_batch: rows that go through a layer at once; None is as many as ``memory`` admits, kind by kind of layer.
        memory: bytes that the run may take at its peak, packing included; None is no promise, and rows for 4 GB at once.
    """

    data: PathLike | None = None
    rows: int = 32
    seq_len: int = 512
    scales: PathLike | None = None
    device: Device = "cpu"
    dtype: str | None = None
    row_batch: int | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "seq_len", "row_batch", "memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; expected at least 1")
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"device is {self.device!r}; expected cpu or cuda")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise UsageError(f"dtype is {self.dtype!r}; expected float32 or bfloat16")

    def given(self) -> list[str]:
        """Options that say where scales come from, as far as they were given."""
        return [name for name, value in (("--calib", self.data), ("--scales", self.scales)) if value is not None]

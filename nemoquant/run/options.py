"""Options of one quantize run: ``RunOptions``, and a table with the properties of each option.

The command line takes flags and defaults from the table; ``--resume`` takes from it what may change. Flags
are named nowhere else.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

from nemoquant.checkpoint import SHARD_BYTES
from nemoquant.errors import UsageError
from nemoquant.formats import Device

PathLike = str | os.PathLike[str]
Where = Literal["local", "ray"]
Resume = Literal["fixed", "once calibrated", "free"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """All options of a run; its source, output and recipe are separate arguments.

    Attributes:
        data: .txt, .jsonl, .parquet or .npy to calibrate on; None is the shipped text.
        rows, seq_len: number and length of rows; ignored for .npy, whose shape gives both.
        scales: the scales file of an earlier run, instead of calibrating.
        device: ``cpu`` or ``cuda``, for calibration and packing; packing gives the same bytes on either.
        dtype: ``float32`` or ``bfloat16``; None is bfloat16 where the machine multiplies it directly.
        row_batch: rows that go through a layer at once; None is as many as ``memory`` admits, for each kind
            of layer.
        memory: bytes that the run may take at its peak, packing included; None is no promise, and the row
            batch is chosen for 4 GB.
        threads: for calibration and packing; None is all that this process may use.
        shard_bytes: largest output file.
        scale_groups: q, k, v share their scales, experts of a layer and projection their input scale; False
            for comparisons.
        engine: ``local``, this process; ``ray``, a cluster (extra ``ray``).
        address: of the Ray cluster, ``auto`` for one on this machine; None starts one on this machine.
        resume: continue what an earlier run with the same options left in OUT.partial; start from the
            beginning where nothing is there.
    """

    data: PathLike | None = None
    rows: int = 32
    seq_len: int = 512
    scales: PathLike | None = None
    device: Device = "cpu"
    dtype: str | None = None
    row_batch: int | None = None
    memory: int | None = None
    threads: int | None = None
    shard_bytes: int = SHARD_BYTES
    scale_groups: bool = True
    engine: Where = "local"
    address: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "seq_len", "row_batch", "memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; expected at least 1")
        if (self.threads is not None and self.threads < 1) or self.shard_bytes < 1:
            raise UsageError(
                f"threads is {self.threads}, shard_bytes {self.shard_bytes}; expected at least 1 of each"
            )
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"device is {self.device!r}; expected cpu or cuda")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise UsageError(f"dtype is {self.dtype!r}; expected float32 or bfloat16")
        if self.engine not in ("local", "ray"):
            raise UsageError(f"engine is {self.engine!r}; expected local or ray")
        if self.address is not None and self.engine != "ray":
            raise UsageError(
                f"an address ({self.address}) goes with --engine ray only; give both, or neither"
            )
        if self.engine == "ray" and self.device != "cpu":
            raise UsageError(
                f"engine ray computes on processors only, device is {self.device!r}; expected cpu"
            )

    def unused_where_nothing_is_calibrated(self) -> list[str]:
        """Flags that were given and have no effect where nothing is calibrated."""
        return [OPTIONS[name].flag for name in ("data", "scales") if getattr(self, name) is not None]


def shown(value: Any) -> str:
    """A value as text for a message."""
    if isinstance(value, dict):
        return ", ".join(f"{number} ({kind})" for kind, number in value.items())
    return "not given" if value is None else str(value)


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        default: default of the field.
        flag: name on the command line.
        resume: whether it may differ when a run is continued: never, once calibration is finished, or always.
        shown: turns its value into text for a message, in the command line's spelling.
    """

    default: Any
    flag: str
    resume: Resume
    shown: Callable[[Any], str] = shown


_ROWS: dict[str, tuple[Any, ...]] = {
    "data": ("--calib", "fixed"),
    "rows": ("--rows", "fixed"),  # `data` stands for both: the tokens must be the same
    "seq_len": ("--seq-len", "fixed"),
    "scales": ("--scales", "fixed"),
    "device": ("--device", "once calibrated"),
    "dtype": ("--compute", "fixed"),
    "row_batch": ("--row-batch", "fixed"),  # the row batch in use, given or chosen
    "memory": ("--memory", "free"),
    "threads": ("--threads", "once calibrated"),
    "shard_bytes": ("--shard-size", "fixed", lambda value: shown(value if value is None else value / 1e9)),
    "scale_groups": (
        "--no-scale-groups",
        "fixed",
        lambda value: shown(value if value is None else not value),
    ),
    "engine": ("--engine", "free"),  # what it changes shows in `threads` and `row_batch`
    "address": ("--address", "free"),
    "resume": ("--resume", "free"),
}
OPTIONS: Mapping[str, Option] = MappingProxyType(
    {field.name: Option(field.default, *_ROWS[field.name]) for field in fields(RunOptions)}
)

"""Options of one quantize run: ``RunOptions``, and a table with the properties of each option.

The command line takes flags and defaults from the table; ``--resume`` takes from it what may change. Flags
are named nowhere else.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, TypedDict, get_args

from nemoquant.arguments import (
    MOST_BYTES,
    MOST_WHOLE,
    PathLike,
    check_flags,
    check_text,
    check_word,
    column_names,
    file_names,
    number,
    optional_path,
    threads,
    whole,
)
from nemoquant.checkpoint import SHARD_BYTES
from nemoquant.errors import UsageError
from nemoquant.formats import DEVICES, METHODS, Device, Method
from nemoquant.layouts.gpus import GPUS
from nemoquant.planning.solving import (
    FOLDS,
    MOST_DESCENT,
    MOST_HEADROOM,
    OUTPUTS,
    PROPAGATE,
    FoldName,
    Outputs,
    Overrides,
    Propagate,
)

Where = Literal["local", "ray"]
Dtype = Literal["float32", "bfloat16"]
Resume = Literal["fixed", "once calibrated", "free"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
PLACES: tuple[Where, ...] = get_args(Where)
RENAMED = "engine, an option of quantize, is now on"  # an engine is a runtime, as in generate and diff


class RunOptionsDict(TypedDict, total=False):
    """The options of :class:`RunOptions` as keyword arguments of a function."""

    data: PathLike | None
    columns: Sequence[str]
    rows: int
    seq_len: int
    scales: PathLike | None
    device: Device
    dtype: Dtype | None
    row_batch: int | None
    memory: int | None
    threads: int | None
    shard_bytes: int
    scale_groups: bool
    method: Method | None
    folds: Sequence[FoldName] | None
    descent: int | None
    propagate: Propagate | None
    outputs: Outputs | None
    headroom: float | None
    on: Where
    address: str | None
    resume: bool
    also: Sequence[str]
    gpu: str | None


def renamed(given: Mapping[str, Any], stacklevel: int) -> dict[str, Any]:
    """Options with ``engine``, the old name of ``on``, under the new one; with a DeprecationWarning.

    Args:
        stacklevel: where the warning points to, as of warnings.warn: 2 is the caller of this function.
    Raises:
        UsageError: both names are given, with different words.
    """
    rest = {name: value for name, value in given.items() if name != "engine"}
    old = given.get("engine")
    if old is None:
        return rest
    if rest.get("on", old) != old:
        raise UsageError(f"on is {rest['on']!r} and engine, its old name, {old!r}; expected on alone")
    warnings.warn(RENAMED, DeprecationWarning, stacklevel=stacklevel)
    return rest | {"on": old}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """All options of a run; its source, output and recipe are separate arguments.

    Attributes:
        data: text to calibrate on: a file, a folder of files, ``mix`` (the shipped text of four domains), or
            the name of a data set of the hub that is on this machine (docs/calibration.md); None is the
            shipped prose.
        columns: those that hold the text, where no known name says it: one, or those of a question and its
            answer.
        rows, seq_len: number and length of rows; ignored for an array that has rows already.
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
        method: of all quantized weights, instead of the recipe's own: ``max``, ``mse``, ``four_over_six``,
            ``hess`` or ``gptq``; a format without it takes the nearest. All but the last two need no inputs,
            and drop the recipe's folds.
        folds: instead of the recipe's own; an empty sequence is none.
        descent: sweeps of coordinate descent after ``gptq`` and ``hess``.
        propagate: what these solve a layer for: ``source``, the source's stream, or ``quantized``, that of
            the quantized layers before it; None is as in the recipe.
        outputs: how errors in a layer's outputs count: ``equal``, or as they matter to the model's ``loss``;
            None is as in the recipe.
        headroom: how many times the largest input that calibration sees NVFP4 inputs may reach before they
            are clipped, 1 to 16.
        on: where to compute: ``local``, this process; ``ray``, a cluster (extra ``ray``).
        address: of the Ray cluster, ``auto`` for one on this machine; None starts one on this machine.
        resume: continue what an earlier run with the same options left in OUT.partial; start from the
            beginning where nothing is there.
        also: names of files of the source that are copied too, such as a reasoning parser.
        gpu: the GPU that the output is to be served on (``layouts/gpus.py``), for the commands in the model
            card; None is the first one that has its formats.
    """

    data: PathLike | None = None
    columns: Sequence[str] = ()
    rows: int = 32
    seq_len: int = 512
    scales: PathLike | None = None
    device: Device = "cpu"
    dtype: Dtype | None = None
    row_batch: int | None = None
    memory: int | None = None
    threads: int | None = None
    shard_bytes: int = SHARD_BYTES
    scale_groups: bool = True
    method: Method | None = None
    folds: Sequence[FoldName] | None = None
    descent: int | None = None
    propagate: Propagate | None = None
    outputs: Outputs | None = None
    headroom: float | None = None
    on: Where = "local"
    address: str | None = None
    resume: bool = False
    also: Sequence[str] = ()
    gpu: str | None = None
    engine: InitVar[Where | None] = None  # the old name of ``on``

    def __new__(cls, **given: Any) -> "RunOptions":
        renamed(given, 3)
        return super().__new__(cls)

    def __post_init__(self, engine: Where | None) -> None:
        if engine is not None:
            object.__setattr__(self, "on", engine)
        for name in ("rows", "seq_len", "row_batch", "memory", "shard_bytes"):
            value = getattr(self, name)
            if value is not None or name in ("rows", "seq_len", "shard_bytes"):
                most = MOST_BYTES if name in ("memory", "shard_bytes") else MOST_WHOLE
                object.__setattr__(self, name, whole(name, value, 1, most))
        object.__setattr__(self, "threads", threads(self.threads))
        for name in ("data", "scales"):
            object.__setattr__(self, name, optional_path(name, getattr(self, name)))
        check_word("device", self.device, DEVICES)
        if self.dtype is not None:
            check_word("dtype", self.dtype, DTYPES)
        check_word("on", self.on, PLACES)
        if self.method is not None:
            check_word("method", self.method, METHODS)
        if self.folds is not None:
            folds = [self.folds] if isinstance(self.folds, str) else self.folds
            if not isinstance(folds, Sequence):
                raise UsageError(f"folds is {folds!r}; expected some of {', '.join(FOLDS)}, or an empty list")
            for fold in folds:
                check_word("folds", fold, FOLDS)
            object.__setattr__(self, "folds", tuple(dict.fromkeys(folds)))
        if self.descent is not None:
            object.__setattr__(self, "descent", whole("descent", self.descent, 0, MOST_DESCENT))
        if self.propagate is not None:
            check_word("propagate", self.propagate, PROPAGATE)
        if self.outputs is not None:
            check_word("outputs", self.outputs, OUTPUTS)
        if self.headroom is not None:
            object.__setattr__(self, "headroom", number("headroom", self.headroom, 1, MOST_HEADROOM))
        check_flags(scale_groups=self.scale_groups, resume=self.resume)
        object.__setattr__(self, "columns", column_names("columns", self.columns))
        object.__setattr__(self, "also", file_names("also", self.also))
        if self.gpu is not None:
            check_word("gpu", self.gpu, tuple(GPUS))
        if self.address is not None:
            check_text("address", self.address, "HOST:PORT or auto")
            if self.on != "ray":
                raise UsageError(
                    f"an address ({self.address}) goes with --on ray only; give both, or neither"
                )
        if self.on == "ray" and self.device != "cpu":
            raise UsageError(f"--on ray computes on processors only, device is {self.device!r}; expected cpu")

    @property
    def overrides(self) -> Overrides:
        """What takes the place of the recipe's own."""
        return Overrides(self.method, self.folds, self.descent, self.propagate, self.outputs, self.headroom)

    def unused_where_nothing_is_calibrated(self) -> list[str]:
        """Flags that were given and have no effect where nothing is calibrated."""
        return [OPTIONS[name].flag for name in ("data", "columns", "scales") if getattr(self, name)]


# For help() and completion, from which ``__new__`` would hide the fields.
RunOptions.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(RunOptions)
    ]
)


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
    "columns": ("--calib-column", "fixed"),
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
    "method": ("--method", "fixed"),  # these six are in the plan's sha256
    "folds": ("--folds", "fixed"),
    "descent": ("--descent", "fixed"),
    "propagate": ("--propagate", "fixed"),
    "outputs": ("--outputs", "fixed"),
    "headroom": ("--headroom", "fixed"),
    "on": ("--on", "free"),  # what it changes shows in `threads` and `row_batch`
    "address": ("--address", "free"),
    "resume": ("--resume", "free"),
    "also": ("--also", "free"),  # these two change no tensor
    "gpu": ("--gpu", "free"),
}
OPTIONS: Mapping[str, Option] = MappingProxyType(
    {field.name: Option(field.default, *_ROWS[field.name]) for field in fields(RunOptions)}
)

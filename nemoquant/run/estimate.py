"""What a run will need, told before it starts: memory from the sizes of what it holds, time from a short measurement.

Memory is a promise: with ``--memory`` the rows that go through a layer at once, and how far packing reads ahead, are chosen to stay
below it. Time is an estimate.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemoquant.checkpoint.background import DEPTH
from nemoquant.checkpoint.folder import BYTES_PER_TENSOR, MARGIN
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.errors import UsageError
from nemoquant.formats import Device
from nemoquant.pack.encode import CHUNK_BYTES
from nemoquant.pack.workers import AHEAD
from nemoquant.planning.plan import Plan
from nemoquant.run.options import CalibrationOptions
from nemoquant.run.speeds import Speeds, measure
from nemoquant.units import duration, size

if TYPE_CHECKING:
    from nemoquant.calibrate.memory import RowBatch

DEFAULT_MEMORY = 4_000_000_000  # bytes that rows are batched for where --memory is not given
BASE_STEP = 256_000_000  # what the process holds before it begins is rounded up to this: two runs choose the same
LANE = 3 * CHUNK_BYTES  # pinned for a thread that feeds a GPU: a chunk, as float32 if it is float16, and its codes
PIECE = 2 * CHUNK_BYTES  # of one piece in the pipeline: its source, mapped, and what became of it
BYTES_A_TENSOR = 1500  # of plan, layout, headers and JSON, for each tensor read or written

VERIFY_TENSOR = 50e-6  # seconds for the checks of one tensor, measured


@dataclass(frozen=True)
class Budget:
    """How a run keeps below its memory.

    Attributes:
        memory: the most it should take, bytes, by what it holds at its worst moment.
        row_batch: rows at once in calibration, of all layers or by kind; None where nothing is calibrated.
        ahead: pieces that packing may have in work and waiting.
    """

    memory: int
    row_batch: "RowBatch | None"
    ahead: int


@dataclass(frozen=True)
class Estimate:
    """Seconds of each stage, bytes of memory at the peak, bytes on disk at the most."""

    calibrate: float
    pack: float
    verify: float
    memory: int
    disk: int
    row_batch: "RowBatch | None"
    speeds: Speeds

    @property
    def seconds(self) -> float:
        return self.calibrate + self.pack + self.verify

    def to_json(self) -> dict[str, Any]:
        """The figures, as JSON data."""
        data = asdict(self) | {"seconds": self.seconds}
        data["speeds"]["encode"] = {" ".join(filter(None, key)): rate for key, rate in self.speeds.encode.items()}
        return data


def compute_dtype_name(options: CalibrationOptions) -> str:
    """``float32`` or ``bfloat16``, what calibration computes in."""
    from nemoquant.calibrate.run import compute_dtype

    return options.dtype or str(compute_dtype(options.device)).removeprefix("torch.")


def resident(field: str = "VmRSS") -> int:
    """Bytes of memory that this process has (``VmRSS``), or had at its peak (``VmHWM``)."""
    with Path("/proc/self/status").open(encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def budget(
    plan: Plan, memory: int | None, row_batch: "RowBatch | None", shape: tuple[int, int] | None, item: int, threads: int,
    device: Device = "cpu",
) -> Budget:  # fmt: skip
    """Choose the row batch and how far to read ahead.

    Args:
        memory: bytes that must do, or None.
        row_batch: one that was chosen already, or None.
        shape: rows and length of the calibration, None where nothing is calibrated.
        item: bytes an element of its compute dtype.
        device: a GPU is fed through pinned memory of each thread; what is on it is not counted.
    Raises:
        UsageError: ``memory`` is too little; says what is needed, and for what.
    """
    if shape is not None:
        import torch  # noqa: F401  it belongs to what the process holds before it begins

    held = math.ceil(resident() / BASE_STEP) * BASE_STEP + BYTES_A_TENSOR * (len(plan.rows) + plan.tensors_out)
    limit = memory or DEFAULT_MEMORY
    waiting = pack_bytes(plan) + (threads * LANE if device == "cuda" else 0)
    ahead = max(1, min(AHEAD * threads, (limit - held - waiting) // PIECE))
    needed = {"packing": held + waiting + ahead * PIECE}
    given = row_batch is not None
    if shape is not None:
        from nemoquant.calibrate.memory import batch_bytes, pick_row_batch, rows_of, weight_bytes

        rows, length = shape
        room = limit - held - weight_bytes(plan.config, item)
        row_batch = row_batch or pick_row_batch(plan.config, rows, length, item, room)
        for kind in sorted(set(plan.config.layers)):
            batch = min(rows, rows_of(row_batch, kind))
            what = f"{batch} calibration row{'s' * (batch > 1)} of {length} tokens in a layer of kind {kind}"
            needed[what] = held + weight_bytes(plan.config, item) + batch_bytes(plan.config, kind, batch, length, item)
    most = max(needed, key=lambda what: needed[what])
    if memory is not None and needed[most] > memory:
        hint = ", or shorter rows" * (shape is not None) + ", or a smaller --row-batch" * (given and shape is not None)
        raise UsageError(f"--memory is {size(memory)}, but {most} needs {size(needed[most])}; give more{hint}")
    return Budget(needed[most], row_batch if shape else None, ahead)


def pack_bytes(plan: Plan) -> int:
    """What packing holds beside the plan and the pieces in work: pieces that wait to be hashed and written, one unit's block scales."""
    blocks: dict[object, int] = {}  # of experts of a layer and projection together, else of a tensor
    for row in plan.quantized:
        scales = [math.prod(shape) for kind, _, shape in row.parts() if kind == "block_scales"]
        unit = row.name if row.expert is None else (row.role, row.layer)
        blocks[unit] = blocks.get(unit, 0) + sum(scales)
    return 2 * DEPTH * CHUNK_BYTES // 2 + max(blocks.values(), default=0)


def estimate(
    checkpoint: Checkpoint, plan: Plan, folder: Path, shape: tuple[int, int] | None, dtype: str | None, chosen: Budget, threads: int,
    processors: int | None = None, device: Device = "cpu",
) -> Estimate:  # fmt: skip
    """Measure, and say what a run will take.

    Args:
        folder: an existing one on OUT's disk.
        shape: rows and length of the calibration, None where nothing is calibrated.
        dtype: its compute dtype.
        threads: of one batch of the calibration.
        processors: for packing, and for batches beside each other where there are more than ``threads``; None is ``threads``.
        device: of calibration and packing.
    """
    speeds = measure(checkpoint, plan, folder, shape[1] if shape else 0, chosen.row_batch or 1, dtype or "", threads, device)
    disk = plan.bytes_out + BYTES_PER_TENSOR * plan.tensors_out + MARGIN
    if shape:
        disk += 2 * shape[0] * shape[1] * plan.config.hidden_size * (4 if dtype == "float32" else 2)
    processors = processors or threads
    return Estimate(
        _calibrate_seconds(plan, shape, chosen.row_batch, speeds) * threads / processors if shape else 0.0,
        _pack_seconds(plan, speeds, processors),
        plan.bytes_out / speeds.hash + VERIFY_TENSOR * plan.tensors_out,
        chosen.memory,
        disk,
        chosen.row_batch,
        speeds,
    )


def _calibrate_seconds(plan: Plan, shape: tuple[int, int], row_batch: "RowBatch | None", speeds: Speeds) -> float:
    """Products at their measured rates, the mixers' other work, and the weights read once for each batch."""
    from nemoquant.calibrate.memory import rows_of

    assert row_batch is not None
    c, (rows, length) = plan.config, shape
    tokens = rows * length
    seconds = c.count("mamba") * tokens * speeds.mixer
    for row in plan.rows:
        if row.layer is None or row.role.startswith("mtp.") or len(row.shape) != 2:
            continue
        batches = math.ceil(rows / rows_of(row_batch, c.layers[row.layer]))
        share = tokens * c.num_experts_per_tok / c.n_routed_experts if row.expert is not None else tokens
        rate = speeds.expert if row.expert is not None else speeds.product
        seconds += 2 * share * row.elements / rate + batches * row.bytes_in / speeds.read
    return seconds


def _pack_seconds(plan: Plan, speeds: Speeds, threads: int) -> float:
    """The slowest of reading, encoding, hashing and writing; or the processors' time for all of them, shared out."""
    encode = sum(row.bytes_in / speeds.encode[row.format, row.scale_method] for row in plan.quantized)
    copied = sum(row.bytes_in for row in plan.rows if row.format == "source") / speeds.read
    hashed, written = plan.bytes_out / speeds.hash, plan.bytes_out / speeds.sync
    busy = encode + copied + hashed + plan.bytes_out / speeds.write
    return max(plan.bytes_in / speeds.read / threads, encode / threads, hashed, written, busy / threads)


def expectation(found: Estimate) -> str:
    """An estimate in a line."""
    stages = [(n, t) for n, t in (("calibrate", found.calibrate), ("pack", found.pack), ("verify", found.verify)) if t]
    text = (
        f"{duration(found.seconds)} ({', '.join(f'{name} {duration(t)}' for name, t in stages)}), {size(found.memory)} of memory, "
        f"{size(found.disk)} of disk"
    )
    return text + (f"; rows at once: {row_batches(found.row_batch)}" if found.row_batch else "")


def row_batches(row_batch: "RowBatch") -> str:
    """A row batch for people."""
    return str(row_batch) if isinstance(row_batch, int) else ", ".join(f"{n} ({kind})" for kind, n in row_batch.items())

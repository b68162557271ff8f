"""Time, memory and disk of a run, estimated before it starts from a short measurement and from sizes."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemoquant.calibrate.batch import Batch, RowBatch, rows_of
from nemoquant.checkpoint.folder import BYTES_PER_TENSOR, MARGIN
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.formats import Device
from nemoquant.notebook import html_table
from nemoquant.planning.plan import Plan
from nemoquant.planning.row import Row
from nemoquant.run.budget import Budget
from nemoquant.run.solve_time import solve_seconds
from nemoquant.run.speeds import Speeds, measure
from nemoquant.solve.memory import waiting_bytes
from nemoquant.units import duration, size

BACK = 2.4  # time of a way back through a layer, over that forward, measured: 2.1 to 2.5 by kind of layer
VERIFY_TENSOR = 50e-6  # seconds to check one tensor, measured


@dataclass(frozen=True, repr=False)
class Estimate:
    """Seconds of each stage, bytes of memory at the peak, bytes of disk at the most.

    ``solve`` is a part of calibration: 0 where no codes are solved for.
    """

    calibrate: float
    solve: float
    pack: float
    verify: float
    memory: int
    disk: int
    row_batch: RowBatch | None
    speeds: Speeds

    @property
    def seconds(self) -> float:
        return self.calibrate + self.solve + self.pack + self.verify

    def __repr__(self) -> str:
        return f"Estimate({expectation(self)})"

    def _repr_html_(self) -> str:
        rows = [("calibrate", duration(self.calibrate))] if self.calibrate else []
        rows += [("solve", duration(self.solve))] if self.solve else []
        rows += [("pack", duration(self.pack)), ("verify", duration(self.verify))]
        rows += [("memory", size(self.memory)), ("disk", size(self.disk))]
        if self.row_batch:
            rows.append(("rows at once", row_batches(self.row_batch)))
        return html_table(f"Estimate: {duration(self.seconds)}", (), rows, right=(1,))

    def to_json(self) -> dict[str, Any]:
        """The figures, as JSON data."""
        data = asdict(self) | {"seconds": self.seconds}
        data["speeds"]["encode"] = {
            " ".join(filter(None, key)): rate for key, rate in self.speeds.encode.items()
        }
        return data


def estimate_run(
    checkpoint: Checkpoint,
    plan: Plan,
    folder: Path,
    batch: Batch | None,
    chosen: Budget,
    *,
    threads: int,
    processors: int | None = None,
    device: Device = "cpu",
) -> Estimate:
    """Measure this machine and estimate what a run will need.

    Args:
        folder: an existing one on OUT's disk.
        batch: all rows of the calibration, None where nothing is calibrated.
        threads: number that compute one batch of the calibration.
        processors: number for packing; calibration runs several batches side by side where it is larger than
            ``threads``. None is ``threads``.
        device: of calibration and packing.
    """
    speeds = measure(
        checkpoint, plan, folder, batch, row_batch=chosen.row_batch or 1, threads=threads, device=device
    )
    disk = plan.bytes_out + BYTES_PER_TENSOR * plan.tensors_out + MARGIN
    processors = processors or threads
    calibrate = solve = 0.0
    if batch is not None and plan.needs_inputs:
        disk += waiting_bytes(plan, batch)
        solve = solve_seconds(plan, batch, speeds, threads, device)
    if batch is not None:
        disk += batch.hidden_bytes(plan.config.hidden_size)
        layers = _layer_seconds(plan, batch, chosen.row_batch or 1, speeds)
        calibrate = sum(layers.values()) * threads / processors
        solve += _stream_seconds(plan, layers) if plan.propagates else 0.0
        solve += _gradient_seconds(plan, batch, sum(layers.values()), speeds) if plan.weighs_outputs else 0.0
    return Estimate(
        calibrate=calibrate,
        solve=solve,
        pack=_pack_seconds(plan, speeds, processors),
        verify=plan.bytes_out / speeds.hash + VERIFY_TENSOR * plan.tensors_out,
        memory=chosen.memory,
        disk=disk,
        row_batch=chosen.row_batch,
        speeds=speeds,
    )


def _layer_seconds(plan: Plan, batch: Batch, row_batch: RowBatch, speeds: Speeds) -> dict[int, float]:
    """Products at their measured rates, the mixers' other work, and reading the weights for each batch."""
    c, tokens = plan.config, batch.tokens
    scans = {i: c.of_layer(i).mamba_inner for i, kind in enumerate(c.layers) if kind == "mamba"}
    first = next(iter(scans.values()), 1)  # which was measured
    seconds = {i: scans.get(i, 0) / first * tokens * speeds.mixer for i in range(len(c.layers))}
    for row in plan.rows:
        if row.layer is None or row.role.startswith("mtp.") or len(row.shape) != 2:
            continue
        batches = math.ceil(batch.rows / rows_of(row_batch, c.layers[row.layer]))
        share = tokens * c.of_layer(row.layer).routed_share if row.expert is not None else tokens
        rate = speeds.expert if row.expert is not None else speeds.product
        seconds[row.layer] += 2 * share * row.elements / rate + batches * row.bytes_in / speeds.read
    return seconds


def _stream_seconds(plan: Plan, layers: Mapping[int, float]) -> float:
    """What the stream of the quantized layers takes; ``layers``: seconds of each when it is run once."""
    from nemoquant.solve.order import passes

    kinds = plan.config.layers
    rows: dict[int, list[Row]] = {i: [] for i in layers}
    for row in plan.quantized:
        if row.layer is not None and row.solved:
            rows[row.layer].append(row)
    return sum(passes(kinds[i], rows[i]) * seconds for i, seconds in layers.items())


def _gradient_seconds(plan: Plan, batch: Batch, layers: float, speeds: Speeds) -> float:
    """What gradients of the loss take: all layers forward, and back twice; the head once, both ways.

    ``layers``: seconds of all layers when each is run once.
    """
    head = 4 * batch.tokens * plan.config.vocab_size * plan.config.hidden_size / speeds.product
    kept = (2 * len(plan.config.layers) + 1) * batch.tokens * plan.config.hidden_size * batch.item_size
    return (1 + 2 * BACK) * layers + head + kept / speeds.write


def _pack_seconds(plan: Plan, speeds: Speeds, threads: int) -> float:
    """The slowest of reading, encoding, hashing and writing; or all processor time divided by ``threads``."""
    encode = sum(
        row.bytes_in / speeds.encode[row.format, row.scale_method] for row in plan.quantized if not row.solved
    )
    copied = sum(row.bytes_in for row in plan.rows if row.format == "source") / speeds.read
    hashed, written = plan.bytes_out / speeds.hash, plan.bytes_out / speeds.sync
    busy = encode + copied + hashed + plan.bytes_out / speeds.write
    return max(plan.bytes_in / speeds.read / threads, encode / threads, hashed, written, busy / threads)


def expectation(found: Estimate) -> str:
    """An estimate in one line."""
    stages = [
        (n, t)
        for n, t in (
            ("calibrate", found.calibrate),
            ("solve", found.solve),
            ("pack", found.pack),
            ("verify", found.verify),
        )
        if t
    ]
    text = (
        f"{duration(found.seconds)} ({', '.join(f'{name} {duration(t)}' for name, t in stages)}), "
        f"{size(found.memory)} of memory, "
        f"{size(found.disk)} of disk"
    )
    return text + (f"; rows at once: {row_batches(found.row_batch)}" if found.row_batch else "")


def row_batches(row_batch: RowBatch) -> str:
    """A row batch as text for people."""
    return (
        str(row_batch)
        if isinstance(row_batch, int)
        else ", ".join(f"{n} ({kind})" for kind, n in row_batch.items())
    )

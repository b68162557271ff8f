"""The memory of a run: from the sizes of what it holds, rows at once and how far packing reads ahead.

With ``--memory`` the run promises to stay below it, and both are chosen for that.
"""

import math
from dataclasses import dataclass

from nemoquant.calibrate.batch import Batch, RowBatch, rows_of
from nemoquant.checkpoint.background import DEPTH
from nemoquant.checkpoint.identity import PIECE_BYTES
from nemoquant.errors import UsageError
from nemoquant.formats import Device
from nemoquant.machine import resident
from nemoquant.pack.workers import AHEAD
from nemoquant.planning.plan import Plan
from nemoquant.units import size

DEFAULT_MEMORY = 4_000_000_000  # bytes, used to choose the row batch where --memory is not given
# Memory of the process at the start is rounded up to a multiple of this, so that two runs choose the same.
BASE_STEP = 256_000_000
# Pinned memory of a thread that feeds a GPU: a chunk, as float32 if the source is float16, and its codes.
LANE = 3 * PIECE_BYTES
PIECE = 2 * PIECE_BYTES  # of one piece in the pipeline: its source, mapped, and the result
BYTES_A_TENSOR = 1500  # of plan, layout, headers and JSON, for each tensor read or written


@dataclass(frozen=True)
class Budget:
    """The memory of a run, and the choices that follow from it.

    Attributes:
        memory: bytes that the run should take at its peak, computed from what it holds then.
        row_batch: rows at once in calibration, of all layers or by kind; None where nothing is calibrated.
        ahead: number of pieces that packing may have in work and waiting.
    """

    memory: int
    row_batch: RowBatch | None
    ahead: int


def budget(
    plan: Plan,
    batch: Batch | None,
    *,
    memory: int | None,
    row_batch: RowBatch | None,
    threads: int,
    device: Device = "cpu",
) -> Budget:
    """Choose the row batch and how far to read ahead.

    Args:
        batch: all rows of the calibration, None where nothing is calibrated.
        memory: limit in bytes, or None.
        row_batch: a row batch that was chosen already, or None.
    Raises:
        UsageError: ``memory`` is too little; names the step that needs most, and its bytes.
    """
    if batch is not None:
        import torch  # noqa: F401  so that its memory is in ``resident()`` below

    held = math.ceil(resident() / BASE_STEP) * BASE_STEP + BYTES_A_TENSOR * (
        len(plan.rows) + plan.tensors_out
    )
    limit = memory or DEFAULT_MEMORY
    waiting = pack_bytes(plan) + (threads * LANE if device == "cuda" else 0)
    ahead = max(1, min(AHEAD * threads, (limit - held - waiting) // PIECE))
    needed = {"packing": held + waiting + ahead * PIECE}
    given = row_batch is not None
    if batch is not None:
        from nemoquant.calibrate.memory import (
            back_bytes,
            backward_rows,
            batch_bytes,
            pick_row_batch,
            weight_bytes,
        )
        from nemoquant.solve.memory import head_bytes, stream_bytes

        weights, beside = weight_bytes(plan.config, batch.item_size), stream_bytes(plan, batch.item_size)
        row_batch = row_batch or pick_row_batch(plan.config, batch, limit - held - weights, beside)
        for kind in sorted(set(plan.config.layers)):
            part = batch.of(min(batch.rows, rows_of(row_batch, kind)))
            row_count = f"{part.rows} calibration row{'s' * (part.rows > 1)}"
            what = f"{row_count} of {part.length} tokens in a layer of kind {kind}"
            needed[what] = held + weights + batch_bytes(plan.config, kind, part, beside)
            if plan.weighs_outputs:
                back = part.of(backward_rows(part.rows))
                needed[f"{what}, on the way back"] = held + weights + back_bytes(plan.config, kind, back)
        if plan.weighs_outputs:
            needed["gradients of the head"] = held + weights + head_bytes(plan)
    if batch is not None and plan.needs_inputs:
        from nemoquant.solve.memory import fold_bytes, solve_bytes

        name, solving = solve_bytes(plan, threads)
        if solving:
            needed[f"solving {name} with {threads} thread{'s' * (threads > 1)}"] = held + solving
        name, folding = fold_bytes(plan)
        if folding:
            needed[f"choosing folds of {name}"] = held + folding
    most = max(needed, key=lambda what: needed[what])
    if memory is not None and needed[most] > memory:
        hint = ", or shorter rows" * (batch is not None) + ", or a smaller --row-batch" * (
            given and batch is not None
        )
        raise UsageError(
            f"--memory is {size(memory)}, but {most} needs {size(needed[most])}; give more{hint}"
        )
    return Budget(needed[most], row_batch if batch else None, ahead)


def pack_bytes(plan: Plan) -> int:
    """Bytes that packing holds besides the plan and the pieces in work.

    These are pieces that wait to be hashed and written, and one unit's block scales.
    """
    blocks: dict[object, int] = {}  # by unit: all experts of a layer and projection, or one tensor
    for row in plan.quantized:
        scales = [math.prod(shape) for kind, _, shape in row.parts() if kind == "block_scales"]
        unit = row.name if row.expert is None else (row.role, row.layer)
        blocks[unit] = blocks.get(unit, 0) + sum(scales)
    return 2 * DEPTH * PIECE_BYTES // 2 + max(blocks.values(), default=0)

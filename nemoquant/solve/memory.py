"""Memory that solving takes at its peak, and disk for what waits; from sizes alone.

The figures count the arrays that are alive at once; a test compares them with a measured peak. Importing this
module loads neither numpy nor torch.
"""

from nemoquant.calibrate.batch import PIECE_BYTES, Batch
from nemoquant.planning.plan import Plan
from nemoquant.solve.order import WRITERS
from nemoquant.solve.taps import input_of

SLICE_ELEMENTS = 1 << 22  # of a weight that one thread solves at once
OUTPUTS = 2048  # of a weight at most whose errors are weighed together
_COUPLED = 36  # bytes an element of those rows then: values, errors, codes, products, plain values
HEAD_TOKENS = 128  # whose logits are there at once on the way back
_LOGIT = 24  # bytes of a logit there: itself, p, its sums in float64, gradient
_METRIC = 40  # bytes an element of H: sums and H in float64, and its factor in passing; measured 38
_SLICE = 26  # bytes an element of a slice: weight, its transpose, values, errors, codes
_WEIGHT = 6  # bytes an element of a whole weight: float32, codes, block scales
_TARGET = 8  # bytes an element of H that targets take beside it, where layers see the quantized stream
_TARGETS, _WANTED = 4, 8  # bytes an element of a weight then: its target, and of a writer what is wanted
_COPIES = 2  # of a weight that a fold is chosen by: in the page cache, and its own
_MOMENTS = 80  # bytes an element of a latent layer's second moments, in float64, while M is found
_PIECES = 4  # pieces alive: as computed, folded, rounded, and a strip of it in float64


def coupled_rows(out: int) -> int:
    """How many of a weight's outputs are weighed together: parts of equal size, ``OUTPUTS`` at most."""
    return -(-out // -(-out // OUTPUTS))


def head_bytes(plan: Plan) -> int:
    """Bytes on the way back through the head, beside the run's own."""
    return HEAD_TOKENS * (_LOGIT * plan.config.vocab_size + 32 * plan.config.hidden_size)


def solve_bytes(plan: Plan, threads: int) -> tuple[str, int]:
    """The module that takes most memory while it is solved, and how many bytes beside the run's own."""
    most, name = 0, ""
    for row in plan.quantized:
        if not row.solved:
            continue
        out, width = row.shape
        elements, slices = out * width, min(out * width, max(SLICE_ELEMENTS, width))
        one = _METRIC * width * width + _WEIGHT * elements + _PIECES * PIECE_BYTES
        if plan.propagates:
            wanted = _WANTED if row.role in WRITERS else 0
            one += _TARGET * width * width + (_TARGETS + wanted) * elements + 2 * PIECE_BYTES
        part = _SLICE * slices
        if plan.weighs_outputs and row.weighed:
            together = coupled_rows(out)
            slices = together * width
            part = _METRIC * together**2 + max(_SLICE, _COUPLED) * slices
        needed = (
            threads * (one + part)
            if row.expert is not None
            else one + min(threads, -(-elements // slices)) * part
        )
        if needed > most:
            most, name = needed, row.module
    return name, most + _matrices(plan) if most else 0


def fold_bytes(plan: Plan) -> tuple[str, int]:
    """The module that takes most memory while folds are chosen, and how many bytes beside the run's own."""
    rows = [row for row in plan.quantized if row.layer is not None] if plan.recipe.folds else []
    most = max(rows, key=lambda row: row.bytes_in, default=None)
    if most is None:
        return "", 0
    return most.module, _COPIES * most.bytes_in + _MOMENTS * max(_latents(plan), default=0) + _matrices(plan)


def _matrices(plan: Plan) -> int:
    """Bytes of M and its inverse of every layer, which are kept until they are packed."""
    return sum(2 * 4 * elements for elements in _latents(plan))


def _latents(plan: Plan) -> list[int]:
    """Elements of M of each layer that may get one."""
    if "latent" not in plan.recipe.folds:
        return []
    moe = (plan.config.of_layer(i) for i, kind in enumerate(plan.config.layers) if kind == "moe")
    return [own.moe_latent_size**2 for own in moe]


def stream_bytes(plan: Plan, item: int) -> int:
    """Bytes a token that a pass of the quantized layers' stream holds beside the layer; 0 without one.

    They are the router's input in float32 before and after its fold, what a writer should put out with both
    streams that it comes from, and the rounded copy of the widest input that all tokens have.
    """
    if not plan.propagates:
        return 0
    widest = max(row.shape[1] for row in plan.quantized if row.expert is None or row.role.endswith("up_proj"))
    return plan.config.hidden_size * (2 * 4 + item) + plan.config.hidden_size * (3 * 4 + item) + widest * item


def input_bytes(plan: Plan, batch: Batch) -> int:
    """Disk for the inputs of the layer that has most, in bytes; those that only folds look at included."""
    values: dict[int | None, dict[str, float]] = {}
    for row in plan.quantized:
        share = 1.0
        if row.expert is not None and row.layer is not None:
            share = plan.config.of_layer(row.layer).routed_share
        values.setdefault(row.layer, {})[input_of(row)] = share * row.shape[1]
    most = max(sum(taps.values()) for taps in values.values())
    if plan.propagates:  # the router's too; and all again on the other stream, with what it lacks
        most = 2 * (most + plan.config.hidden_size)
    return round(batch.tokens * batch.item_size * most)


def graded_bytes(plan: Plan, batch: Batch) -> int:
    """Disk for gradients of the loss: between layers, and at the outputs of the layer that has most."""
    if not plan.weighs_outputs:
        return 0
    values: dict[int | None, float] = {}
    for row in plan.quantized:
        if row.weighed and row.layer is not None:
            share = plan.config.of_layer(row.layer).routed_share if row.expert is not None else 1.0
            values[row.layer] = values.get(row.layer, 0.0) + share * row.shape[0]
    between = (len(plan.config.layers) + 2) * plan.config.hidden_size
    return round(batch.tokens * batch.item_size * (between + max(values.values())))


def solved_bytes(plan: Plan) -> int:
    """Disk for solved weights until they are packed, in bytes."""
    return sum(row.bytes_out for row in plan.quantized if row.solved)


def waiting_bytes(plan: Plan, batch: Batch) -> int:
    """Disk for all that waits while weights are solved or folded, in bytes."""
    if not plan.needs_inputs:
        return 0
    stream = batch.hidden_bytes(plan.config.hidden_size) if plan.propagates else 0
    return input_bytes(plan, batch) + stream + solved_bytes(plan) + graded_bytes(plan, batch)

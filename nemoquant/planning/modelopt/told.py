"""What a converted recipe does otherwise than Model Optimizer: counted on the way, told at the end."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from nemoquant.errors import listing
from nemoquant.formats import FORMATS, FormatName, Method
from nemoquant.model.config import NemotronHConfig
from nemoquant.planning.modelopt.algorithm import Algorithm
from nemoquant.planning.modelopt.quantizers import Applied

QKV = {"attention.q_proj", "attention.k_proj", "attention.v_proj"}


class Treatment(NamedTuple):
    """What a weight gets; ``activations`` False leaves the GEMM's input as it is."""

    format: FormatName
    scales: Method
    activations: bool


class Told:
    """What is counted while a recipe is converted, and told at the end."""

    def __init__(self) -> None:
        self.constant_inputs = self.inputs_alone = 0
        self.constant_cache = False

    def notes(
        self,
        applied: Applied,
        algorithm: Algorithm,
        treatments: Mapping[tuple[str, int | None], Treatment],
        config: NemotronHConfig,
    ) -> Iterator[str]:
        """A sentence each."""
        if not treatments:
            yield "no weight is quantized, the KV cache alone: its patterns are for another model"
        if applied.idle:
            yield f"{len(applied.idle)} patterns match nothing in this model: {listing(applied.idle)}"
        if applied.published:
            yield (
                f"{listing(applied.published)} match by the names of the checkpoint's own code, and are "
                f"taken so; by transformers' names, which Model Optimizer has now, they match nothing"
            )
        if applied.partial:
            yield (
                f"{listing(applied.partial)} leave routed experts out, as in Model Optimizer, where the "
                f"experts of a layer are one module (`*experts.*_proj_weight_quantizer` matches them)"
            )
        yield from algorithm.notes()
        if self.constant_cache:
            yield (
                "K and V scales are calibrated here, where Model Optimizer writes none and engines take 1.0 "
                "(use_constant_amax)"
            )
        if self.constant_inputs:
            yield (
                f"the input scales of {self.constant_inputs:,} modules are calibrated here, where Model "
                f"Optimizer writes a constant"
            )
        if self.inputs_alone:
            yield (
                f"{self.inputs_alone:,} modules whose input alone is quantized stay as the source has them, "
                f"as in Model Optimizer's own file"
            )
        inside = [q.state.said for q in applied.quantizers if q.side == "attention" and q.state.enabled]
        if inside:
            yield (
                f"{len(inside)} quantizers of queries and probabilities inside attention ({inside[0]}) are "
                f"left out: nothing of them stands in a checkpoint"
            )
        if {role for (role, _), given in treatments.items() if FORMATS[given.format].block is None} & QKV:
            yield (
                "q, k and v of a layer share their scales here, which are apart in Model Optimizer's file "
                "(--no-scale-groups)"
            )
        if config.mtp_modules:
            yield "multi-token prediction is kept as the source has it; Model Optimizer's file lacks it"

"""The stream that the quantized layers make of the calibration rows, beside the source model's own.

With ``propagate: quantized`` a weight is solved for the inputs that the quantized weights before it really
give it, and for what the source computes in that place (``targets.py``). A layer's weights are solved in the
order of ``Kind.order``, and the layer is run again in between with those that are known by then.

Tokens go to the experts that the source chooses, because the router gets the source's input: so both streams
show an expert the same tokens in the same order, and its inputs pair up.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemoquant.calibrate.hidden import InFiles
from nemoquant.calibrate.inputs import InputFile
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.errors import CalibrationError
from nemoquant.formats import FormatName
from nemoquant.model import names
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.kinds import KINDS
from nemoquant.model.norm import rms_norm
from nemoquant.model.reference import layer_forward
from nemoquant.model.taps import prefixed
from nemoquant.planning.row import Row
from nemoquant.quantized.packed import rounded
from nemoquant.solve.folds.layer import InputTransforms
from nemoquant.solve.order import WRITERS, stages
from nemoquant.solve.taps import input_of, output_of, router_of
from nemoquant.solve.written import Written, WrittenWeights

_ROUNDED = 1 << 20  # values that are rounded at a time: float32 copies of an input stay small

Rounding = Mapping[str, tuple[FormatName, np.float32]]
"""Format and decode scale of what engines round, by tap."""


class _Enough(Exception):
    """The inputs that were wanted have been seen."""


def routers(config: NemotronHConfig) -> set[str]:
    """The taps of all routers."""
    return {router_of(i) for i, kind in enumerate(config.layers) if "router" in KINDS[kind].other}


@dataclass(frozen=True)
class Layer:
    """What one layer of the stream is computed with.

    Attributes:
        batches: the rows of each batch, as the source's inputs were kept.
        rounding: of the layer's inputs, and of the KV cache.
        inputs: the source's, with the router's.
    """

    number: int
    batches: Sequence[Sequence[int]]
    rounding: Rounding
    written: Written
    inputs: InputFile

    def parts(self) -> Iterator[tuple[Sequence[int], Tensor | None]]:
        """Rows of each batch, and the source's input of its router, folded; None where there is no router."""
        router = router_of(self.number)
        change = InputTransforms(self.written.folds).of(router)
        routed = (torch.from_numpy(change(x.float().numpy())) for x in self.inputs.batches(router))
        return ((batch, next(routed, None)) for batch in self.batches if batch)


class QuantizedStream:
    """Hidden states after the quantized layers; before the first one they are the source's.

    Attributes:
        states: of the rows, in the compute dtype.
        reached: inputs of the weights in work, as the quantized ones before give them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: NemotronHConfig,
        source: InFiles,
        states: InFiles,
        reached: InputFile,
        device: torch.device,
    ) -> None:
        self._checkpoint, self._config, self._device = checkpoint, config, device
        self._source, self.states, self.reached = source, states, reached

    def solve(self, layer: Layer, rows: Sequence[Row], solve: Callable[[Sequence[Row]], None]) -> None:
        """Call ``solve`` with some of a layer's rows after the other, then go on to the next layer.

        Raises:
            CalibrationError: the stream came to NaN or Inf where the source's did not.
        """
        for part in stages(self._config.layers[layer.number], rows):
            self._observe(layer, part)
            solve(part)
            layer.written.add(part)
        self.reached.clear()
        for batch, routed in layer.parts():
            self.states.write(batch, self._through(layer, batch, routed))
        self.states.turn()

    def solve_head(
        self, batches: Sequence[Sequence[int]], rows: Sequence[Row], solve: Callable[[Sequence[Row]], None]
    ) -> None:
        """The same with the head, after which no layer comes."""
        self.reached.clear()
        norm = LayerWeights(self._checkpoint, f"{names.FINAL_NORM}.")["weight"]
        for batch in batches:
            x = rms_norm(self.states.read(batch).to(self._device), norm, self._config.norm_eps)
            self.reached.keep([(names.HEAD, self.reached.append(x.flatten(0, 1)))])
        solve(rows)

    def close(self) -> None:
        self.states.close()
        self.reached.close()

    def _observe(self, layer: Layer, rows: Sequence[Row]) -> None:
        """Keep the inputs of some rows; of a writer also what the stream lacks without it."""
        self.reached.clear()
        writers = {row.name: output_of(row) for row in rows if row.role in WRITERS}
        for batch, routed in layer.parts():
            try:
                output = self._through(layer, batch, routed, _Keeper(self.reached, rows), writers)
            except _Enough:
                continue
            lacking = (self._source.read(batch).float() - output.float()).to(output.dtype)
            place = self.reached.append(lacking.flatten(0, 1))
            self.reached.keep((name, place) for name in writers.values())

    def _through(
        self,
        layer: Layer,
        batch: Sequence[int],
        routed: Tensor | None,
        keep: Callable[[str, Tensor], None] = lambda name, x: None,
        without: Collection[str] = (),
    ) -> Tensor:
        """A batch through the layer, as far as it is known.

        Args:
            routed: the source's input of the router.
            keep: receives all inputs.
            without: tensors that are taken as zero.
        """
        prefix, kind = names.layer(layer.number), self._config.layers[layer.number]

        def check(what: str, x: Tensor) -> None:
            if x.numel() and not torch.isfinite(torch.stack(torch.aminmax(x))).all():  # one pass, no mask
                raise CalibrationError(
                    f"layer {layer.number} ({kind}): NaN or Inf in {what} on the stream of the quantized "
                    f"layers, where the source's is finite; expected finite activations, try --compute "
                    f"float32, or --propagate source"
                )

        def tap(name: str, x: Tensor) -> Tensor:
            check(f"the input of {name}", x)
            keep(name, x)
            if routed is not None and name == router_of(layer.number):
                return routed.to(x)
            rule = layer.rounding.get(name)
            return x if rule is None else _rounded(x, *rule)

        weights = WrittenWeights(layer.written, prefix, without)
        states = self.states.read(batch) if layer.number else self._source.before(batch)
        config, moved = self._config.of_layer(layer.number), states.to(self._device)
        output = layer_forward(config, kind, weights, moved, None, prefixed(tap, prefix))[0]
        weights.release()
        check("its output", output)
        return output.cpu()


class _Keeper:
    """Keeps the inputs of some rows in one batch. It ends the pass by _Enough when a writer is not among them
    and no more of them can come.
    """

    def __init__(self, file: InputFile, rows: Sequence[Row]) -> None:
        self._file, self._wanted = file, {input_of(row) for row in rows}
        self._missing = {input_of(row) for row in rows if row.expert is None}
        self._experts = any(row.expert is not None for row in rows)
        self._began = False
        self._whole = any(row.role in WRITERS for row in rows)

    def __call__(self, name: str, x: Tensor) -> None:
        if name in self._wanted:
            self._file.keep([(name, self._file.append(x))])
            self._missing.discard(name)
        if names.is_expert(name):
            self._began = True
        elif self._began:
            self._experts = False  # all of them come together
        if not (self._whole or self._experts or self._missing):
            raise _Enough


def _rounded(x: Tensor, number: FormatName, scale: np.float32) -> Tensor:
    """An input as an engine rounds it, in its own dtype."""
    made = torch.empty_like(x)
    step = max(1, _ROUNDED * len(x) // x.numel())
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        made[part] = rounded(x[part].float(), number, scale)
    return made

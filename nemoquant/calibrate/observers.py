"""Observers see the inputs of one batch; collectors join what the observers of all batches collected.

    observer    made for each batch of rows in each layer, on the machine that computes it; what it collected
                is sent back
    collector   one for the whole run, in the process of the run; after each layer it keeps its results, or
                writes them to a file and forgets them

A new quantity (second moments, a Hessian) is a new pair; nothing else in calibration changes. An observer may
collect arrays: they live until their layer is finished.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nemoquant.calibrate.scales import Scales
from nemoquant.model import names
from nemoquant.model.config import NemotronHConfig


class Observer(Protocol):
    """Sees one batch of rows in one layer."""

    def observe(self, name: str, x: Tensor) -> Tensor:
        """A tap (see ``model/taps.py``) by full names, ``x`` [tokens, in]; returns ``x`` unchanged."""

    def collect(self) -> Any:
        """The results, on the CPU, as data that can be pickled."""


class Collector(Protocol):
    """Joins what the observers of a layer's batches collected.

    Attributes:
        name: key of its entry in the state that ``--resume`` reads.
    """

    name: str

    @property
    def observer(self) -> Callable[[], Observer]:
        """Makes an observer: a class or a function of a module, so that it can be sent to another machine."""

    def add(self, collected: Any) -> None:
        """Take the results of one batch; batches come in order."""

    def finish(self, layer: int | None, batches: Sequence[Sequence[int]]) -> None:
        """Called when all batches of a layer were added; None stands for the head.

        ``batches`` are the numbers of the rows of each, without those that were left out.
        """

    def state(self) -> Any:
        """JSON data to keep after a layer: the results, or names and hashes of the files that hold them."""

    def restore(self, state: Any) -> None:
        """Go back to the result of :meth:`state`. Raises CalibrationError where a file has changed."""


class Maxima(NamedTuple):
    """Results of an :class:`AmaxObserver`: module -> amax of its input, expert -> number of its tokens."""

    amax: dict[str, float]
    tokens: dict[int, int]


class AmaxObserver:
    """Keeps max |x| of each module's input, in float32, and counts the tokens of experts.

    Maxima stay on the device until :meth:`collect`: each single read would wait for the device.
    """

    def __init__(self) -> None:
        self._amax: dict[str, Tensor] = {}
        self._tokens: dict[int, int] = {}

    def observe(self, name: str, x: Tensor) -> Tensor:
        low, high = torch.aminmax(x)
        amax = torch.maximum(-low, high)
        seen = self._amax.get(name)
        self._amax[name] = amax if seen is None else torch.maximum(seen, amax)
        expert = names.expert_number(name, "up_proj")
        if expert is not None:
            self._tokens[expert] = self._tokens.get(expert, 0) + x.shape[0]
        return x

    def collect(self) -> Maxima:
        values = torch.stack([amax.float() for amax in self._amax.values()]).tolist() if self._amax else []
        return Maxima(dict(zip(self._amax, values, strict=True)), self._tokens)


class AmaxCollector:
    """Puts the maxima and the experts' tokens into ``scales``."""

    name = "scales"
    observer = AmaxObserver

    def __init__(self, config: NemotronHConfig, scales: Scales) -> None:
        self.config, self.scales = config, scales
        self._amax: dict[str, float] = {}
        self._tokens: dict[int, int] = {}

    def add(self, collected: Maxima) -> None:
        for name, amax in collected.amax.items():
            self._amax[name] = max(amax, self._amax.get(name, 0.0))
        for expert, count in collected.tokens.items():
            self._tokens[expert] = self._tokens.get(expert, 0) + count

    def finish(self, layer: int | None, batches: Sequence[Sequence[int]]) -> None:  # noqa: ARG002
        for name, amax in self._amax.items():
            if name.endswith(names.OUTPUT):
                self.scales.kv_amax[name.removesuffix(names.OUTPUT)] = amax
            elif not name.endswith(f".{names.ROUTER}"):
                self.scales.input_amax[name] = amax
        if layer is not None and self.config.layers[layer] == "moe":
            experts = range(self.config.of_layer(layer).n_routed_experts)
            self.scales.tokens_per_expert[layer] = [self._tokens.get(expert, 0) for expert in experts]
        self._amax, self._tokens = {}, {}

    def state(self) -> dict[str, Any]:
        return self.scales.to_json()

    def restore(self, state: dict[str, Any]) -> None:
        self.scales = Scales.from_json(state)

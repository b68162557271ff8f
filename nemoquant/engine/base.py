"""What an engine is: something that runs a model's tokens from a state on. ``generate`` and ``diff`` know no
more of it.

torch         the functional model over packed weights, no graph: always there
onnxruntime   ``model.onnx`` on the CPU; the extra `ort` (or `gpu`)
rtx           an engine file of TensorRT-RTX: built anywhere, run on a GPU; the extra `rtx`
trt           an engine file of TensorRT: built and run on a GPU, with the plugins; the extra `trt`
"""

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

ENGINES = ("torch", "onnxruntime", "rtx", "trt")

Tokens = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Step:
    """What one call gave: logits [batch, length, vocabulary] and ``hidden`` [batch, length, hidden] (what MTP
    is given; None where the graph does not put it out), float32; ``state`` goes into the next call."""

    logits: Floats
    hidden: Floats | None
    state: Any


class Engine(Protocol):
    """A model that can be run. ``has_mtp`` says whether ``draft`` can be called; ``max_seq_len`` are the most
    positions of a sequence, None is no limit."""

    name: str
    has_mtp: bool
    max_seq_len: int | None

    def forward(self, tokens: Tokens, state: Any = None) -> Step:
        """tokens [batch, length], from ``state`` on; None is the start of a sequence."""

    def draft(self, tokens: Tokens, hidden: Floats, state: Any = None) -> Step:
        """The first MTP module: ``tokens`` [batch, length] come after the positions of ``hidden`` [batch,
        length, hidden]."""

    def describe(self) -> dict[str, Any]:
        """Facts for people and JSON: runtime, version, device, dtypes."""


class LoadedGraph(Protocol):
    """A loaded graph that ends with the head."""

    def step(self, feeds: dict[str, Any], state: Any) -> Step:
        """One call: ``feeds`` by the names of the graph's inputs, from ``state`` on."""


G = TypeVar("G", bound=LoadedGraph)


class GraphEngine(Generic[G]):
    """What engines over exported graphs have in common: the main graph, and the multi-token-prediction
    module's, which may be None."""

    main: G
    mtp: G | None

    def forward(self, tokens: Tokens, state: Any = None) -> Step:
        """As :class:`Engine` has it."""
        return self.main.step({"input_ids": tokens}, state)

    def draft(self, tokens: Tokens, hidden: Floats, state: Any = None) -> Step:
        """As :class:`Engine` has it."""
        assert self.mtp is not None
        return self.mtp.step({"input_ids": tokens, "hidden": hidden}, state)

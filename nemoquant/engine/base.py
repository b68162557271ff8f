"""The interface of an engine, which runs tokens from a state on; ``generate`` and ``diff`` need no more."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from nemoquant.checkpoint.intact import Intact

Tokens = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Step:
    """Result of one call, in float32.

    ``logits`` are [batch, length, vocabulary], ``hidden`` [batch, length, hidden] (input of MTP; None where
    the graph does not output it); ``state`` goes into the next call.
    """

    logits: Floats
    hidden: Floats | None
    state: Any


class Engine(Protocol):
    """A model that can be run.

    ``has_mtp`` is whether ``draft`` can be called; ``max_seq_len`` is the largest number of positions of a
    sequence, None is no limit; ``intact`` is its folder, if its shards were hashed to load it.
    """

    name: str
    has_mtp: bool
    max_seq_len: int | None
    intact: Intact | None

    def forward(self, tokens: Tokens, state: Any = None) -> Step:
        """Run tokens [batch, length] from ``state`` on; None is the start of a sequence."""

    def draft(self, tokens: Tokens, hidden: Floats, state: Any = None) -> Step:
        """Run the first MTP module: ``tokens`` [batch, length] follow ``hidden`` [batch, length, hidden]."""

    def describe(self) -> dict[str, Any]:
        """Facts for people and JSON: runtime, version, device, dtypes."""


Admit = Callable[[Engine], None]
"""Called once ``has_mtp`` and ``max_seq_len`` of an engine are known, before a weight is read; raises
where they do not suffice."""


def admit_any(engine: Engine) -> None:
    """An Admit that refuses none."""


class LoadedGraph(Protocol):
    """A loaded graph that ends with the head."""

    def step(self, feeds: dict[str, Any], state: Any) -> Step:
        """One call: ``feeds`` by the names of the graph's inputs, from ``state`` on."""


G = TypeVar("G", bound=LoadedGraph)


class GraphEngine(Generic[G]):
    """Common part of engines over exported graphs: the main graph, and that of MTP, which may be None."""

    main: G
    mtp: G | None

    def forward(self, tokens: Tokens, state: Any = None) -> Step:
        """See :class:`Engine`."""
        return self.main.step({"input_ids": tokens}, state)

    def draft(self, tokens: Tokens, hidden: Floats, state: Any = None) -> Step:
        """See :class:`Engine`."""
        assert self.mtp is not None
        return self.mtp.step({"input_ids": tokens, "hidden": hidden}, state)

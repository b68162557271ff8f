"""What there is to know about a kind of layer, before any weight is read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from nemoquant.model.config import NemotronHConfig

PAST = -1  # a dimension of a state: the positions so far


class MixerTensor(NamedTuple):
    """A tensor of a mixer; ``name`` is relative to the mixer, the rest as in ``roles.TensorSpec``."""

    name: str
    role: str
    shape: tuple[int, ...]
    expert: int | None = None
    dtype: str = "BF16"


def weight(module: str, role: str, *shape: int, expert: int | None = None) -> MixerTensor:
    """The weight of a module."""
    return MixerTensor(f"{module}.weight", role, shape, expert)


class StateTensor(NamedTuple):
    """A tensor that a layer keeps between calls, of one sequence.

    Attributes:
        name: as a graph's input, without the layer's number.
        dtype: float32, that of the activations, or that of the KV cache.
        shape: without the batch, the first dimension; one dimension may be ``PAST``.
    """

    name: str
    dtype: Literal["float32", "compute", "cache"]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of layer. Functions take the config; torch's side is in ``reference.py``.

    Attributes:
        letter: in ``hybrid_override_pattern``.
        title: for people.
        spellings: other names of it in lists of layers.
        linear: role of each weight of a GEMM -> what it is, for people.
        sizes: fields of the config that a layer of this kind may have for itself.
        groups: the first part of those roles -> what such modules are together, for people.
        order: those roles in groups; the inputs of each group depend on the groups before it alone. What the
            last ones put out is added to the stream.
        other: the other roles of its mixer's tensors, ``norm`` aside, which all layers have.
        tensors: of a mixer, in file order.
        projections: its GEMMs in the order of a graph's function; all experts of a projection are one.
        states: what it keeps between calls, in the order of the state's fields in torch.
        batch_bytes: with the bytes of an activation, bytes that the reference model holds at its peak beside
            the stream: those of a token, and those of a row.
        live_values: float32 values a token that are alive at once in a diff, beside the stream, about.
    """

    letter: str
    title: str
    spellings: tuple[str, ...]
    sizes: tuple[str, ...]
    linear: Mapping[str, str]
    groups: Mapping[str, str]
    order: tuple[tuple[str, ...], ...]
    other: tuple[str, ...]
    tensors: Callable[[NemotronHConfig], Iterator[MixerTensor]]
    projections: Callable[[NemotronHConfig], tuple[str, ...]]
    states: Callable[[NemotronHConfig], tuple[StateTensor, ...]]
    batch_bytes: Callable[[NemotronHConfig, int], tuple[int, int]]
    live_values: Callable[[NemotronHConfig], int]


def stateless(config: NemotronHConfig) -> tuple[StateTensor, ...]:  # noqa: ARG001
    """The states of a layer that keeps nothing between calls."""
    return ()

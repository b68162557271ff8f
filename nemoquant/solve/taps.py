"""Names that inputs of weights, and what these should put out, are kept under."""

from nemoquant.model import names
from nemoquant.planning.row import Row

_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_NORMED = ("shared_experts.up_proj", "latent.fc1")


def input_of(row: Row) -> str:
    """The tap that a row's input is kept under: what several weights read is kept once."""
    if row.role in _QKV:
        return names.mixer_of(row.module) + "q_proj"
    if row.role in _NORMED:
        return router_of(row.layer or 0)
    return row.module


def output_of(row: Row) -> str:
    """The name for what a weight that writes the stream should put out."""
    return f"{row.module}{names.OUTPUT}"


def router_of(layer: int) -> str:
    """The tap of a layer's router."""
    return f"{names.layer(layer)}{names.MIXER}{names.ROUTER}"

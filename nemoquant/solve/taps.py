"""The name that the input of a weight is kept under."""

from nemoquant.model import names
from nemoquant.planning.row import Row

_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_NORMED = ("shared_experts.up_proj", "latent.fc1")


def input_of(row: Row) -> str:
    """The tap that a row's input is kept under: what several weights read is kept once."""
    if row.role in _QKV:
        return names.mixer_of(row.module) + "q_proj"
    if row.role in _NORMED:
        return f"{names.layer(row.layer or 0)}{names.MIXER}{names.ROUTER}"
    return row.module

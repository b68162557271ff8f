"""The dense MLP layer; ``model/mlp.py`` computes it."""

from collections.abc import Iterator

from nemoquant.model.config import NemotronHConfig
from nemoquant.model.kinds.record import Kind, MixerTensor, stateless, weight


def tensors(c: NemotronHConfig) -> Iterator[MixerTensor]:
    yield weight("up_proj", "mlp.up_proj", c.intermediate_size, c.hidden_size)
    yield weight("down_proj", "mlp.down_proj", c.hidden_size, c.intermediate_size)


MLP = Kind(
    letter="-",
    title="MLP",
    spellings=(),
    sizes=("intermediate_size",),
    linear={"mlp.up_proj": "the MLP's up projection", "mlp.down_proj": "the MLP's down projection"},
    groups={"mlp": "the MLP"},
    order=(("mlp.up_proj",), ("mlp.down_proj",)),
    other=(),
    tensors=tensors,
    projections=lambda _: ("up_proj", "down_proj"),
    states=stateless,
    batch_bytes=lambda c, item: (item * c.intermediate_size, 0),
    live_values=lambda c: 2 * c.intermediate_size,
)

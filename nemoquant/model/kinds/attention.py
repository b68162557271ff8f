"""The attention layer; ``model/attention.py`` computes it."""

from collections.abc import Iterator

from nemoquant.model.config import NemotronHConfig
from nemoquant.model.kinds.record import PAST, Kind, MixerTensor, StateTensor, weight


def tensors(c: NemotronHConfig) -> Iterator[MixerTensor]:
    query, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    yield weight("q_proj", "attention.q_proj", query, c.hidden_size)
    yield weight("k_proj", "attention.k_proj", kv, c.hidden_size)
    yield weight("v_proj", "attention.v_proj", kv, c.hidden_size)
    yield weight("o_proj", "attention.o_proj", c.hidden_size, query)


def states(c: NemotronHConfig) -> tuple[StateTensor, ...]:
    shape = (c.num_key_value_heads, PAST, c.head_dim)
    return StateTensor("past_key", "cache", shape), StateTensor("past_value", "cache", shape)


def batch_bytes(c: NemotronHConfig, item: int) -> tuple[int, int]:
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return item * (4 * queries + 4 * keys), 0


ATTENTION = Kind(
    letter="*",
    title="attention",
    spellings=("full_attention",),
    sizes=("num_attention_heads", "num_key_value_heads", "head_dim"),
    linear={
        "attention.q_proj": "attention's q_proj",
        "attention.k_proj": "attention's k_proj",
        "attention.v_proj": "attention's v_proj",
        "attention.o_proj": "attention's o_proj",
    },
    groups={"attention": "attention"},
    order=(("attention.q_proj", "attention.k_proj", "attention.v_proj"), ("attention.o_proj",)),
    other=(),
    tensors=tensors,
    projections=lambda _: ("q_proj", "k_proj", "v_proj", "o_proj"),
    states=states,
    batch_bytes=batch_bytes,
    live_values=lambda c: 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim,
)

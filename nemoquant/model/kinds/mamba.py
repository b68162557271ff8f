"""The Mamba-2 layer; ``model/mamba2.py`` computes it."""

from collections.abc import Iterator

from nemoquant.model.config import NemotronHConfig
from nemoquant.model.kinds.record import Kind, MixerTensor, StateTensor, weight

# Positions. On two cores 32 takes as long, 128 a third longer. Results depend on it by rounding only.
CHUNK = 64
SSM_STATE = "ssm_state"


def tensors(c: NemotronHConfig) -> Iterator[MixerTensor]:
    inner, heads = c.mamba_inner, c.mamba_num_heads
    yield MixerTensor("A_log", "ssm.A_log", (heads,))
    yield MixerTensor("D", "ssm.D", (heads,))
    yield MixerTensor("dt_bias", "ssm.dt_bias", (heads,))
    yield weight("conv1d", "conv1d", c.conv_channels, 1, c.conv_kernel)
    if c.use_conv_bias:
        yield MixerTensor("conv1d.bias", "conv1d", (c.conv_channels,))
    yield weight("norm", "norm", inner)
    yield weight("in_proj", "mamba.in_proj", inner + c.conv_channels + heads, c.hidden_size)
    yield weight("out_proj", "mamba.out_proj", c.hidden_size, inner)


def states(c: NemotronHConfig) -> tuple[StateTensor, ...]:
    return (
        StateTensor("conv_state", "compute", (c.conv_channels, c.conv_kernel - 1)),
        StateTensor(SSM_STATE, "float32", (c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size)),
    )


def batch_bytes(c: NemotronHConfig, item: int) -> tuple[int, int]:
    """A token: projection, convolution, scan's result, gated norm. A row: a chunk of the scan."""
    inner, heads = c.mamba_inner, c.mamba_num_heads
    projected = inner + c.conv_channels + heads
    token = projected * item + c.conv_channels * (item + 4) + inner * (4 + item) + heads * 8
    chunk = heads * CHUNK * CHUNK * 16 + 6 * CHUNK * inner * 4 + 3 * inner * c.ssm_state_size * 4
    return token, chunk


MAMBA = Kind(
    letter="M",
    title="Mamba-2",
    spellings=("linear_attention",),
    sizes=("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "use_conv_bias"),
    linear={"mamba.in_proj": "Mamba's input projection", "mamba.out_proj": "Mamba's output projection"},
    groups={"mamba": "Mamba projections"},
    order=(("mamba.in_proj",), ("mamba.out_proj",)),
    other=("conv1d", "ssm.A_log", "ssm.D", "ssm.dt_bias"),
    tensors=tensors,
    projections=lambda _: ("in_proj", "out_proj"),
    states=states,
    batch_bytes=batch_bytes,
    live_values=lambda c: 3 * c.mamba_inner + 4 * c.conv_channels,
)

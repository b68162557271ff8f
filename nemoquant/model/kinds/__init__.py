"""The kinds of layers, a file each: everything that is known about a kind without torch.

Three more tables by kind exist, because they need torch and ONNX: ``BLOCKS`` in ``reference.py``, ``MIXERS``
in ``gradients.py``, and ``LAYER_GRAPHS`` in ``graph/layers.py``. A test holds that all have every kind.
"""

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from nemoquant.model.config import LayerKind, NemotronHConfig
from nemoquant.model.kinds.attention import ATTENTION
from nemoquant.model.kinds.mamba import MAMBA, SSM_STATE
from nemoquant.model.kinds.mlp import MLP
from nemoquant.model.kinds.moe import MOE
from nemoquant.model.kinds.record import PAST, Kind, StateTensor

KINDS: Mapping[LayerKind, Kind] = MappingProxyType(
    {"mamba": MAMBA, "moe": MOE, "attention": ATTENTION, "mlp": MLP}
)


def states(config: NemotronHConfig) -> Iterator[StateTensor]:
    """The states of all layers of the main model."""
    return (state for i, kind in enumerate(config.layers) for state in KINDS[kind].states(config.of_layer(i)))


def has_cache(config: NemotronHConfig, kind: LayerKind) -> bool:
    """Whether layers of a kind put keys and values into a cache."""
    return any(state.dtype == "cache" for state in KINDS[kind].states(config))


def kv_values_per_token(config: NemotronHConfig) -> int:
    """Values of K and V that a token puts into the caches of the main model."""
    shapes = (state.shape for state in states(config) if state.dtype == "cache")
    return sum(math.prod(n for n in shape if n != PAST) for shape in shapes)


def ssm_state_bytes(config: NemotronHConfig) -> int:
    """Bytes of a sequence's scan states in the main model, in the config's ``mamba_ssm_cache_dtype``."""
    item = 4 if config.mamba_ssm_cache_dtype == "float32" else 2
    return item * sum(math.prod(state.shape) for state in states(config) if state.name == SSM_STATE)

"""What stands beside the language model in a checkpoint: encoders of images and sound, projectors."""

from collections.abc import Mapping

from nemoquant.checkpoint.header import ITEM_SIZE, TensorInfo
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.nested import TOWER, tower_names
from nemoquant.model.roles import TensorSpec


def towers(config: NemotronHConfig, tensors: Mapping[str, TensorInfo]) -> list[TensorSpec]:
    """The tensors of a checkpoint that are not the language model's, in the order in which they are written.

    Args:
        tensors: all of the checkpoint's, by published names.
    """
    table = [
        TensorSpec(name, TOWER, tensors[name].shape, dtype=tensors[name].dtype)
        for name in tower_names(tensors, config.prefix)
    ]
    return sorted(table, key=lambda spec: (-ITEM_SIZE[spec.dtype], spec.name))  # so that all are aligned

"""What stands beside the language model in a checkpoint: encoders of images and sound, projectors."""

from collections import Counter
from collections.abc import Iterable, Mapping

from nemoquant.checkpoint.header import ITEM_SIZE, TensorInfo
from nemoquant.errors import listing
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


def parts(table: Iterable[TensorSpec]) -> dict[str, int]:
    """The first part of the names of towers -> the number of its tensors."""
    return dict(Counter(spec.name.split(".")[0] for spec in table if spec.role == TOWER))


def text_only(table: Iterable[TensorSpec]) -> str:
    """A warning for whoever computes with the language model alone."""
    found = [f"{part} ({count:,} tensors)" for part, count in parts(table).items()]
    return f"its language model alone is computed, on text: {listing(found)} beside it are not"


def beside_unknown(config: NemotronHConfig) -> tuple[str, ...]:
    """A warning for a config.json alone, which does not list the tensors of towers."""
    told = "sizes are those of its language model: what stands beside it is copied, and no config lists it"
    return (told,) if config.prefix else ()

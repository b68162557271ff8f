"""A source to quantize: config and tensor table, from a checkpoint folder or from a bare config.json."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemoquant.checkpoint.reader import Checkpoint, check_table
from nemoquant.errors import CheckpointError, listing
from nemoquant.layouts.modelopt import quantized_by
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.parse import load_config
from nemoquant.model.roles import TensorSpec, tensor_table

FLOAT_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class BareConfig:
    """A source that is a config.json alone; the dtypes of its table are assumed."""

    path: Path
    config: NemotronHConfig
    raw_config: dict[str, Any]
    table: list[TensorSpec]


@dataclass(frozen=True)
class Source:
    """A source with weights, from a folder.

    Attributes:
        table: the tensor table, with the dtypes of the file.
        checkpoint: opened.
    """

    path: Path
    config: NemotronHConfig
    raw_config: dict[str, Any]
    table: list[TensorSpec]
    checkpoint: Checkpoint


def open_source(path: Path) -> Source | BareConfig:
    """Read the config, and all headers if ``path`` is a folder; no weight is read.

    Raises:
        CheckpointError: or one of its kinds: not a Nemotron-H checkpoint, already quantized, tensors missing,
            extra or misshapen, or of a dtype that is no float.
    """
    config, raw = load_config(path)
    table = tensor_table(config)
    if not path.is_dir():
        return BareConfig(path, config, raw, table)
    evidence = quantized_by(path, raw)
    if evidence is not None:
        raise CheckpointError(
            f"{path} is already quantized ({evidence}); expected the bf16 checkpoint that it was made from, "
            f"or what `nemoquant convert --to bf16` makes of it"
        )
    checkpoint = Checkpoint(path)
    check_table(path, table, checkpoint.tensors)
    table = [replace(spec, dtype=checkpoint.tensors[spec.name].dtype) for spec in table]
    wrong = [f"{spec.name} {spec.dtype}" for spec in table if spec.dtype not in FLOAT_DTYPES]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors are not floating ({listing(wrong)}); expected "
            f"{', '.join(FLOAT_DTYPES)}"
        )
    return Source(path, config, raw, table, checkpoint)


def open_weights(path: Path, needs: str) -> Source:
    """A source with its weights.

    Args:
        needs: the end of the message: who expects what instead of a config.json.
    Raises:
        CheckpointError: see :func:`open_source`; or ``path`` is a bare config.
    """
    opened = open_source(path)
    if isinstance(opened, BareConfig):
        raise CheckpointError(f"{path} is a config.json; {needs}")
    return opened

"""A source to quantize: config and tensor table, from a checkpoint folder or from a bare config.json."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.towers import beside_unknown
from nemoquant.errors import CheckpointError, listing
from nemoquant.layouts.modelopt import quantized_by
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.nested import TOWER
from nemoquant.model.parse import load_config
from nemoquant.model.roles import TensorSpec, tensor_table
from nemoquant.sources.fitting import fit

FLOAT_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class BareConfig:
    """A source that is a config.json alone; the dtypes of its table are assumed."""

    path: Path
    config: NemotronHConfig
    raw_config: dict[str, Any]
    table: list[TensorSpec]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A source with weights, from a folder.

    Attributes:
        table: the tensor table, with the dtypes of the file.
        raw_config: of the output: with what was put right, where the file does not fit the tensors.
        checkpoint: opened.
        warnings: what was put right, a sentence each.
    """

    path: Path
    config: NemotronHConfig
    raw_config: dict[str, Any]
    table: list[TensorSpec]
    checkpoint: Checkpoint
    warnings: tuple[str, ...]


def open_source(path: Path) -> Source | BareConfig:
    """Read the config, and all headers if ``path`` is a folder; no weight is read.

    Raises:
        CheckpointError: or one of its kinds: not a Nemotron-H checkpoint, already quantized, tensors missing,
            extra or misshapen, or of a dtype that is no float.
    """
    config, raw = load_config(path)
    evidence = quantized_by(path, raw)
    if evidence is not None:
        raise CheckpointError(
            f"{path} is already quantized ({evidence}); expected the bf16 checkpoint that it was made from, "
            f"or what `nemoquant convert --to bf16` makes of it"
        )
    if not path.is_dir():
        return BareConfig(path, config, raw, tensor_table(config), beside_unknown(config))
    checkpoint = Checkpoint(path)
    fitted = fit(path, raw, checkpoint)
    table = [replace(spec, dtype=checkpoint.tensors[spec.name].dtype) for spec in fitted.table]
    wrong = [spec for spec in table if spec.dtype not in FLOAT_DTYPES and spec.role != TOWER]
    if wrong:
        names = listing([f"{spec.name} {spec.dtype}" for spec in wrong])
        advice = (
            "cast them to bf16"
            if all(spec.dtype == "F64" for spec in wrong)
            else "it was quantized already, by a tool that left no word of it in config.json: take the bf16 "
            "checkpoint that it was made from"
        )
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors are of dtypes that are not read as weights ({names}); expected "
            f"{', '.join(FLOAT_DTYPES)}: {advice}"
        )
    return Source(path, fitted.config, fitted.raw, table, checkpoint, tuple(fitted.warnings))


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

"""Which layout a checkpoint is in: chosen here, by what its config.json declares, and nowhere else."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nemoquant.checkpoint.header import TensorInfo
from nemoquant.errors import CheckpointError, brief
from nemoquant.formats import CacheFormat, FormatName
from nemoquant.layouts import compressed_tensors, modelopt
from nemoquant.layouts.modelopt import Stored
from nemoquant.model.nested import sections
from nemoquant.model.roles import TensorSpec

Formats = Mapping[str, Literal["source", FormatName]]


@dataclass(frozen=True)
class Reading:
    """How a layout is read.

    Attributes:
        name: for people.
        expected: what checkpoints in it can be read, for messages.
        engine_bytes: whether its scales are fp32 decode scales, so that a graph can point to them.
        find_stored: how a tensor of the model is stored; raises CheckpointError.
        declared: what a folder declares about its quantization, an algorithm for each module, in the form of
            ``modelopt.declared_quantization``; takes folder, config.json and the modules of GEMMs.
        contradictions: what it declares against its own tensors; takes folder, config.json, module -> format.
        kv_scale_name: projection of keys or values -> the tensor with the scale of its cache.
        weight_format: what a tensor that holds a weight is, for people; None for other tensors.
        describe: the whole quantization for people, None if there is none; and what is declared of the cache.
    """

    name: str
    expected: str
    engine_bytes: bool
    find_stored: Callable[[Mapping[str, TensorInfo], TensorSpec], Stored]
    declared: Callable[[Path, Mapping[str, Any], Iterable[str]], dict[str, Any]]
    contradictions: Callable[[Path, Mapping[str, Any], Formats], list[str]]
    kv_scale_name: Callable[[str], str]
    weight_format: Callable[[Mapping[str, TensorInfo], str], str | None]
    describe: Callable[[Path, Mapping[str, Any]], tuple[str | None, dict[str, Any]]]


def _modelopt_weight(tensors: Mapping[str, TensorInfo], name: str) -> str | None:
    return modelopt.weight_format(tensors, name) if name.endswith(".weight") else None


def _describe_modelopt(path: Path, raw: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    declared = modelopt.declared_quantization(path, raw)
    return modelopt.declared_algorithm(declared), declared


MODELOPT = Reading(
    name="ModelOpt",
    expected=f"the ModelOpt layout with {modelopt.READABLE}, or unquantized tensors",
    engine_bytes=True,
    find_stored=modelopt.find_stored,
    declared=lambda path, raw, modules: modelopt.declared_quantization(path, raw),
    contradictions=modelopt.contradictions,
    kv_scale_name=modelopt.kv_scale_name,
    weight_format=_modelopt_weight,
    describe=_describe_modelopt,
)
COMPRESSED_TENSORS = Reading(
    name=compressed_tensors.METHOD,
    expected=f"the compressed-tensors layout with {compressed_tensors.READABLE}",
    engine_bytes=False,
    find_stored=compressed_tensors.find_stored,
    declared=compressed_tensors.declared_quantization,
    contradictions=compressed_tensors.contradictions,
    kv_scale_name=compressed_tensors.kv_scale_name,
    weight_format=compressed_tensors.weight_format,
    describe=compressed_tensors.describe,
)


def is_read(path: Path, raw_config: Mapping[str, Any]) -> bool:
    """Whether the layout that a config.json declares is one of these, or it declares none."""
    return _other(path, raw_config) is None


def _other(path: Path, raw_config: Mapping[str, Any]) -> str | None:
    if compressed_tensors.is_in(raw_config):
        return f"{compressed_tensors.METHOD}, inside another model" if sections(raw_config) else None
    return modelopt.other_method(path, raw_config)


def layout_of(path: Path, raw_config: Mapping[str, Any]) -> Reading:
    """The layout that a config.json declares; ModelOpt's where it declares none.

    Raises:
        CheckpointError: it is another tool's, which is not read here; names the method.
    """
    other = _other(path, raw_config)
    if other is not None:
        raise CheckpointError(
            f"{path} is quantized by the method {brief(other)}; expected {modelopt.PRODUCER} or "
            f"{compressed_tensors.METHOD}, or the bf16 checkpoint that it was made from"
        )
    return COMPRESSED_TENSORS if compressed_tensors.is_in(raw_config) else MODELOPT


def described(path: Path, raw_config: Mapping[str, Any]) -> tuple[Reading, str | None, CacheFormat | None]:
    """The layout, the quantization for people (its name, of a method not read here), and the cache."""
    other = _other(path, raw_config)
    if other is not None:
        return MODELOPT, f"{other} (not read here)", None
    layout = layout_of(path, raw_config)
    quantization, declared = layout.describe(path, raw_config)
    if quantization is None and modelopt.names_no_method(raw_config):
        quantization = f"`{modelopt.SECTION}` names no method (not read here)"
    return layout, quantization, modelopt.declared_cache(declared)

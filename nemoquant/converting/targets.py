"""What a checkpoint becomes: for each target its tensors, its config, and what a user must know."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from nemoquant.converting import Target
from nemoquant.converting.tensors import Tensor, copied, decoded, scalar
from nemoquant.errors import CheckpointError, listing
from nemoquant.formats import FORMATS, FormatName
from nemoquant.formats.bf16 import rounded, rounded_up, value_of
from nemoquant.layouts import compressed_tensors
from nemoquant.layouts.beside import in_file
from nemoquant.layouts.choose import COMPRESSED_TENSORS
from nemoquant.layouts.modelopt import SECTION
from nemoquant.model.nested import TOWER, without_key
from nemoquant.model.parse import without_mtp
from nemoquant.model.roles import TensorSpec
from nemoquant.quantized.checkpoint import PackedCheckpoint

# Why weights of a format are not written for transformers, whose compressed-tensors was run (5.19, on a CPU).
REFUSED: Mapping[FormatName, str | None] = MappingProxyType(
    {
        "fp8": None,
        "mxfp8": "transformers 5.19 takes a scale of a block for that of a tensor and fails to load experts",
        "nvfp4": "transformers 5.19 ignores the global scale of fused experts and computes nonsense, without "
        "an error",
    }
)
NO_GEMM = (
    "norm",
    "embedding",
    "ssm.A_log",
    "ssm.D",
    "ssm.dt_bias",
    "router.bias",
)  # roles; the rest is ignored


@dataclass(frozen=True)
class Conversion:
    """What will be written.

    Attributes:
        tensors: in file order.
        config: the new config.json.
        decoded: modules by format whose weights are decoded.
        notes: what changes in the numbers, a sentence each; shown, and in the card.
        warnings: what a user should know besides.
    """

    tensors: list[Tensor]
    config: dict[str, Any]
    decoded: Mapping[str, int]
    notes: list[str]
    warnings: list[str]


def _quantized(opened: PackedCheckpoint) -> dict[FormatName, list[TensorSpec]]:
    """The quantized weights by format; raises CheckpointError where there are none."""
    found: dict[FormatName, list[TensorSpec]] = {}
    for spec in opened.table:
        stored = opened.stored.get(spec.name)
        if stored is not None and stored.format != "source":
            found.setdefault(stored.format, []).append(spec)
    if not found:
        raise CheckpointError(f"{opened.path} has no quantized weight; expected a quantized checkpoint")
    return found


def _cache_notes(opened: PackedCheckpoint, why: str) -> list[str]:
    if opened.cache is None:
        return []
    return [f"The KV cache is bf16: the scales of its {opened.cache.name.upper()} cache are left out, {why}."]


def _plain_config(opened: PackedCheckpoint) -> dict[str, Any]:
    return without_key(opened.raw_config, SECTION)


def _written(opened: PackedCheckpoint) -> Iterator[tuple[TensorSpec, str]]:
    """Every tensor of the model and beside it, and its name in a file."""
    for spec in (*opened.table, *opened.towers):
        yield spec, in_file(spec.name, spec.role, opened.config.prefix)


def to_bf16(opened: PackedCheckpoint) -> Conversion:
    """Every weight decoded; the others bit for bit, in the order of the tensor table."""
    found = _quantized(opened)
    quantized = {spec.name for specs in found.values() for spec in specs}
    config, warnings = _plain_config(opened), list(opened.warnings)
    lacks_mtp = not opened.has_mtp and opened.config.mtp_modules > 0
    if lacks_mtp:
        config = without_mtp(config)
        warnings.append(
            "its config.json names no multi-token prediction any more, because tensors of it are missing"
        )
    tensors = [
        decoded(opened, spec, written)
        if spec.name in quantized
        else copied(opened.checkpoint, spec.name, written)
        for spec, written in _written(opened)
        if spec.role == TOWER or spec.name in opened.stored
        if not (lacks_mtp and spec.role.startswith("mtp."))
    ]
    notes = [
        f"{len(specs):,} weights were {FORMATS[name].short}; each value is code x scale, rounded to bf16: by "
        f"0.39% of it at most. What quantization had lost is not restored."
        for name, specs in found.items()
    ]
    if opened.inputs:
        notes.append("GEMM inputs are not quantized any more; their scales are left out.")
    if opened.towers:
        notes.append(f"{len(opened.towers):,} tensors beside the language model are copied as they are.")
    notes += _cache_notes(opened, "no config of an unquantized checkpoint has a place for them")
    return Conversion(tensors, config, {name: len(specs) for name, specs in found.items()}, notes, warnings)


class _Scales:
    """Scales as bf16, and how far they went."""

    def __init__(self) -> None:
        self.weights = self.inputs = 0.0

    def weight(self, value: np.float32) -> np.uint16:
        bits = np.uint16(rounded(np.array([value]))[0])
        self.weights = max(self.weights, _change(value, bits))
        return bits

    def input(self, value: np.float32) -> np.uint16:
        bits = rounded_up(value)  # a smaller one would cut off the largest magnitude that calibration saw
        self.inputs = max(self.inputs, _change(value, bits))
        return bits


def _change(value: np.float32, bits: np.uint16) -> float:
    return abs(float(value_of(bits)) / float(value) - 1)


def to_compressed_tensors(opened: PackedCheckpoint) -> Conversion:
    """The same codes; scales rounded to bf16, because transformers multiplies by them in their own dtype.

    Encoding the decoded weights again for the rounded scale would give the same codes: it moves by 0.4%, and
    half a step of E4M3 is 3.3% or more.

    Raises:
        CheckpointError: a module has a format that is not right there, or no input scale.
    """
    path = opened.path
    if opened.layout is COMPRESSED_TENSORS:
        raise CheckpointError(f"{path} is in the compressed-tensors layout already; expected ModelOpt's")
    if opened.config.prefix:
        raise CheckpointError(
            f"{path} has its language model inside another; expected a language model alone: transformers "
            f"reads no compressed-tensors file of such a model rightly, --to bf16 decodes it"
        )
    found = _quantized(opened)
    for name, specs in found.items():
        if (why := REFUSED[name]) is not None:
            raise CheckpointError(
                f"{path}: {len(specs):,} of its weights are {FORMATS[name].short}, which is not converted to "
                f"compressed-tensors: {why}; --to bf16 decodes them, or quantize with --fmt fp8"
            )
    (format, specs), *_ = found.items()
    whole = [spec.module for spec in specs if spec.module not in opened.inputs]
    unscaled = [module for module in whole if module not in opened.weights_only]
    if unscaled:
        raise CheckpointError(
            f"{path}: {len(unscaled):,} modules have no scale of their inputs: {listing(unscaled)}; expected "
            f"one, quantize again"
        )
    scales = _Scales()
    tensors = list(_compressed(opened, {spec.name for spec in specs}, format, scales))
    plain = [
        spec.module
        for spec in opened.table
        if spec.name in opened.stored
        and opened.stored[spec.name].format == "source"
        and spec.name != spec.module
        and spec.role.removeprefix("mtp.") not in NO_GEMM
    ]
    rounded_inputs = [spec.module for spec in specs if spec.module in opened.inputs]
    section = compressed_tensors.section(rounded_inputs, whole, plain, format)
    notes = [
        f"Codes are as they were. The scale of each weight is rounded to bf16, which moves all its values by "
        f"one factor: by {scales.weights:.2%} at most.",
        *[
            f"Scales of inputs are rounded to bf16 upwards, by {scales.inputs:.2%} at most: nothing is cut "
            f"off that was not before."
        ]
        * bool(rounded_inputs),
        *_cache_notes(opened, "because transformers 5.19 fails on a config that has them"),
    ]
    config = _plain_config(opened) | {SECTION: section}
    return Conversion(tensors, config, {}, notes, list(opened.warnings))


def _compressed(
    opened: PackedCheckpoint, quantized: set[str], format: FormatName, scales: _Scales
) -> Iterator[Tensor]:
    for spec in opened.table:
        stored = opened.stored.get(spec.name)
        if stored is None:
            continue
        if spec.name not in quantized:
            yield copied(opened.checkpoint, spec.name, spec.name)
            continue
        names = compressed_tensors.tensor_names(spec.module, format)
        yield copied(opened.checkpoint, stored.parts["codes"], names["codes"])
        yield scalar(names["global_scale"], scales.weight(opened.global_scale(stored)))
        if spec.module in opened.inputs:
            yield scalar(names["input_scale"], scales.input(opened.inputs[spec.module][1]))


CONVERSIONS: Mapping[Target, Callable[[PackedCheckpoint], Conversion]] = MappingProxyType(
    {"compressed-tensors": to_compressed_tensors, "bf16": to_bf16}
)

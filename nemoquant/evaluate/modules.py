"""What each module of a candidate costs: its weights' and inputs' noise, and its measured effect.

The effect of a module is measured, not estimated: its layer is run with this module as the candidate has it
and all else as the source has it, on the reference's input, and the residual stream after the layer is
compared. So modules of one layer are told apart, and an error counts by what reaches the rest of the model.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from torch import Tensor

from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.errors import CheckpointError, WeightError
from nemoquant.evaluate.candidate import Candidate, Module
from nemoquant.evaluate.layers import SEGMENT, Energy
from nemoquant.evaluate.schema import Experts, Quantized
from nemoquant.evaluate.schema import Module as Measured
from nemoquant.formats.noise import Noise
from nemoquant.formats.rounding import Weight
from nemoquant.layouts.modelopt import kv_scale_name
from nemoquant.model.roles import TensorSpec
from nemoquant.model.taps import Tap, Weights, identity
from nemoquant.quantized.checkpoint import PackedWeights
from nemoquant.quantized.packed import plain_noise

EFFECT_ROWS = 4

Run = Callable[[Weights, Tap], Tensor]  # something of the model, with these weights and taps


class Mixed(Mapping[str, Tensor]):
    """The source's tensors under a prefix, but those named in ``names`` (in full) from the candidate."""

    def __init__(self, source: Weights, candidate: PackedWeights, names: frozenset[str]) -> None:
        self.source, self.candidate, self.names = source, candidate, names

    def __getitem__(self, name: str) -> Tensor:
        return (self.candidate if self.candidate.prefix + name in self.names else self.source)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)


def sample(x: Tensor) -> Tensor:
    """The part of x [rows, length, hidden] that effects are measured on."""
    return x[:EFFECT_ROWS, :SEGMENT]


def weight_noise(candidate: Candidate, spec: TensorSpec) -> Noise:
    """One tensor of the candidate against the source's."""
    source = candidate.source.checkpoint
    assert source is not None
    stored = candidate.stored[spec.name]
    if stored.format == "source":
        found = plain_noise(_matrix(source, spec), _matrix(candidate.checkpoint, spec))
    else:
        found = candidate.weights("").packed(stored).noise(_matrix(source, spec))
    source.release([spec.name])
    candidate.checkpoint.release(stored.parts.values())
    if not math.isfinite(found.signal):
        raise WeightError(
            f"{source.path}: {spec.name} has NaN or Inf; expected finite weights, is the source damaged?"
        )
    if not math.isfinite(found.error):
        raise CheckpointError(
            f"{candidate.path}: {spec.name} decodes to NaN or Inf; an engine would compute with that, "
            f"quantize again"
        )
    return found


def _matrix(checkpoint: Checkpoint, spec: TensorSpec) -> Weight:
    """A floating tensor as kernels take it: [out, rest], bf16 bit patterns or float32."""
    array = checkpoint.array(spec.name)
    array = array.astype(np.float32) if array.dtype == np.float16 else array
    return array.reshape(spec.shape[0], -1) if len(spec.shape) > 1 else array.reshape(1, -1)


class ModuleNoise:
    """Noise of one module's weights by tensor, and of its inputs by tap."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.weights: list[Noise] = []
        self.inputs: dict[str, Noise] = {}

    def record(self, tap: str, found: Noise) -> None:
        if tap in self.inputs:
            self.inputs[tap] += found
        else:
            self.inputs[tap] = found

    @property
    def differs(self) -> bool:
        """Whether the module is not exactly as the source has it."""
        return self.module.format != "source" or bool(self.module.taps) or any(n.error for n in self.weights)

    def measured(self, candidate: Candidate, effect: float) -> Measured:
        module, stored = self.module, [candidate.stored[spec.name] for spec in self.module.specs]
        changed = module.format == "source" and any(n.error for n in self.weights)
        return Measured(
            name=module.name,
            layer=module.layer,
            role=module.role,
            format="changed" if changed else module.format,
            input_format=module.activation_format,
            elements=sum(int(np.prod(spec.shape)) for spec in module.specs),
            bytes=sum(candidate.checkpoint.tensors[name].nbytes for s in stored for name in s.parts.values())
            + self._cache_bytes(candidate),
            weight=_quantized(self.weights),
            input=_quantized(list(self.inputs.values())),
            effect=effect,
            experts=self._experts() if module.specs and module.specs[0].expert is not None else None,
        )

    def _cache_bytes(self, candidate: Candidate) -> int:
        """Of the scales of a KV cache."""
        names = [
            kv_scale_name(tap.removesuffix(".output")) for tap in self.module.taps if tap.endswith(".output")
        ]
        return sum(
            candidate.checkpoint.tensors[name].nbytes
            for name in names
            if name in candidate.checkpoint.tensors
        )

    def _experts(self) -> Experts:
        by_expert = [self.inputs.get(spec.module) for spec in self.module.specs]
        quality = [n.sqnr_db for n in self.weights]
        finite = [(db, e) for e, db in enumerate(quality) if db is not None]
        return Experts(
            weight_sqnr_db=quality,
            input_sqnr_db=[None if n is None else n.sqnr_db for n in by_expert],
            input_saturated=[None if n is None else n.saturated / n.count for n in by_expert],
            worst_expert=min(finite)[1] if finite else None,
        )


def _quantized(parts: list[Noise]) -> Quantized | None:
    total = Noise()
    for part in parts:
        total += part
    if not total.count:
        return None
    return Quantized(
        sqnr_db=total.sqnr_db, saturated=total.saturated / total.count, flushed=total.flushed / total.count
    )


def effects(
    candidate: Candidate, found: list[ModuleNoise], source: Weights, weights: PackedWeights, run: Run
) -> list[Measured]:
    """Measure those that differ, one at a time.

    Args:
        source, weights: the layer's tensors.
        run: the layer, on the reference's input.
    """
    differing = [one for one in found if one.differs]
    if not differing:
        return []
    expected = run(source, identity)
    result = []
    for one in differing:
        names = frozenset(spec.name for spec in one.module.specs)
        energy = Energy()
        energy.add(run(Mixed(source, weights, names), candidate.tap(only=one.module.taps)), expected)
        result.append(one.measured(candidate, energy.result().relative))
    return result

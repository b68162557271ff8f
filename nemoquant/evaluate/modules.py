"""The cost of each module of a candidate: noise of its weights and inputs, and its measured effect.

Where a checkpoint has folds (``solve/folds``), the source is folded first: the function is the same, and the
modules are those that the codes stand for.

The effect of a module is measured, not estimated. Its layer runs on the reference's input with this module
from the candidate and everything else from the source, and the residual stream after the layer is compared.
So modules of one layer are separated, and an error counts by its part that reaches the rest of the model.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from torch import Tensor

from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.errors import UncomputableError, WeightError
from nemoquant.evaluate.candidate import CandidateCheckpoint, ModuleSpec
from nemoquant.evaluate.layers import SEGMENT, Energy
from nemoquant.evaluate.schema import Experts, Module, Quantized, Solved
from nemoquant.formats.noise import Noise
from nemoquant.formats.rounding import Weight
from nemoquant.model.names import OUTPUT
from nemoquant.model.roles import TensorSpec
from nemoquant.model.taps import Tap, Weights, identity
from nemoquant.pack.outliers import Lost, lost_of
from nemoquant.quantized.checkpoint import PackedWeights
from nemoquant.quantized.packed import plain_noise
from nemoquant.solve.folds.transform import Transform

EFFECT_ROWS = 4

Run = Callable[[Weights, Tap], Tensor]  # a part of the model, run with these weights and taps


class Mixed(Mapping[str, Tensor]):
    """The source's tensors under a prefix; those in ``names`` (full names) come from the candidate."""

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


def weight_noise(candidate: CandidateCheckpoint, spec: TensorSpec) -> tuple[Noise, Lost | None]:
    """Noise of one tensor of the candidate against the source's.

    Returns:
        the noise, and what the tensor lost to its scale; None where no user needs to know of that.
    Raises:
        WeightError: the source's tensor has NaN or Inf.
        UncomputableError: the candidate's tensor decodes to NaN or Inf.
    """
    source = candidate.source.checkpoint
    assert source is not None
    stored = candidate.stored[spec.name]
    weight, lost = _matrix(source, spec, candidate.folds.get(spec.name)), None
    if stored.format == "source":
        noise = plain_noise(weight, _matrix(candidate.checkpoint, spec))
    else:
        packed = candidate.weights("").packed(stored)
        noise = packed.noise(weight)
        lost = lost_of(stored.format, weight, packed.encoded.block_scales, noise.flushed)
        lost = lost if lost.too_much(stored.format) else None
    source.release([spec.name])
    candidate.checkpoint.release(stored.parts.values())
    if not math.isfinite(noise.signal):
        raise WeightError(
            f"{source.path}: {spec.name} has NaN or Inf; expected finite weights, is the source damaged?"
        )
    if not math.isfinite(noise.error):
        raise UncomputableError(
            f"{candidate.path}: {spec.name} decodes to NaN or Inf; an engine would compute with that, "
            f"quantize again"
        )
    return noise, lost


def _matrix(checkpoint: Checkpoint, spec: TensorSpec, fold: Transform | None = None) -> Weight:
    """A floating tensor for the kernels: [out, rest], bf16 bit patterns or float32."""
    array = checkpoint.array(spec.name)
    array = array if fold is None else fold.apply(array)
    array = array.astype(np.float32) if array.dtype == np.float16 else array
    return array.reshape(spec.shape[0], -1) if len(spec.shape) > 1 else array.reshape(1, -1)


class ModuleNoise:
    """Noise of one module's weights by tensor, and of its inputs by tap."""

    def __init__(self, module: ModuleSpec) -> None:
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
        """Whether the module differs from the source's in any way."""
        return self.module.format != "source" or bool(self.module.taps) or any(n.error for n in self.weights)

    def measured(self, candidate: CandidateCheckpoint, effect: float) -> Module:
        module, stored = self.module, [candidate.stored[spec.name] for spec in self.module.specs]
        changed = module.format == "source" and any(n.error for n in self.weights)
        return Module(
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
            solved=solved_of(candidate, [self]),
        )

    def _cache_bytes(self, candidate: CandidateCheckpoint) -> int:
        """Bytes of the scales of a KV cache."""
        name_of = candidate.layout.kv_scale_name
        names = [name_of(tap.removesuffix(OUTPUT)) for tap in self.module.taps if tap.endswith(OUTPUT)]
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


def solved_of(candidate: CandidateCheckpoint, noises: Iterable[ModuleNoise]) -> Solved | None:
    """How the weights of modules were solved for, all together; None where none was."""
    specs = [spec for noise in noises for spec in noise.module.specs]
    found = [candidate.solved[spec.name] for spec in specs if spec.name in candidate.solved]
    if not found:
        return None
    objective, plain = (math.fsum(record[key] for record in found) for key in ("objective", "plain"))
    methods = Counter(record["method"] for record in found)
    return Solved(methods=dict(methods), error_of_plain=objective / plain if plain else None)


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
    candidate: CandidateCheckpoint,
    found: list[ModuleNoise],
    source: Weights,
    weights: PackedWeights,
    run: Run,
) -> list[Module]:
    """Measure the effects of the modules that differ, one at a time.

    Args:
        found: the layer's modules, with their noise.
        source, weights: the layer's tensors, of the source and of the candidate.
        run: runs the layer on the reference's input.
    """
    differing = [noise for noise in found if noise.differs]
    if not differing:
        return []
    expected = run(source, identity)
    result = []
    for noise in differing:
        names = frozenset(spec.name for spec in noise.module.specs)
        energy = Energy()
        energy.add(run(Mixed(source, weights, names), candidate.tap(only=noise.module.taps)), expected)
        result.append(noise.measured(candidate, energy.result().relative))
    return result

"""The diff: reference and candidates side by side over the same rows, a layer at a time, then the head.

For each layer the source's weights are read once for the reference (unless it comes from a cache), and once
for each candidate, whose weights' noise is measured against them. A candidate runs its layer twice: on its
own stream, which shows the accumulated error, and on the reference's input, which shows the layer's own.
Memory holds one residual stream for each model and one more, the scan states of one layer, and the working
set of a layer over a batch of rows (``layers.py``).
"""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from nemoquant._version import __version__
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.engine.base import Engine
from nemoquant.errors import UncomputableError, listing
from nemoquant.evaluate import schema
from nemoquant.evaluate.candidate import CandidateCheckpoint
from nemoquant.evaluate.engines import run_engines
from nemoquant.evaluate.head import HEAD_ELEMENTS, Head, compare_heads, heads_of
from nemoquant.evaluate.layers import Energy, choices, into, routing, run_layer
from nemoquant.evaluate.metrics import summarize
from nemoquant.evaluate.modules import (
    EFFECT_ROWS,
    ModuleNoise,
    effects,
    sample,
    solved_of,
    weight_noise,
)
from nemoquant.evaluate.origin import Origin
from nemoquant.evaluate.reference import Stage, embed, stream
from nemoquant.formats import FORMATS, Device
from nemoquant.formats.gpu import torch_device
from nemoquant.model import names
from nemoquant.model.parse import layer_pattern
from nemoquant.model.reference import layer_forward
from nemoquant.model.taps import Scope, Tap, Weights, identity, prefixed
from nemoquant.pack.outliers import Lost, lost_warnings
from nemoquant.progress import Progress
from nemoquant.solve.folds.weights import FoldedWeights
from nemoquant.sources.hub import called
from nemoquant.sources.source import Source
from nemoquant.tokens.rows import Rows
from nemoquant.words import as_utf8

WORST = 10


class Side:
    """A candidate between layers: its stream and its results so far; layers compute on ``device``."""

    def __init__(self, candidate: CandidateCheckpoint, device: torch.device) -> None:
        self.candidate, self.device = candidate, device
        self.hidden = torch.empty(0)
        self.layers: list[schema.Layer] = []
        self.modules: list[schema.Module] = []
        self.lost: dict[str, Lost] = {}

    def noise(self, layer: int | None, *roles: str) -> list[ModuleNoise]:
        """Noise of the weights of a layer's modules, or of modules outside the layers with these roles."""
        noises = []
        for module in self.candidate.modules:
            if module.layer == layer and (layer is not None or module.role in roles):
                noise = ModuleNoise(module)
                for spec in module.specs:
                    found, lost = weight_noise(self.candidate, spec)
                    noise.weights.append(found)
                    if lost is not None:
                        self.lost[spec.module] = lost
                noises.append(noise)
        return noises

    def elements(self, found: list[ModuleNoise]) -> dict[str, int]:
        """Number of weights by stored format."""
        counts: dict[str, int] = {}
        for noise in found:
            size = sum(math.prod(spec.shape) for spec in noise.module.specs)
            if size:
                counts[noise.module.format] = counts.get(noise.module.format, 0) + size
        return counts

    def check_finite(self, where: str, *energies: Energy) -> None:
        """Raises UncomputableError at NaN or Inf, which a report cannot hold."""
        if not all(energy.finite for energy in energies):
            raise UncomputableError(
                f"{self.candidate.path}: {where} computes NaN or Inf on the given rows; an engine would "
                f"too, no figure can be given: "
                "look at its scales there, or calibrate again"
            )


def diff(
    source: Source,
    candidates: list[CandidateCheckpoint],
    rows: Rows,
    cache: Path | None,
    progress: Progress,
    *,
    engines: Sequence[Engine] = (),
    device: Device = "cpu",
) -> schema.Report:
    """Compare the candidates with the source.

    Args:
        candidates: opened for this source.
        engines: one for each candidate, to take its logits from too; or none.
        cache: file of the reference's stream, read if it exists, else written.
        device: where the models compute; noise of weights, and figures, are computed on the CPU.
    Raises:
        NemoquantError: see ``reference.stream``; or a candidate produces NaN.
    """
    config, on = source.config, torch_device(device)
    sides = [Side(candidate, on) for candidate in candidates]
    steps = len(config.layers) + 2
    before = torch.empty(0)
    with (
        Origin(source, candidates, always=cache is not None) as origin,
        closing(stream(source, rows, cache, device, origin)) as stages,
    ):
        origin.begin("begin")
        for done, stage in enumerate(stages):
            what = (
                "embedding" if stage.layer is None else f"layer {stage.layer}, {config.layers[stage.layer]}"
            )
            origin.passed("begin" if stage.layer is None else stage.layer)
            for number, side in enumerate(sides):
                progress(
                    "diff", done * len(sides) + number, steps * len(sides), f"{what}, {side.candidate.name}"
                )
                if stage.layer is None:
                    _embedding(side, rows, stage)
                else:
                    _layer(side, source, before, stage, what)
            origin.check_unchanged()
            before = stage.hidden
        origin.passed("norm", "head", "mtp")
    heads = heads_of(source, candidates, [before, *(side.hidden for side in sides)], on)

    def report_share(number: int, what: str) -> None:
        progress("diff", (steps - 1) * len(sides) + number, steps * len(sides), what)

    own, measured, energies, acceptance = compare_heads(source, candidates, heads, rows, report_share)
    runs = run_engines(engines, rows, heads[0], heads[1:], report_share) if engines else [None] * len(sides)
    for side, energy in zip(sides, energies, strict=True):
        _head_modules(side, source, before, energy)
    origin.check_unchanged()
    progress("diff", steps * len(sides), steps * len(sides), "done")
    reference = _reference(source, own.perplexity, acceptance[0])
    return schema.Report(
        schema_version=schema.VERSION,
        nemoquant=__version__,
        data=schema.Data(
            source=rows.source,
            rows=rows.ids.shape[0],
            seq_len=rows.ids.shape[1],
            predicted_positions=rows.ids.shape[0] * (rows.ids.shape[1] - 1),
            tokens_sha256=rows.sha256,
        ),
        compute="float32",
        device=device,
        threads=torch.get_num_threads(),
        effect_rows=min(EFFECT_ROWS, rows.ids.shape[0]),
        reference=reference,
        candidates=[
            _candidate(side, reference, summarize(positions, own), accepted, run)
            for side, positions, accepted, run in zip(sides, measured, acceptance[1:], runs, strict=True)
        ],
        warnings=[],
    )


def _embedding(side: Side, rows: Rows, stage: Stage) -> None:
    weights = side.candidate.weights(f"{names.EMBEDDINGS}.")
    side.hidden = embed(weights, torch.from_numpy(rows.ids))
    weights.release()
    noises, energy = side.noise(None, "embedding"), Energy()
    energy.add(side.hidden, stage.hidden)
    side.check_finite("the embedding", energy)
    effect = Energy()
    effect.add(sample(side.hidden), sample(stage.hidden))
    side.modules += [
        noise.measured(side.candidate, effect.result().relative) for noise in noises if noise.differs
    ]
    side.layers.append(
        schema.Layer(
            name="embedding",
            kind="embedding",
            elements_by_format=side.elements(noises),
            stream=energy.result(),
            alone=energy.result(),
            routing=None,
            ssm_state=None,
            solved=solved_of(side.candidate, noises),
        )
    )


def _layer(side: Side, source: Source, before: Tensor, stage: Stage, what: str) -> None:
    """Run one layer of one candidate; ``before`` and ``stage.hidden`` are the reference's stream around it.

    ``what`` is the layer's name in messages.
    """
    assert stage.layer is not None
    config, candidate, prefix = source.config.of_layer(stage.layer), side.candidate, names.layer(stage.layer)
    kind = config.layers[stage.layer]
    original, weights = LayerWeights(source.checkpoint, prefix), candidate.weights(prefix)
    noises = side.noise(stage.layer)
    by_tap = {tap: noise for noise in noises for tap in noise.module.taps}
    alone, error, state_error = Energy(), Energy(), Energy()

    def measure(rows: slice, part: slice, y: Tensor) -> None:
        alone.add(y, stage.hidden[rows, part], before[rows, part])

    recording = candidate.tap(record=lambda name, noise: by_tap[name].record(name, noise))
    run_layer(config, kind, weights, before, prefixed(recording, prefix), measure, device=side.device)
    side.check_finite(what, alone)
    flips = None
    if kind == "moe":
        expected, chosen = (
            choices(config, original, before, side.device),
            choices(config, weights, side.hidden, side.device),
        )
        flips = routing(config, expected, chosen)
    after = torch.empty_like(side.hidden)
    state = run_layer(
        config, kind, weights, side.hidden, prefixed(candidate.tap(), prefix), into(after), device=side.device
    )
    side.hidden = after
    # a row at a time: a difference of whole streams would need memory for one more
    for ours, theirs in zip(after, stage.hidden, strict=True):
        error.add(ours, theirs)
    if state is not None and stage.ssm_state is not None:
        state_error.add(state, stage.ssm_state)
    side.check_finite(what, error, state_error)
    x = sample(before).to(side.device)
    side.modules += effects(
        candidate,
        noises,
        FoldedWeights(original, candidate.folds),
        weights,
        lambda mixed, tap: layer_forward(config, kind, mixed, x, None, prefixed(tap, prefix))[0].cpu(),
    )
    original.release()
    weights.release()
    side.layers.append(
        schema.Layer(
            name=str(stage.layer),
            kind=kind,
            elements_by_format=side.elements(noises),
            stream=error.result(),
            alone=alone.result(),
            routing=flips,
            ssm_state=None if state is None else state_error.result(),
            solved=solved_of(candidate, noises),
        )
    )


def _head_modules(side: Side, source: Source, before: Tensor, logits: Energy) -> None:
    """Final norm and head: their own error on the reference's stream ``before``, and each one's effect."""
    candidate, noises = side.candidate, side.noise(None, "norm", "lm_head")
    original, weights = LayerWeights(source.checkpoint, ""), candidate.weights("")
    by_tap = {tap: noise for noise in noises for tap in noise.module.taps}
    x = sample(before)[:, : max(1, HEAD_ELEMENTS // source.config.vocab_size)]

    def run(mixed: Weights, tap: Tap) -> Tensor:
        return Head(source.config, lambda prefix: Scope(mixed, prefix), tap, x, side.device).logits()

    alone = Energy()
    tied = source.config.tie_word_embeddings and any(module.role == "embedding" for module in side.modules)
    if tied or any(noise.differs for noise in noises):
        recording = candidate.tap(record=lambda name, noise: by_tap[name].record(name, noise))
        alone.add(run(weights, recording), run(original, identity))
    side.check_finite("the head", alone, logits)
    side.modules += effects(candidate, noises, original, weights, run)
    side.layers.append(
        schema.Layer(
            name="head",
            kind="head",
            elements_by_format=side.elements(noises),
            stream=logits.result(),
            alone=alone.result(),
            routing=None,
            ssm_state=None,
            solved=solved_of(side.candidate, noises),
        )
    )


def _reference(source: Source, perplexity: float | None, acceptance: float | None) -> schema.Reference:
    size = sum(info.nbytes for info in source.checkpoint.tensors.values())
    elements = sum(math.prod(spec.shape) for spec in source.table)
    return schema.Reference(
        name=as_utf8(called(source.path)),
        pattern=layer_pattern(source.config.layers),
        parameters=elements,
        bytes=size,
        bits_per_weight=8 * size / elements,
        perplexity=perplexity,
        mtp_acceptance=acceptance,
    )


def _candidate(
    side: Side,
    reference: schema.Reference,
    logits: schema.Logits,
    acceptance: float | None,
    run: schema.EngineRun | None,
) -> schema.Candidate:
    candidate = side.candidate
    size = sum(info.nbytes for info in candidate.checkpoint.tensors.values())
    formats = Counter(module.format for module in candidate.modules if module.specs)
    quantized = [module for module in side.modules if module.format in FORMATS]
    elements = sum(module.elements for module in quantized)
    plan = candidate.manifest["plan"] if candidate.manifest else {}
    changed = [module.name for module in side.modules if module.format == "changed"]
    mtp = [
        s
        for s in candidate.source.table
        if s.role.startswith("mtp.") and candidate.has_mtp and s.name in candidate.stored
    ]
    changed += [
        s.name
        for s in mtp
        if candidate.stored[s.name].format == "source" and weight_noise(candidate, s)[0].error
    ]
    lost_formats = {
        spec.module: stored.format
        for spec in candidate.table
        if (stored := candidate.stored.get(spec.name)) is not None and stored.format != "source"
    }
    warnings = [*candidate.warnings, *lost_warnings(side.lost, lost_formats)]
    if changed:
        warnings.append(
            f"{len(changed)} tensors are not quantized and yet differ from the source's: {listing(changed)}"
        )
    return schema.Candidate(
        name=candidate.name,
        recipe=plan.get("recipe", {}).get("name"),
        formats=dict(sorted(formats.items())),
        kv_cache="source" if candidate.cache is None else candidate.cache.name,
        bytes=size,
        compression=reference.bytes / size,
        bits_per_weight=8 * size / reference.parameters,
        bits_per_quantized_weight=8 * sum(module.bytes for module in quantized) / elements
        if elements
        else None,
        logits=logits,
        mtp_acceptance=acceptance,
        engine=run,
        layers=side.layers,
        modules=side.modules,
        worst_modules=[m.name for m in sorted(side.modules, key=lambda m: -m.effect)[:WORST] if m.effect > 0],
        warnings=warnings,
    )

"""Calibration, layer by layer: only one layer's weights are mapped, the rows' hidden states wait for the next one.

Every GEMM input of the main model is observed, whatever the plan quantizes, so that one scales file serves all recipes.
The bf16 output is propagated: a maximum describes what the source model computes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemoquant.calibrate.hidden import HiddenStates, InMemory
from nemoquant.calibrate.memory import RowBatch, rows_of
from nemoquant.calibrate.observers import AmaxObserver
from nemoquant.calibrate.scales import Scales
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.errors import CalibrationError, WeightError, listing
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.norm import rms_norm
from nemoquant.model.reference import layer_forward
from nemoquant.model.taps import prefixed
from nemoquant.progress import Progress, no_progress
from nemoquant.tokens.rows import Rows

MAX_NON_FINITE = 0.1  # share of rows that may be left out
DEFAULT_ROW_BATCH = 4
KV_OUTPUT = ".output"


class Observed(NamedTuple):
    """What a layer made of a batch.

    Attributes:
        output: of the rows that are finite [rows, length, hidden], on the CPU.
        finite: for each row of the batch, whether it is.
        maxima: module -> amax of its input, over the finite rows.
        tokens: expert -> tokens of these rows that it got.
    """

    output: Tensor
    finite: list[bool]
    maxima: dict[str, float]
    tokens: dict[int, int]


Spread = Callable[[Checkpoint, NemotronHConfig, int, Iterable[Tensor], str], Iterator[Observed]]  # runs ``observe``, in order


def compute_dtype(device: str) -> torch.dtype:
    """bfloat16 where the machine multiplies it directly, else float32."""
    if device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


@dataclass
class Between:
    """Where a calibration stands between two layers.

    Attributes:
        layers: how many are done.
        scales: what they gave; the settings are whole.
        dead: rows that came to NaN or Inf.
    """

    layers: int
    scales: Scales
    dead: list[int]


def calibrate(
    checkpoint: Checkpoint,
    config: NemotronHConfig,
    rows: Rows,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    row_batch: RowBatch = DEFAULT_ROW_BATCH,
    hidden: HiddenStates | None = None,
    begin: Between | None = None,
    keep: Callable[[Between], None] = lambda between: None,
    spread: Spread | None = None,
    progress: Progress = no_progress,
) -> Scales:
    """Run ``rows`` through the model and observe.

    Args:
        dtype: compute dtype; None picks :func:`compute_dtype`.
        row_batch: rows that go through a layer at once, of all layers or by kind of layer.
        hidden: where hidden states wait; None is in memory.
        begin: what ``keep`` was called with in an earlier run, with ``hidden`` as it was then: goes on from there.
        keep: called after each layer.
        spread: runs a layer's batches; None is one after the other, here.
    Raises:
        CalibrationError: more than ``MAX_NON_FINITE`` of the rows came to NaN or Inf; WeightError where weights hold them.
    """
    dtype = dtype or compute_dtype(device)
    hidden = hidden or InMemory((*rows.ids.shape, config.hidden_size), dtype)
    alive = np.ones(len(rows.ids), bool)
    batches = row_batch if isinstance(row_batch, int) else dict(row_batch)
    settings: dict[str, Any] = {
        "rows": len(rows.ids), "seq_len": rows.ids.shape[1], "tokens_sha256": rows.sha256, "data": rows.source, "device": device,
        "dtype": str(dtype).removeprefix("torch."), "row_batch": batches, "threads": torch.get_num_threads(),
    }  # fmt: skip
    if begin is None:
        _embed(checkpoint, rows, dtype, hidden)
        begin = Between(0, Scales(settings), [])
    scales = begin.scales
    alive[begin.dead] = False
    total = len(config.layers) + 1
    for i in range(begin.layers, len(config.layers)):
        progress("calibrate", i, total, f"layer {i}, {config.layers[i]}")
        _layer(checkpoint, config, i, hidden, alive, scales, device, rows_of(row_batch, config.layers[i]), spread or one_by_one)
        keep(Between(i + 1, scales, np.flatnonzero(~alive).tolist()))
    progress("calibrate", len(config.layers), total, "head")
    norm = LayerWeights(checkpoint, "backbone.norm_f.")["weight"]
    head = AmaxObserver()
    for batch in _batches(alive, 1):
        head.tap()("lm_head", rms_norm(hidden.read(batch).to(device), norm, config.norm_eps))
    scales.input_amax |= head.collect()
    scales.non_finite_rows = int((~alive).sum())
    progress("calibrate", total, total, "done")
    return scales


def _embed(checkpoint: Checkpoint, rows: Rows, dtype: torch.dtype, hidden: HiddenStates) -> None:
    """Hidden states before the first layer."""
    weights = LayerWeights(checkpoint, "backbone.embeddings.")
    for batch in _batches(np.ones(len(rows.ids), bool), 1):
        hidden.write(batch, F.embedding(torch.from_numpy(rows.ids[batch]), weights["weight"]).to(dtype))
        weights.release()
    hidden.turn()


def _batches(alive: np.ndarray[Any, Any], size: int) -> list[list[int]]:
    """Indices of the rows that are still finite, ``size`` at a time."""
    indices = np.flatnonzero(alive).tolist()
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _layer(
    checkpoint: Checkpoint,
    config: NemotronHConfig,
    i: int,
    hidden: HiddenStates,
    alive: np.ndarray[Any, Any],
    scales: Scales,
    device: str,
    row_batch: int,
    spread: Spread,
) -> None:
    """One layer over all rows: ``hidden`` becomes its output, ``alive`` loses the rows that are no longer finite."""
    kind = config.layers[i]
    found: dict[str, float] = {}
    tokens: dict[int, int] = {}
    batches = _batches(alive, row_batch)
    observed = spread(checkpoint, config, i, (hidden.read(batch) for batch in batches), device)
    for batch, (output, finite, maxima, counts) in zip(batches, observed, strict=True):
        lost = [row for row, good in zip(batch, finite, strict=True) if not good]
        if lost:
            alive[lost] = False
            _check_finite(checkpoint, alive, i, kind)
        hidden.write([row for row, good in zip(batch, finite, strict=True) if good], output)
        for name, amax in maxima.items():
            found[name] = max(amax, found.get(name, 0.0))
        for expert, count in counts.items():
            tokens[expert] = tokens.get(expert, 0) + count
    hidden.turn()
    scales.kv_amax |= {n.removesuffix(KV_OUTPUT): v for n, v in found.items() if n.endswith(KV_OUTPUT)}
    scales.input_amax |= {n: v for n, v in found.items() if not n.endswith((KV_OUTPUT, ".gate"))}
    if kind == "moe":
        scales.tokens_per_expert[i] = [tokens.get(e, 0) for e in range(config.n_routed_experts)]


def observe(checkpoint: Checkpoint, config: NemotronHConfig, layer: int, states: Tensor, device: str) -> Observed:
    """A batch of rows [rows, length, hidden] through one layer. A pure function: it may run anywhere.

    Rows that come to NaN or Inf say nothing about the others' maxima: these are then observed again, without them.
    """
    prefix = f"backbone.layers.{layer}."
    weights = LayerWeights(checkpoint, prefix)

    def through(states: Tensor) -> tuple[Tensor, AmaxObserver]:
        observer = AmaxObserver()
        return layer_forward(config, config.layers[layer], weights, states, None, prefixed(observer.tap(), prefix))[0], observer

    states = states.to(device)
    output, observer = through(states)
    finite = torch.isfinite(output).flatten(1).all(1)
    if not finite.all():
        output = output[finite]
        observer = through(states[finite])[1] if len(output) else AmaxObserver()
    weights.release()
    return Observed(output.cpu(), finite.tolist(), observer.collect(), observer.tokens)


def one_by_one(
    checkpoint: Checkpoint, config: NemotronHConfig, layer: int, batches: Iterable[Tensor], device: str
) -> Iterator[Observed]:
    """``observe`` on each batch, here."""
    return (observe(checkpoint, config, layer, states, device) for states in batches)


def _check_finite(checkpoint: Checkpoint, alive: np.ndarray[Any, Any], layer: int, kind: str) -> None:
    bad = np.flatnonzero(~alive)
    if len(bad) > MAX_NON_FINITE * len(alive):
        damaged = [
            weights.prefix + name
            for weights in (LayerWeights(checkpoint, p) for p in ("backbone.embeddings.", f"backbone.layers.{layer}."))
            for name, weight in weights.items()
            if not torch.isfinite(weight).all()
        ]
        if damaged:
            raise WeightError(
                f"{listing(damaged)} has NaN or Inf; expected finite weights, the source is damaged: download or convert it again"
            )
        raise CalibrationError(
            f"layer {layer} ({kind}): NaN or Inf in {len(bad)} of {len(alive)} rows ({listing(list(bad))}), more than "
            f"{MAX_NON_FINITE:.0%}; expected finite activations, the layer's weights are finite: try --compute float32"
        )

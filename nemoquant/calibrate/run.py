"""Calibration, layer by layer: only one layer's weights are mapped, the rows' hidden states wait for the next one.

Every GEMM input of the main model is observed, whatever the plan quantizes, so that one scales file serves all recipes.
The bf16 output is propagated: a maximum describes what the source model computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemoquant.calibrate.data import Rows
from nemoquant.calibrate.hidden import HiddenStates, InMemory
from nemoquant.calibrate.memory import RowBatch, rows_of
from nemoquant.calibrate.observers import AmaxObserver
from nemoquant.calibrate.scales import Scales
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.errors import CalibrationError, WeightError, listing
from nemoquant.model.config import LayerKind, NemotronHConfig
from nemoquant.model.norm import rms_norm
from nemoquant.model.reference import layer_forward
from nemoquant.model.taps import prefixed

MAX_NON_FINITE = 0.1  # share of rows that may be left out
DEFAULT_ROW_BATCH = 4
KV_OUTPUT = ".output"
Progress = Callable[[int, int, str], None]  # done, total, what


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
    progress: Progress = lambda done, total, what: None,
) -> Scales:
    """Run ``rows`` through the model and observe.

    Args:
        dtype: compute dtype; None picks :func:`compute_dtype`.
        row_batch: rows that go through a layer at once, of all layers or by kind of layer.
        hidden: where hidden states wait; None is in memory.
        begin: what ``keep`` was called with in an earlier run, with ``hidden`` as it was then: goes on from there.
        keep: called after each layer.
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
        progress(i, total, f"layer {i}, {config.layers[i]}")
        _layer(checkpoint, config, i, hidden, alive, scales, device, rows_of(row_batch, config.layers[i]))
        keep(Between(i + 1, scales, np.flatnonzero(~alive).tolist()))
    progress(len(config.layers), total, "head")
    norm = LayerWeights(checkpoint, "backbone.norm_f.")["weight"]
    head = AmaxObserver()
    for batch in _batches(alive, 1):
        head.tap()("lm_head", rms_norm(hidden.read(batch).to(device), norm, config.norm_eps))
    scales.input_amax |= head.collect()
    scales.non_finite_rows = int((~alive).sum())
    progress(total, total, "done")
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
) -> None:
    """One layer over all rows: ``hidden`` becomes its output, ``alive`` loses the rows that are no longer finite."""
    prefix = f"backbone.layers.{i}."
    weights = LayerWeights(checkpoint, prefix)
    kind = config.layers[i]
    found: dict[str, float] = {}
    tokens: dict[int, int] = {}
    for batch in _batches(alive, row_batch):
        states = hidden.read(batch).to(device)
        output, finite, observer = _observe(config, kind, weights, states, prefix)
        if not finite.all():  # their maxima mean nothing: observe the others of this batch again, without them
            alive[np.array(batch)[~finite.numpy()]] = False
            _check_finite(checkpoint, alive, i, kind)
            batch, output = list(np.array(batch)[finite.numpy()]), output[finite.to(output.device)]
            observer = AmaxObserver()
            if len(batch):
                observer = _observe(config, kind, weights, states[finite.to(device)], prefix)[2]
        hidden.write(batch, output)
        for name, amax in observer.collect().items():
            found[name] = max(amax, found.get(name, 0.0))
        for expert, count in observer.tokens.items():
            tokens[expert] = tokens.get(expert, 0) + count
    weights.release()
    hidden.turn()
    scales.kv_amax |= {n.removesuffix(KV_OUTPUT): v for n, v in found.items() if n.endswith(KV_OUTPUT)}
    scales.input_amax |= {n: v for n, v in found.items() if not n.endswith((KV_OUTPUT, ".gate"))}
    if kind == "moe":
        scales.tokens_per_expert[i] = [tokens.get(e, 0) for e in range(config.n_routed_experts)]


def _observe(
    config: NemotronHConfig, kind: LayerKind, weights: LayerWeights, states: Tensor, prefix: str
) -> tuple[Tensor, Tensor, AmaxObserver]:
    """One batch through a layer: its output, which of its rows are finite (on the CPU), and what was observed."""
    observer = AmaxObserver()
    output, _ = layer_forward(config, kind, weights, states, None, prefixed(observer.tap(), prefix))
    return output, torch.isfinite(output).flatten(1).all(1).cpu(), observer


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

"""Calibration, layer by layer: one layer's weights are mapped at a time, hidden states wait between layers.

Every GEMM input of the main model is observed, whatever the plan quantizes, so that one scales file serves
all recipes. The unquantized output is propagated: a maximum describes what the source model computes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemoquant.calibrate.batch import MAX_NON_FINITE, RowBatch, compute_dtype, rows_of
from nemoquant.calibrate.hidden import HiddenStates, InMemory
from nemoquant.calibrate.observers import Collector, Observer
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.errors import CalibrationError, WeightError, listing
from nemoquant.model import names
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.norm import rms_norm
from nemoquant.model.reference import layer_forward
from nemoquant.model.taps import Tap, prefixed
from nemoquant.progress import Progress, no_progress
from nemoquant.tokens.rows import Rows

DEFAULT_ROW_BATCH = 4

Observers = Sequence[Callable[[], Observer]]


class Observed(NamedTuple):
    """Result of a layer for one batch.

    Attributes:
        output: rows whose output is finite [rows, length, hidden], on the CPU.
        finite: for each row of the batch, whether its output is finite.
        collected: results of each observer, over the finite rows.
    """

    output: Tensor
    finite: list[bool]
    collected: list[Any]


# Runs ``observe`` on the batches of a layer; results in order.
Spread = Callable[[Checkpoint, NemotronHConfig, int, Iterable[Tensor], str, Observers], Iterator[Observed]]


@dataclass
class Between:
    """State of a calibration between two layers.

    Attributes:
        layers: number of finished layers.
        dead: rows that produced NaN or Inf.
        collected: the state of each collector, by name.
    """

    layers: int
    dead: list[int]
    collected: dict[str, Any]


def settings(rows: Rows, device: str, dtype: str, row_batch: RowBatch) -> dict[str, Any]:
    """The entry of a scales file that describes its calibration."""
    return {
        "rows": len(rows.ids),
        "seq_len": rows.ids.shape[1],
        "tokens_sha256": rows.sha256,
        "data": rows.source,
        "device": device,
        "dtype": dtype,
        "row_batch": row_batch if isinstance(row_batch, int) else dict(row_batch),
        "threads": torch.get_num_threads(),
    }


def calibrate(
    checkpoint: Checkpoint,
    config: NemotronHConfig,
    rows: Rows,
    collectors: Sequence[Collector],
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    row_batch: RowBatch = DEFAULT_ROW_BATCH,
    hidden: HiddenStates | None = None,
    begin: Between | None = None,
    keep: Callable[[Between], None] = lambda between: None,
    spread: Spread | None = None,
    progress: Progress = no_progress,
) -> list[int]:
    """Run ``rows`` through the model; ``collectors`` receive what their observers collect.

    Args:
        dtype: compute dtype; None takes that of :func:`compute_dtype`.
        row_batch: rows that go through a layer at once, for all layers or by kind of layer.
        hidden: where hidden states wait; None keeps them in memory.
        begin: an argument of ``keep`` in an earlier run, to continue from there; ``hidden`` must hold the
            same states as then.
        keep: called after each layer.
        spread: runs a layer's batches; None runs them one after the other, in this process.
    Returns:
        the rows that produced NaN or Inf and were left out.
    Raises:
        CalibrationError: more than ``MAX_NON_FINITE`` of the rows produced NaN or Inf; WeightError where
            the weights contain NaN or Inf.
        SourceChangedError: the source changed since it was opened.
    """
    dtype = dtype or getattr(torch, compute_dtype(device))
    hidden = hidden or InMemory((*rows.ids.shape, config.hidden_size), dtype)
    run = _Run(checkpoint, config, collectors, hidden, torch.device(device), np.ones(len(rows.ids), bool))
    done = 0
    if begin is None:
        run.embed(rows, dtype)
    else:
        done = begin.layers
        run.alive[begin.dead] = False
        for collector in collectors:
            collector.restore(begin.collected[collector.name])
    total = len(config.layers) + 1
    for i in range(done, len(config.layers)):
        progress("calibrate", i, total, f"layer {i}, {config.layers[i]}")
        run.layer(i, rows_of(row_batch, config.layers[i]), spread or one_by_one)
        keep(Between(i + 1, run.dead, {c.name: c.state() for c in collectors}))
    progress("calibrate", len(config.layers), total, "head")
    run.head()
    progress("calibrate", total, total, "done")
    return run.dead


@dataclass(frozen=True)
class _Run:
    """One calibration; ``alive`` [rows] is False for rows that are no longer finite."""

    checkpoint: Checkpoint
    config: NemotronHConfig
    collectors: Sequence[Collector]
    hidden: HiddenStates
    device: torch.device
    alive: np.ndarray[Any, Any]

    @property
    def dead(self) -> list[int]:
        dead: list[int] = np.flatnonzero(~self.alive).tolist()
        return dead

    def batches(self, size: int) -> list[list[int]]:
        """Indices of the rows that are still finite, ``size`` at a time."""
        indices = np.flatnonzero(self.alive).tolist()
        return [indices[i : i + size] for i in range(0, len(indices), size)]

    def embed(self, rows: Rows, dtype: torch.dtype) -> None:
        """Write the hidden states before the first layer."""
        self.checkpoint.check_unchanged()
        weights = LayerWeights(self.checkpoint, f"{names.EMBEDDINGS}.")
        for batch in self.batches(1):
            self.hidden.write(
                batch, F.embedding(torch.from_numpy(rows.ids[batch]), weights["weight"]).to(dtype)
            )
            weights.release()
        self.hidden.turn()

    def layer(self, i: int, row_batch: int, spread: Spread) -> None:
        """Run one layer over all rows: its output replaces the hidden states."""
        batches = self.batches(row_batch)
        states = (self.hidden.read(batch) for batch in batches)
        observers = [collector.observer for collector in self.collectors]
        observed = spread(self.checkpoint, self.config, i, states, str(self.device), observers)
        left: list[list[int]] = []
        for batch, (output, finite, collected) in zip(batches, observed, strict=True):
            lost = [row for row, good in zip(batch, finite, strict=True) if not good]
            if lost:
                self._lose(lost, i)
            left.append([row for row, good in zip(batch, finite, strict=True) if good])
            self.hidden.write(left[-1], output)
            self._add(collected)
        self.checkpoint.check_unchanged()  # after the layer was read: its results are kept next
        self.hidden.turn()
        for collector in self.collectors:
            collector.finish(i, left)

    def head(self) -> None:
        """Observe the input of the head; its product is not computed."""
        norm = LayerWeights(self.checkpoint, f"{names.FINAL_NORM}.")["weight"]
        observers = [collector.observer() for collector in self.collectors]
        left: list[list[int]] = []
        for batch in self.batches(1):
            x = rms_norm(self.hidden.read(batch).to(self.device), norm, self.config.norm_eps).flatten(0, 1)
            if not torch.isfinite(x).all():
                self._lose(batch, None)
                continue
            left.append(batch)
            for observer in observers:
                observer.observe(names.HEAD, x)
        self._add([observer.collect() for observer in observers])
        self.checkpoint.check_unchanged()
        for collector in self.collectors:
            collector.finish(None, left)

    def _add(self, collected: list[Any]) -> None:
        for collector, part in zip(self.collectors, collected, strict=True):
            collector.add(part)

    def _lose(self, lost: list[int], layer: int | None) -> None:
        """Leave rows out that came to NaN or Inf in ``layer``, None for the head; too many are an error."""
        self.alive[lost] = False
        dead = self.dead
        if len(dead) <= MAX_NON_FINITE * len(self.alive):
            return
        here = f"{names.FINAL_NORM}." if layer is None else names.layer(layer)
        damaged = [
            weights.prefix + name
            for weights in (LayerWeights(self.checkpoint, p) for p in (f"{names.EMBEDDINGS}.", here))
            for name, weight in weights.items()
            if not torch.isfinite(weight).all()
        ]
        if damaged:
            raise WeightError(
                f"{listing(damaged)} has NaN or Inf; expected finite weights, the source is damaged: "
                f"download or convert it again, or train it again if it left training so"
            )
        states = self.hidden.read(lost[:1])  # as they came into the layer: lost rows are not written
        where = "head" if layer is None else f"layer {layer} ({self.config.layers[layer]})"
        first = f"the input of {names.HEAD}" if layer is None else self._first_non_finite(layer, states)
        advice = "is the source damaged?" if states.dtype == torch.float32 else "try --compute float32"
        raise CalibrationError(
            f"{where}: NaN or Inf in {len(dead)} of {len(self.alive)} rows ({listing(dead)}), more than "
            f"{MAX_NON_FINITE:.0%}, first in {first}; expected finite activations, the layer's weights are "
            f"finite: {advice}"
        )

    def _first_non_finite(self, layer: int, states: Tensor) -> str:
        """Where rows [rows, length, hidden] first come to NaN or Inf in a layer, in words."""
        found: list[str] = []

        def tap(name: str, x: Tensor) -> Tensor:
            if not torch.isfinite(x).all():
                found.append(name)
            return x

        weights = LayerWeights(self.checkpoint, names.layer(layer))
        config, kind = self.config.of_layer(layer), self.config.layers[layer]
        layer_forward(config, kind, weights, states.to(self.device), None, prefixed(tap, weights.prefix))
        return f"the input of {found[0]}" if found else "the layer's output"


def observe(
    checkpoint: Checkpoint,
    config: NemotronHConfig,
    layer: int,
    states: Tensor,
    device: str,
    observers: Observers,
) -> Observed:
    """Run a batch of rows [rows, length, hidden] through one layer. A pure function: it may run anywhere.

    Rows that produce NaN or Inf must not affect the maxima: the other rows are then observed again alone.

    Args:
        observers: constructors of the observers, which see the layer's taps by full names.
    """
    prefix, kind = names.layer(layer), config.layers[layer]
    weights = LayerWeights(checkpoint, prefix)

    def through(states: Tensor) -> tuple[Tensor, list[Observer]]:
        active = [make() for make in observers]
        tap = prefixed(_shown_to(active), prefix)
        return layer_forward(config.of_layer(layer), kind, weights, states, None, tap)[0], active

    states = states.to(device)
    output, active = through(states)
    finite = torch.isfinite(output).flatten(1).all(1)
    if not finite.all():
        output = output[finite]
        active = through(states[finite])[1] if len(output) else [make() for make in observers]
    weights.release()
    return Observed(output.cpu(), finite.tolist(), [observer.collect() for observer in active])


def _shown_to(observers: Sequence[Observer]) -> Tap:
    """A tap that shows its argument to all ``observers``."""

    def tap(name: str, x: Tensor) -> Tensor:
        for observer in observers:
            observer.observe(name, x)
        return x

    return tap


def one_by_one(
    checkpoint: Checkpoint,
    config: NemotronHConfig,
    layer: int,
    batches: Iterable[Tensor],
    device: str,
    observers: Observers,
) -> Iterator[Observed]:
    """``observe`` on each batch, in this process."""
    return (observe(checkpoint, config, layer, states, device, observers) for states in batches)

"""Ideas for a lower KL at equal bits, tried as prototypes: what they win on the trained models.

    python -m bench.ideas demo nvfp4-full-w4a16 nvfp4-full-w4a16:output=0.1
    python -m bench.ideas nano nvfp4-full-w4a16:propagate=source nvfp4-full-w4a16:propagate=source,weights=0.5
    python -m bench.ideas nano nvfp4-full-w4a16 nvfp4-full-w4a16:refit=router+head --seed 1
    python -m bench.ideas nano nvfp4-full-w4a16 nvfp4-full-w4a16:routing=source

A variant is a preset and what is changed of it:

    propagate, descent   as options of `nemoquant quantize`
    output=D             codes are solved for tr(O E H E'), O = g' g of gradients of the loss, damped by D
    scarce=S             of output: damped by D * (1 + S * out / tokens)
    only=ROLES           output for modules whose role has one of these, with + between them
    gradients=FROM       loss, choice:WIDTH, local, random: see gradients.py (loss)
    factored=1           gptq on both sides; else O takes part in sweeps alone
    weights=P            tokens count in H by |g|^(2 P); with propagate=source
    refit=KINDS          router, fc1, fc2, head, with + between them, refitted to the quantized stream
    ridge=R              of refit, in units of the mean diagonal (0.1)
    routing=source       judged with each token's experts as the source chooses them: what routing costs

`nemoquant quantize` runs in this process, with its solver replaced. Gradients are of the calibration rows.
Differences from the first variant are paired over rows: their mean, and its standard error.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from bench.ideas.gradients import Gradients, gradients
from bench.ideas.refit import refitted
from bench.ideas.two_sided import output_side, solve_both
from bench.methods import CALIB, LENGTH, calibration_rows, logits, standard_error, variant
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.cli import main as command_line
from nemoquant.model import moe
from nemoquant.model.reference import ReferenceModel
from nemoquant.model.taps import Scope, Weights
from nemoquant.quantized.checkpoint import PackedCheckpoint
from nemoquant.shipped import evaluation_data
from nemoquant.solve import collector, layer
from nemoquant.solve.solver import Solved
from nemoquant.sources.source import open_source
from nemoquant.tokens.rows import load_rows


class Solver(layer.LayerSolver):
    """Solves with gradients: ``found`` and ``keys`` are those of the variant that runs."""

    found: Gradients
    keys: dict[str, str]

    def _on_host(self, work: Any, mapped: Any) -> Any:
        row, keys = work.row, self.keys
        wanted = any(part in row.role for part in keys.get("only", "").split("+"))
        if "output" not in keys or not wanted or row.module not in self.found or work.seen.metric.empty:
            return super()._on_host(work, mapped)
        g = self.found[row.module]
        outputs = output_side(g, float(keys["output"]), float(keys.get("scarce", 0)))
        encoded = solve_both(
            row.format,
            np.ascontiguousarray(work.target),
            work.scale,
            work.seen.metric,
            outputs,
            sweeps=self.settings.descent,
            factored=bool(int(keys.get("factored", 0))),
        )
        # No objective is compared here: the record's two are placeholders.
        return layer._stored(work, [Solved(encoded, "gptq", 0.0, 0.0)], encoded, mapped)

    def _pieces(self, row: Any, widest: int = 0) -> Iterator[Any]:
        power = float(self.keys.get("weights", 0))
        if not power or row.module not in self.found:
            yield from super()._pieces(row, widest)
            return
        counts = np.square(self.found[row.module]).sum(1) ** power
        counts, at = np.sqrt(counts / counts.mean())[:, None], 0
        for x in super()._pieces(row, widest):
            yield x * counts[at : at + len(x)]
            at += len(x)


class Routes:
    """The choices of experts: recorded, then repeated in the same order."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []
        self.repeated: Iterator[Tensor] | None = None
        self._route = moe.route

    def __call__(self, config: Any, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.repeated is None:
            ids, factors = self._route(config, weights, x)
            self.ids.append(ids)
            return ids, factors
        ids = next(self.repeated)
        chosen = torch.sigmoid(x.float() @ weights["gate.weight"].float().mT).gather(1, ids)
        if config.norm_topk_prob:
            chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
        return ids, chosen * config.routed_scaling_factor


class Bench:
    """A trained model with rows to judge by."""

    def __init__(self, name: str, first: int, rows: int, seed: int, calibration: int) -> None:
        self.folder, self.seed = CALIB / f"{name}_model", seed
        self.source = open_source(self.folder)
        read = LayerWeights(self.source.checkpoint, "")
        self.weights = {name: read[name].float() for name in self.source.checkpoint.tensors}
        self.config = self.source.config
        self.text = calibration_rows(self.folder, calibration, LENGTH, seed)
        ids = load_rows(evaluation_data(), self.folder, self.config, first + rows, LENGTH).ids
        self.ids, self.routes = ids[first:], Routes()
        self._gradients: dict[str, Gradients] = {}
        moe.route = self.routes
        self.reference = [part.float() for part in logits(self._model(self.weights), self.ids)]
        moe.route = self.routes._route

    def _model(self, weights: Any) -> ReferenceModel:
        return ReferenceModel(self.config, lambda prefix: Scope(weights, prefix))

    def gradients(self, source: str) -> Gradients:
        if source not in self._gradients:
            modules = {spec.module for spec in self.source.table}
            self._gradients[source] = gradients(
                self.config, self.weights, torch.from_numpy(self.text), modules, source, self.seed
            )
        return self._gradients[source]

    def quantized(self, text: str, scratch: Path) -> PackedCheckpoint:
        preset, keys = variant(text)
        needs = keys.keys() & {"output", "weights"}
        Solver.keys, Solver.found = keys, self.gradients(keys.get("gradients", "loss")) if needs else {}
        np.save(scratch / "rows.npy", self.text)
        options = [f"--{key}={keys[key]}" for key in ("propagate", "descent") if key in keys]
        options += [f"--calib={scratch / 'rows.npy'}", f"--rows={len(self.text)}", f"--seq-len={LENGTH}"]
        arguments = ["quantize", self.folder, scratch / "out", "--recipe", preset, "--threads=1", *options]
        command_line.main(list(map(str, arguments)), standalone_mode=False)
        return PackedCheckpoint(scratch / "out")

    def kl(self, text: str, scratch: Path) -> np.ndarray[Any, Any]:
        """Of each row."""
        _, keys = variant(text)
        opened = self.quantized(text, scratch)
        packed, like = opened.weights(""), torch.empty(0)
        weights: Any = {name: packed[name].to(like).clone() for name in opened.stored}
        if "refit" in keys:
            rows, kinds = torch.from_numpy(self.text), keys["refit"].split("+")
            ridge = float(keys.get("ridge", 0.1))
            weights = refitted(self.config, self.weights, weights, opened.inputs, rows, kinds, ridge)
        route: Callable[..., Any] = moe.route
        if keys.get("routing") == "source":
            self.routes.repeated = iter(self.routes.ids)
            moe.route = self.routes
        found = []
        parts = logits(self._model(weights), self.ids, opened.tap())
        for wanted, got in zip(self.reference, parts, strict=True):
            p, q = wanted[:, :-1].double(), got[:, :-1]
            found += (p.exp() * (p - q)).sum(-1).mean(-1).tolist()
        moe.route = route
        opened.checkpoint.close()
        return np.array(found)


@click.command()
@click.argument("model", type=click.Choice(["demo", "nano"]))
@click.argument("variants", nargs=-1, required=True)
@click.option("--first", default=0, show_default=True, help="First row of the evaluation text.")
@click.option("--rows", default=32, show_default=True)
@click.option(
    "--seed", default=0, show_default=True, help="Of the choice of calibration rows, and of labels."
)
@click.option("--calibration", default=32, show_default=True, help="Rows to calibrate with.")
def main(model: str, variants: tuple[str, ...], first: int, rows: int, seed: int, calibration: int) -> None:
    """Compare variants on a trained model."""
    collector.LayerSolver = Solver  # type: ignore[misc]
    torch.set_num_threads(1)
    bench = Bench(model, first, rows, seed, calibration)
    before: np.ndarray[Any, Any] | None = None
    for text in variants:
        start = time.process_time()
        with tempfile.TemporaryDirectory() as scratch:
            kl = bench.kl(text, Path(scratch))
        before = kl if before is None else before
        paired = kl - before
        click.echo(
            f"{model} {text:<64} KL {kl.mean():.5f}  {paired.mean():+.5f} +- {standard_error(paired):.5f}  "
            f"{kl.mean() / before.mean() - 1:+.1%}  {time.process_time() - start:.0f} s of CPU"
        )


if __name__ == "__main__":
    main()

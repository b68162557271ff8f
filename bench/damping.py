"""How strongly H should be damped, and from what it should be made: error on tokens that were not solved for.

    python -m bench.damping demo nvfp4-w4a16 --rows 32 --rows 1 --damping 0.1 --damping 0.5 --damping 2
    python -m bench.damping nano nvfp4-w4a16 --rows 8 --rows 1 --pooled 0 --pooled 100 --gates 0 --gates 1
    python -m bench.damping demo fp8 nvfp4-full --rows 32 --json FILE

Every weight that a preset solves is solved from the first ROWS rows of the calibration text, and its codes
are judged by 32 other rows of it: `tr((W - Q) S (W - Q)')` with S the sum of x x' of those rows, inputs
rounded as in an engine. Printed is that error over the error of the format's own method (mse for nvfp4), as
geometric mean over the weights of a kind. No fold is made. DAMPING is that of H as it is used, whatever the
tokens; 0 is what solving does. POOLED is k of n/(n+k) H_expert + k/(n+k) H_all, for an expert's n tokens
and all experts of its layer together, for what all of them read (up projections). GATES 1: an expert's
tokens count in H by the square of their factor in the layer's output. In the error they always do, because
there they do.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor

from nemoquant.calibrate.derived import input_scales, weight_scale
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.formats import FORMATS
from nemoquant.formats.arithmetic import Encoded, round_trip
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.model import names
from nemoquant.model.moe import route
from nemoquant.model.reference import ReferenceModel
from nemoquant.model.taps import Scope
from nemoquant.planning.recipe import load_recipe
from nemoquant.planning.resolve import resolve
from nemoquant.planning.row import Row
from nemoquant.planning.solving import DAMPING
from nemoquant.shipped import calibration_data
from nemoquant.solve.layer import damping
from nemoquant.solve.metric import Doubles, gram, prepare
from nemoquant.solve.solver import solve
from nemoquant.solve.source import largest, shared_maxima
from nemoquant.solve.taps import input_of
from nemoquant.sources.source import open_source
from nemoquant.tokens.rows import load_rows

CALIB = Path(__file__).parent.parent / "calib"
LENGTH, BATCH = 512, 4
JUDGES, FIRST_JUDGE = 32, 128
Inputs = dict[str, np.ndarray[Any, Any]]


class Setting(NamedTuple):
    """How an H is made."""

    rows: int
    damping: float  # 0: as solving does by default
    pooled: float
    gates: int


class Seen(NamedTuple):
    """Inputs [tokens, in] by tap, and the factors [tokens] of an expert's tokens by its prefix."""

    inputs: Inputs
    factors: Inputs


def observe(model: ReferenceModel, rows: Tensor, wanted: set[str], config: Any, weights: Any) -> Seen:
    """What a model's GEMMs read."""
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    factors: dict[str, list[Tensor]] = defaultdict(list)

    def tap(name: str, x: Tensor) -> Tensor:
        if name.endswith(names.ROUTER):
            mixer = name.removesuffix(names.ROUTER)
            ids, p = route(config, Scope(weights, mixer), x)
            order = torch.argsort(ids.flatten(), stable=True)
            counts = torch.bincount(ids.flatten()).tolist()
            parts = p.flatten()[order].split(counts)
            for expert, part in enumerate(parts):
                factors[f"{mixer}{names.expert(expert)}"].append(part)
        if name in wanted:
            inputs[name].append(x.flatten(0, -2).float().clone())
        return x

    for batch in rows.split(BATCH):
        model.forward(batch, tap=tap)
    return Seen(*({k: torch.cat(v).numpy() for k, v in found.items()} for found in (inputs, factors)))


def rounded(row: Row, x: np.ndarray[Any, Any], scale: np.float32) -> np.ndarray[Any, Any]:
    """As an engine has it."""
    x = np.ascontiguousarray(x, np.float32).copy()
    if row.activation_format is not None:
        round_trip(ARITHMETIC[row.activation_format], x, scale, x)
    return x


def kind(row: Row) -> str:
    """The weights that are averaged together."""
    return row.module.rsplit(".", 1)[-1] if row.expert is None else f"experts.{row.module.rsplit('.', 1)[-1]}"


class Bench:
    """A model's inputs, and the weights of a preset."""

    def __init__(self, model: str, preset: str) -> None:
        folder = CALIB / f"{model}_model"
        source = open_source(folder)
        config = source.config
        self.plan = resolve(load_recipe(preset), config, source.table, assumed=False)
        self.rows = [row for row in self.plan.quantized if row.solved]
        self.checkpoint = source.checkpoint
        read = LayerWeights(self.checkpoint, "")
        arrays = {name: read[name].float() for name in self.checkpoint.tensors}
        self.weights = arrays
        reference = ReferenceModel(config, lambda prefix: Scope(arrays, prefix))
        text = torch.from_numpy(
            load_rows(calibration_data(), folder, config, FIRST_JUDGE + JUDGES, LENGTH).ids
        )
        wanted = {input_of(row) for row in self.rows}
        self.judges = observe(reference, text[FIRST_JUDGE:], wanted, config, arrays)
        self.reference, self.text, self.wanted, self.config = reference, text, wanted, config

    def calibration(self, rows: int) -> Seen:
        """The inputs of the first rows."""
        return observe(self.reference, self.text[:rows], self.wanted, self.config, self.weights)

    @staticmethod
    def _factors(row: Row, seen: Seen) -> np.ndarray[Any, Any] | None:
        return seen.factors[f"{row.module.rsplit('.', 1)[0]}."] if row.expert is not None else None

    def errors(self, rows: int, settings: list[Setting]) -> Iterator[tuple[str, int, list[float]]]:
        """Of each weight its kind, its tokens, and by each setting its error over the plain method's."""
        seen = self.calibration(rows)
        taps = {row.module: seen.inputs[input_of(row)] for row in self.rows if input_of(row) in seen.inputs}
        scales = input_scales(
            self.rows,
            {name: float(np.abs(x).max()) for name, x in taps.items()},
            self.plan.recipe.headroom,
            [],
        )
        shared = shared_maxima(self.checkpoint, {}, self.rows)
        pools: dict[tuple[int | None, int], tuple[Doubles, float]] = {}
        for row in self.rows:
            if row.expert is not None and row.module.endswith("up_proj") and input_of(row) in seen.inputs:
                for gates in {setting.gates for setting in settings if setting.pooled}:
                    total, tokens = pools.get((row.layer, gates), (np.float64(0), 0.0))
                    own, count = self._own(row, seen, scales, gates)
                    pools[row.layer, gates] = total + own, tokens + count
        for row in self.rows:
            if input_of(row) not in seen.inputs or input_of(row) not in self.judges.inputs:
                continue
            judge, _ = self._own(row, self.judges, scales, gates=1)
            weight = np.ascontiguousarray(self.weights[row.name].numpy())
            most = shared[row.weight_group] if row.weight_group else largest(row, weight)
            whole, _ = weight_scale(row, most)
            plain = ARITHMETIC[row.format].encode(weight, whole, FORMATS[row.format].plain)
            least = self._error(row, weight, plain, whole, judge)
            tokens, found = len(seen.inputs[input_of(row)]), []
            owns = {gates: self._own(row, seen, scales, gates) for gates in {s.gates for s in settings}}
            for setting in settings:
                own, count = owns[setting.gates]
                moments = own / count
                if setting.pooled and row.expert is not None and row.module.endswith("up_proj"):
                    total, count = pools[row.layer, setting.gates]
                    share = tokens / (tokens + setting.pooled)
                    moments = share * moments + (1 - share) * total / count
                built = damping(DAMPING, row.shape[1], tokens)
                metric = prepare(moments, 1, setting.damping or built)
                solved = solve(row.format, weight, whole, metric, "gptq", 1)
                found.append(self._error(row, weight, solved.encoded, whole, judge) / least)
            yield kind(row), tokens, found

    def _own(self, row: Row, seen: Seen, scales: dict[str, np.float32], gates: int) -> tuple[Doubles, float]:
        """Sum of x x' of a row's input, and what the tokens weigh together."""
        x = rounded(row, seen.inputs[input_of(row)], scales.get(row.module, np.float32(1)))
        factors = self._factors(row, seen) if gates else None
        if factors is None:
            return gram([x], x.shape[1]), float(len(x))
        return gram([x * factors[:, None]], x.shape[1]), float(np.square(factors, dtype=np.float64).sum())

    @staticmethod
    def _error(row: Row, weight: Any, codes: Encoded, scale: np.float32, judge: Doubles) -> float:
        missed = weight.astype(np.float64) - ARITHMETIC[row.format].decode(codes, scale)
        return float(np.einsum("rj,rj->", missed @ judge, missed))


@click.command()
@click.argument("model", type=click.Choice(["demo", "nano"]))
@click.argument("presets", nargs=-1, required=True)
@click.option("--rows", multiple=True, type=int, default=[32])
@click.option("--damping", "dampings", multiple=True, type=float, default=[0, 0.05, 0.1, 0.2, 0.5, 1, 2, 4])
@click.option("--pooled", multiple=True, type=float, default=[0])
@click.option("--gates", multiple=True, type=click.IntRange(0, 1), default=[0])
@click.option("--json", "json_file", type=Path)
def main(
    model: str,
    presets: tuple[str, ...],
    rows: tuple[int, ...],
    dampings: tuple[float, ...],
    pooled: tuple[float, ...],
    gates: tuple[int, ...],
    json_file: Path | None,
) -> None:
    """Errors on other tokens by damping, over the plain method's."""
    results = []
    for preset in presets:
        bench = Bench(model, preset)
        for count in rows:
            settings = [Setting(count, d, k, g) for d in dampings for k in pooled for g in gates]
            logs: dict[str, list[list[float]]] = defaultdict(list)
            tokens: dict[str, list[int]] = defaultdict(list)
            for name, seen, ratios in bench.errors(count, settings):
                logs[name].append([float(np.log(r)) for r in ratios])
                tokens[name].append(seen)
            for name, values in logs.items():
                means = np.exp(np.mean(values, axis=0))
                width = f"{int(np.median(tokens[name]))} tokens"
                for setting, mean in zip(settings, means, strict=True):
                    results.append(
                        {"model": model, "preset": preset, "kind": name, "error": float(mean)}
                        | {"tokens": int(np.median(tokens[name]))}
                        | setting._asdict()
                    )
                line = " ".join(
                    f"{s.damping:g}/{s.pooled:g}{'g' if s.gates else ''}:{m:.4f}"
                    for s, m in zip(settings, means, strict=True)
                )
                click.echo(f"{model} {preset} {count} rows {name} ({width}, {len(values)} weights) {line}")
    if json_file:
        json_file.write_text(json.dumps(results))


if __name__ == "__main__":
    main()

"""What folds are worth: KL of the quantized model, with folded weights and without, in memory.

    python -m bench.folds [--model demo nano outlier] [--recipe nvfp4 nvfp4-full] [--rows 12] [--worth 0.5]

For each fold and some of them together, with NVFP4 weights encoded by `max` and by `mse`; inputs are rounded
with scales from the folded model's own calibration. Differences to the unfolded model are of the same rows,
with the standard error of their mean.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemoquant.calibrate.derived import input_scale
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.model.reference import ReferenceModel
from nemoquant.model.taps import Scope
from nemoquant.planning.plan import Plan
from nemoquant.planning.recipe import load_recipe
from nemoquant.planning.resolve import resolve
from nemoquant.quantized.packed import fake_quantize
from nemoquant.shipped import calibration_data, evaluation_data
from nemoquant.solve.folds import choose
from nemoquant.solve.folds import layer as layers
from nemoquant.solve.folds.transform import Transform, widen
from nemoquant.sources.source import open_source
from nemoquant.tokens.rows import load_rows

MODELS = Path(__file__).resolve().parents[1] / "calib"
LENGTH, BATCH = 512, 4
CHOICES = (
    (),
    ("latent",),
    ("expert",),
    ("gate",),
    ("norm",),
    ("latent", "expert"),
    ("latent", "gate"),
    layers.KINDS,
)
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass
class Seen:
    """Sums of ``x x'`` and maxima of each module's input."""

    moments: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    amax: dict[str, float] = field(default_factory=dict)
    squares: bool = True

    def tap(self, name: str, x: Tensor) -> Tensor:
        self.amax[name] = max(self.amax.get(name, 0.0), float(x.abs().max()))
        if self.squares and not name.endswith(".output"):
            wide = x.double()
            self.moments[name] = self.moments.get(name, 0) + (wide.mT @ wide).numpy()
        return x


def tensors(arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(widen(array).astype(np.float32)) for name, array in arrays.items()}


def model(config: Any, weights: Mapping[str, Tensor]) -> ReferenceModel:
    return ReferenceModel(config, lambda prefix: Scope(weights, prefix))


def run(
    reference: ReferenceModel, rows: Tensor, tap: Callable[[str, Tensor], Tensor] | None
) -> Iterable[Tensor]:
    return (reference.forward(part, tap=tap)[0] for part in rows.split(BATCH))


def observe(config: Any, weights: Mapping[str, Tensor], rows: Tensor, squares: bool) -> Seen:
    seen = Seen(squares=squares)
    for _ in run(model(config, weights), rows, seen.tap):
        pass
    return seen


def encoded(plan: Plan, weights: Mapping[str, Tensor], method: str) -> dict[str, Tensor]:
    """The weights after their formats and back."""
    amax: dict[str, float] = {}
    for row in plan.quantized:
        key = row.weight_group or row.name
        amax[key] = max(amax.get(key, 0.0), float(weights[row.name].abs().max()))
    result = dict(weights)
    for row in plan.quantized:
        arithmetic = ARITHMETIC[row.format]
        how = method if method in arithmetic.format.methods else "max"
        scale = arithmetic.decode_scale(amax[row.weight_group or row.name], how).value
        codes = arithmetic.encode(weights[row.name].numpy(), scale, how)
        result[row.name] = torch.from_numpy(arithmetic.decode(codes, scale))
    return result


def rounding(plan: Plan, amax: Mapping[str, float]) -> Callable[[str, Tensor], Tensor]:
    rows = {row.module: row for row in plan.quantized if row.activation_format}
    groups: dict[str, float] = {}
    for module, row in rows.items():
        key = row.input_group or module
        groups[key] = max(groups.get(key, 0.0), amax.get(module, 0.0))

    def tap(name: str, x: Tensor) -> Tensor:
        row = rows.get(name)
        if row is None:
            return x
        scale = input_scale(groups[row.input_group or name], row.activation_format)
        return fake_quantize(x, row.activation_format, scale)[0]

    return tap


def folded(arrays: Arrays, folds: Mapping[str, Transform]) -> Arrays:
    return {name: folds[name].apply(array) if name in folds else array for name, array in arrays.items()}


def kl(log_p: Tensor, logits: Tensor) -> Tensor:
    """Mean KL of each row."""
    log_q = torch.log_softmax(logits[:, :-1].double(), -1)
    return ((log_p - log_q) * log_p.exp()).sum(-1).mean(-1)


def scaled_norms(
    config: Any, arrays: Arrays, seed: int = 0
) -> tuple[Arrays, dict[int, np.ndarray[Any, Any]]]:
    """The same function with outliers: some channels of each norm times 2^k, readers' columns over it."""
    rng, result, chosen = np.random.default_rng(seed), dict(arrays), {}
    for layer in range(len(config.layers)):
        k = np.where(rng.random(config.hidden_size) < 0.1, rng.integers(3, 7, config.hidden_size), 0)
        chosen[layer] = k.astype(np.int8)
        folds = layers.norm_transforms(config, layer, chosen[layer])
        result = folded(result, folds)
    return result, chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["demo", "nano", "outlier"])
    parser.add_argument("--recipe", nargs="+", default=["nvfp4", "nvfp4-full"])
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--worth", type=float, default=choose.WORTH)
    given = parser.parse_args()
    choose.WORTH = given.worth
    for name in given.model:
        folder = MODELS / ("nano_model" if name.startswith("nano") else "demo_model")
        source = open_source(folder)
        config = source.config
        arrays = {n: source.checkpoint.array(n).copy() for n in source.checkpoint.tensors}
        if "outlier" in name:
            arrays, _ = scaled_norms(config, arrays)
        rows = torch.from_numpy(load_rows(evaluation_data(), folder, config, given.rows, LENGTH).ids)
        calibration = torch.from_numpy(
            load_rows(calibration_data(), folder, config, given.calibration, LENGTH).ids
        )
        plain = tensors(arrays)
        seen = observe(config, plain, calibration, squares=True)
        log_p = [torch.log_softmax(y[:, :-1].double(), -1) for y in run(model(config, plain), rows, None)]
        for recipe in given.recipe:
            plan = resolve(load_recipe(recipe), config, source.table, assumed=False)
            quantized = {row.name for row in plan.quantized if row.number.weight_bits < 8}
            base: dict[str, Tensor] = {}
            for kinds in CHOICES:
                folds: dict[str, Transform] = {}
                for i in range(len(config.layers)):
                    folds |= layers.layer_folds(config, i, kinds, arrays.__getitem__, seen.moments, quantized)
                if kinds and not any(not f.is_identity for f in folds.values()):
                    print(f"{name} {recipe} {'+'.join(kinds)}: nothing to fold", flush=True)
                    continue
                changed = tensors(folded(arrays, folds)) if folds else plain
                amax = observe(config, changed, calibration, squares=False).amax if folds else seen.amax
                exact = torch.cat(
                    [kl(p, y) for p, y in zip(log_p, run(model(config, changed), rows, None), strict=True)]
                )
                for method in ("max", "mse"):
                    weights = encoded(plan, changed, method)
                    outs = run(model(config, weights), rows, rounding(plan, amax))
                    found = torch.cat([kl(p, y) for p, y in zip(log_p, outs, strict=True)])
                    base.setdefault(method, found)
                    gain = found - base[method]
                    error = float(gain.std() / len(gain) ** 0.5)
                    print(
                        f"{name} {recipe} {method} {'+'.join(kinds) or 'none'}: KL {found.mean():.5f}, "
                        f"{gain.mean():+.5f} +- {error:.5f} ({gain.mean() / base[method].mean():+.1%}), "
                        f"unquantized {exact.mean():.1e}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()

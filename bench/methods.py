"""KL from the source, by method, fold, damping and calibration, from packed checkpoints of trained models.

    python -m bench.methods demo nvfp4-full nvfp4-full:method=max nvfp4:damping=1,folds=latent --rows 32
    python -m bench.methods nano fp8 fp8:method=max --first 32 --rows 64 --json FILE

`outlier` is a copy of the demo model with the same function, some of whose norm channels are 8 to 64 times as
large. A variant is a preset and what is changed of it: method, folds (with + between them, or none), descent,
headroom, propagate, outputs, parts and ridge of its targets (see `bench.propagation`), damping, calib (number
of calibration rows), tokens (in a row), seed (of the choice of calibration rows; 0 are the first ones, as by
default). Each is quantized by a process of its own, whose processor time and peak memory are printed. Its
logits are compared with the source's on the same rows of the evaluation text, both in float32 as `nemoquant
diff` does. Differences from the first variant are paired over rows: their mean, and its standard error.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml

from bench.measure import run
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.model.reference import ReferenceModel
from nemoquant.planning.recipe import load_recipe, parse_recipe
from nemoquant.quantized.checkpoint import PackedCheckpoint
from nemoquant.shipped import calibration_data, evaluation_data
from nemoquant.solve.layer import RIDGE
from nemoquant.sources.source import open_weights
from nemoquant.tokens.rows import load_rows
from tests.support.outlier_copy import outlier_copy

CALIB = Path(__file__).parent.parent / "calib"
BATCH = 4
LENGTH = 512
FLAGS = ("method", "descent", "propagate", "outputs", "headroom")


def logits(model: ReferenceModel, rows: np.ndarray, tap: Any = None) -> Iterator[torch.Tensor]:
    """Log-probabilities [rows, length, vocabulary] float64, a batch at a time."""
    for start in range(0, len(rows), BATCH):
        out, _ = model.forward(torch.from_numpy(rows[start : start + BATCH]), tap=tap)
        yield torch.log_softmax(out.double(), -1)


def standard_error(values: np.ndarray) -> float:
    """Of the mean; 0 of a single value."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def measured(folder: Path, rows: np.ndarray, reference: list[torch.Tensor]) -> dict[str, Any]:
    """KL, log-likelihood and top-1 agreement of each row."""
    opened = PackedCheckpoint(folder)
    model = ReferenceModel(opened.config, opened.weights)
    found = compared(model, rows, reference, opened.tap())
    opened.checkpoint.close()
    return found


def compared(
    model: ReferenceModel, rows: np.ndarray, reference: list[torch.Tensor], tap: Any = None
) -> dict[str, Any]:
    """The same of a model that is open already."""
    kl, nll, agree = [], [], []
    at = 0
    for wanted, found in zip(reference, logits(model, rows, tap), strict=True):
        tokens = torch.from_numpy(rows[at : at + len(found)])[:, 1:, None]
        at += len(found)
        p, q = wanted[:, :-1].double(), found[:, :-1]
        kl += ((p.exp() * (p - q)).sum(-1)).mean(-1).tolist()
        nll += (-q.gather(-1, tokens)[..., 0]).mean(-1).tolist()
        agree += (p.argmax(-1) == q.argmax(-1)).double().mean(-1).tolist()
    return {"kl": kl, "nll": nll, "top1": agree}


def variant(text: str) -> tuple[str, dict[str, str]]:
    """``PRESET:key=value,...``."""
    preset, _, rest = text.partition(":")
    return preset, dict(part.split("=", 1) for part in rest.split(",") if part)


def calibration_rows(source: Path, count: int, length: int, seed: int) -> np.ndarray:
    """Rows of the shipped calibration text; seed 0 takes the first."""
    with (opened := open_weights(source, "")).checkpoint:
        rows = load_rows(calibration_data(), source, opened.config, 10_000, length).ids
    if seed:
        rows = rows[np.random.default_rng(seed).permutation(len(rows))]
    return rows[:count]


def quantized(
    source: Path, out: Path, text: str, scratch: Path, chosen: np.ndarray | None = None
) -> dict[str, Any]:
    """Quantize by a variant, in a process of its own; returns what that took.

    ``chosen``: calibration rows [rows, length], in place of those that the variant says.
    """
    preset, keys = variant(text)
    recipe: str | Path = preset
    if "damping" in keys:
        data = load_recipe(preset).dump()
        data["name"] += "-damped"
        data["solve"] = data.get("solve", {}) | {"damping": float(keys["damping"])}
        parse_recipe(data)
        recipe = scratch / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(data))
    options = [f"--{key}={keys[key]}" for key in FLAGS if key in keys]
    if "folds" in keys:
        options.append(f"--folds={keys['folds'].replace('+', ',')}")
    if chosen is None and keys.keys() & {"calib", "tokens", "seed"}:
        chosen = calibration_rows(
            source, int(keys.get("calib", 32)), int(keys.get("tokens", LENGTH)), int(keys.get("seed", 0))
        )
    if chosen is not None:
        np.save(scratch / "rows.npy", chosen)
        options += [
            f"--calib={scratch / 'rows.npy'}",
            f"--rows={chosen.shape[0]}",
            f"--seq-len={chosen.shape[1]}",
        ]
    program = ["nemoquant"]
    if keys.keys() & {"parts", "ridge"}:
        program = ["bench.propagation", keys.get("parts", "both"), keys.get("ridge", str(RIDGE))]
    command = [sys.executable, "-m", *program, "quantize", source, out, "--recipe", recipe, *options]
    cost = run(list(map(str, command)), scratch / "said")
    return cost.json()


@click.command()
@click.argument("model", type=click.Choice(["demo", "nano", "outlier"]))
@click.argument("variants", nargs=-1, required=True)
@click.option("--rows", default=32, show_default=True, help="Rows of the evaluation text.")
@click.option("--first", default=0, show_default=True, help="The first of them.")
@click.option("--json", "json_file", type=Path)
def main(model: str, variants: tuple[str, ...], rows: int, first: int, json_file: Path | None) -> None:
    """Compare variants on a trained model."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as end:
        if model == "outlier":
            source = Path(folder) / "source"
            outlier_copy(CALIB / "demo_model", source)
        else:
            source = CALIB / f"{model}_model"
        checkpoint = end.enter_context(Checkpoint(source))
        with (opened := open_weights(source, "")).checkpoint:
            config = opened.config
            ids = load_rows(evaluation_data(), source, config, first + rows, LENGTH).ids[first:]
        bf16 = ReferenceModel(config, lambda prefix: LayerWeights(checkpoint, prefix))
        reference = [part.float() for part in logits(bf16, ids)]
        for text in variants:
            out = Path(folder) / f"out{len(results)}"
            made = quantized(source, out, text, Path(folder))
            results[text] = made | measured(out, ids, reference)
            kl = np.array(results[text]["kl"])
            paired = kl - np.array(results[variants[0]]["kl"])
            click.echo(
                f"{model} {text:<44} KL {kl.mean():.5f}  {paired.mean():+.5f} +- "
                f"{standard_error(paired):.5f}  ppl {np.exp(np.mean(results[text]['nll'])):.3f}  "
                f"top-1 {np.mean(results[text]['top1']):.4f}  "
                f"{made['cpu']:.1f} s of CPU, {made['peak_tree']:.2f} GB"
            )
    if json_file:
        json_file.write_text(json.dumps({"model": model, "first": first, "rows": rows, "variants": results}))


if __name__ == "__main__":
    main()

"""What the bench of ideas computes with: its forward pass, its gradients, and its two-sided descent."""

from pathlib import Path

import numpy as np
import torch

from bench.ideas.forward import Forward, product, through
from bench.ideas.gradients import gradients
from bench.ideas.refit import refitted
from bench.ideas.two_sided import output_side, solve_both
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.model.reference import ReferenceModel
from nemoquant.model.taps import Scope
from nemoquant.solve.metric import gram, prepare
from nemoquant.solve.solver import solve
from nemoquant.sources.source import open_source

ROOT = Path(__file__).resolve().parents[2]
OUT, IN = 24, 48


def _weight() -> tuple[np.ndarray, np.float32, object, np.ndarray]:
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(IN, IN)) @ np.diag(np.linspace(0.1, 3, IN))
    x = (rng.normal(size=(256, IN)) @ mixed).astype(np.float32)
    weight = rng.normal(size=(OUT, IN)).astype(np.float32)
    g = (rng.normal(size=(256, OUT)) @ rng.normal(size=(OUT, OUT))).astype(np.float32)
    scale = ARITHMETIC["nvfp4"].decode_scale(np.abs(weight).max(), "mse").value
    return weight, scale, prepare(gram([x], IN), len(x), 0.1), g


def test_rows_are_coupled_by_what_is_beside_the_diagonal_alone():
    weight, scale, metric, g = _weight()
    outputs = np.diag(np.diag(output_side(g, 0.1)))
    found = solve_both("nvfp4", weight, scale, metric, outputs, sweeps=1, factored=True)
    wanted = solve("nvfp4", weight, scale, metric, "gptq", 1).encoded
    codes = found.codes != wanted.codes
    assert codes.mean() < 0.01  # sums in another order


def test_two_sided_codes_have_less_error_on_both_sides():
    weight, scale, metric, g = _weight()
    outputs = output_side(g, 0.1)

    def error(encoded) -> float:
        missed = weight - ARITHMETIC["nvfp4"].decode(encoded, scale).astype(np.float64)
        return float(np.vdot(missed, outputs @ missed @ metric.matrix))

    rows = error(solve("nvfp4", weight, scale, metric, "gptq", 1).encoded)
    for factored in (False, True):
        assert error(solve_both("nvfp4", weight, scale, metric, outputs, 1, factored)) < 0.9 * rows


def test_the_forward_pass_is_the_reference_models():
    for name in ("demo", "nano"):
        source = open_source(ROOT / "calib" / f"{name}_model")
        read = LayerWeights(source.checkpoint, "")
        weights = {n: read[n].float() for n in source.checkpoint.tensors}
        tokens = torch.arange(3, 83).view(1, -1)
        wanted, _ = ReferenceModel(source.config, lambda prefix, w=weights: Scope(w, prefix)).forward(tokens)
        with torch.no_grad():
            found = Forward(source.config, weights).logits(tokens, product, through)
        assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()  # float32 sums in another order
        modules = {f"backbone.layers.{i}.mixer.in_proj" for i in range(10)}
        for kind in ("loss", "choice:0.02", "local", "random"):
            g = gradients(source.config, weights, tokens, modules, kind, seed=0)
            assert g and all(np.isfinite(v).all() and v.any() for v in g.values())
        same = refitted(source.config, weights, weights, {}, tokens, ["router", "fc1", "fc2", "head"], 0.1)
        assert all((same[n] - weights[n]).abs().max() < 1e-3 for n in weights)

"""A model whose layers have sizes of their own goes through every verb."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from support.puzzle import LARGE, PUZZLE, SMALL
from support.synthetic import random_tensors, write_checkpoint

import nemoquant
from nemoquant.engine.torch import TorchEngine
from nemoquant.errors import UsageError

PRESETS = ["mxfp8", "nvfp4", "nvfp4-w4a16"]
EXPERTS = {2: LARGE, 5: SMALL}


@pytest.fixture
def puzzle(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "puzzle", PUZZLE, random_tensors(PUZZLE))


@pytest.mark.parametrize("preset", PRESETS)
def test_it_is_quantized_and_verified(
    preset: str, puzzle: Path, quantized: Callable[..., Path], token_rows: Path
) -> None:
    plan = nemoquant.plan(puzzle, preset)
    out = quantized(preset, of=puzzle)
    found = nemoquant.verify(out, against=puzzle)
    assert found["ok"], found
    sizes = {}
    for shard in sorted(out.glob("*.safetensors")):
        with safe_open(shard, "np") as file:
            sizes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert len(sizes) == plan.tensors_out
    for layer, own in EXPERTS.items():
        experts = f"backbone.layers.{layer}.mixer.experts"
        codes = own["moe_latent_size"] // (2 if preset.startswith("nvfp4") else 1)
        last = own["n_routed_experts"] - 1
        assert sizes[f"{experts}.{last}.up_proj.weight"] == [own["moe_intermediate_size"], codes]
        assert f"{experts}.{last + 1}.up_proj.weight" not in sizes
    assert json.loads((out / "config.json").read_text())["block_configs"] == PUZZLE["block_configs"]
    report = nemoquant.diff(puzzle, out, data=token_rows)
    layers = {layer.name: layer for layer in report.candidates[0].layers}
    for layer, own in EXPERTS.items():
        found_here = layers[str(layer)]
        assert found_here.routing is not None
        assert len(found_here.routing.tokens_per_expert) == own["n_routed_experts"]
        assert found_here.alone.relative < 0.25  # two roundings to 4 bits, about 0.1 each; wrong weights: 1.4
    assert report.candidates[0].mtp_acceptance is not None


def test_codes_are_solved_for_and_estimated(
    puzzle: Path, quantized: Callable[..., Path], token_rows: Path
) -> None:
    """With inputs, folds and tokens per expert of each layer's own number of experts."""
    out = quantized("nvfp4-full", of=puzzle, method="gptq")
    assert nemoquant.verify(out, against=puzzle)["ok"]
    scales = json.loads((out / "nemoquant_scales.json").read_text())
    assert {k: len(v) for k, v in scales["tokens_per_expert"].items()} == {"2": 8, "5": 4}
    estimate = nemoquant.estimate(puzzle, "nvfp4-full", nemoquant.RunOptions(data=token_rows, threads=1))
    assert estimate.seconds > 0


def test_active_parameters_and_sizes_are_told(puzzle: Path) -> None:
    found = nemoquant.inspect(puzzle)
    idle = sum(
        (own["n_routed_experts"] - own["num_experts_per_tok"])
        * 2
        * own["moe_intermediate_size"]
        * own["moe_latent_size"]
        for own in EXPERTS.values()
    )
    assert found["active_parameters"] == found["parameters_without_mtp"] - idle
    assert found["layers"]["sizes"]["n_routed_experts"] == {"8": 1, "4": 1}
    assert set(found["layers"]["sizes"]) == set(LARGE)


def test_it_is_converted(puzzle: Path, quantized: Callable[..., Path], tmp_path: Path) -> None:
    out = quantized("fp8", of=puzzle)
    for target in ("compressed-tensors", "bf16"):
        made = nemoquant.convert(out, tmp_path / target, target)
        assert nemoquant.verify(made.out)["ok"]


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
@pytest.mark.parametrize("preset", ["nvfp4-w4a16", "fp8"])
def test_its_graph_computes_the_same(preset: str, puzzle: Path, quantized: Callable[..., Path]) -> None:
    from nemoquant.engine.onnxruntime import OnnxRuntimeEngine

    out = quantized(preset, of=puzzle)
    nemoquant.export_onnx(out)
    ids = np.random.default_rng(0).integers(3, 96, (2, 24))
    theirs, ours = (engine(out).forward(ids).logits for engine in (OnnxRuntimeEngine, TorchEngine))
    error = np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
    # a code that flips where inputs are rounded is no error of either side: see test_graph_models.py
    assert error < (1e-4 if preset == "nvfp4-w4a16" else 0.05)


@pytest.mark.skipif(importlib.util.find_spec("onnx_ir") is None, reason="onnx is not installed")
def test_a_state_of_another_size_has_no_graph(tmp_path: Path) -> None:
    blocks = [*PUZZLE["block_configs"]]
    blocks[4] = {"block_type": "mamba", "ssm_state_size": 8}
    raw = PUZZLE | {"block_configs": blocks}
    folder = write_checkpoint(tmp_path / "states", raw, random_tensors(raw))
    with pytest.raises(
        UsageError, match=r"backbone.layers.4 \(mamba\) differs from other layers of its kind"
    ):
        nemoquant.export_onnx(folder, tmp_path / "graph")
    assert not (tmp_path / "graph").exists()

"""Layers solved on the stream of the quantized layers before them, as a part of `quantize`."""

import json
from contextlib import suppress

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.files import tree

from nemoquant.api import RunOptions, plan, quantize, verify
from nemoquant.checkpoint.folder import FOLDER, STREAM
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.errors import CalibrationError, Interrupted, UsageError
from nemoquant.model.names import ROUTER
from nemoquant.model.reference import ReferenceModel, layer_forward
from nemoquant.model.taps import prefixed
from nemoquant.planning.plan import method_warnings
from nemoquant.planning.solving import Overrides
from nemoquant.quantized.checkpoint import PackedCheckpoint
from nemoquant.solve import collector, stream
from nemoquant.solve.order import passes, stages

DATA = {"dtype": "float32", "threads": 1, "row_batch": 3}
RECIPES = {
    "w4a4": "name: a\nextends: nvfp4-full\nfolds: [latent]\nsolve: {propagate: quantized}\n",
    "mixed": """name: a
extends: nvfp4
folds: []
solve: {propagate: quantized}
rules:
  - {roles: [latent.*], format: fp8, scales: gptq}
  - {roles: [shared_experts.up_proj, attention.o_proj], format: nvfp4, scales: mse}
""",
    "plain-layers": """name: a
extends: nvfp4-full-w4a16
solve: {propagate: quantized}
rules:
  - {roles: [mamba.*, mlp.*, "attention.*"], layers: [0, 1, 3], format: source}
""",
}


@pytest.fixture
def source(fitting):
    return fitting("nvfp4-full")


def make(source, rows, out, recipe="nvfp4-full", **options):
    return quantize(source, out, recipe, RunOptions(data=rows, **(DATA | options)))


def written(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_stream_is_what_the_output_computes(recipe, source, token_rows, tmp_path, monkeypatch):
    """Routed as the source routes: an oracle opens the output, and gives routers the source's input."""
    states = []
    ended = stream.QuantizedStream.close

    def end(self):
        states.append(self.states.read(range(8)))
        ended(self)

    monkeypatch.setattr(stream.QuantizedStream, "close", end)
    out = tmp_path / "out"
    make(source, token_rows, out, written(tmp_path, RECIPES[recipe]))
    assert verify(out, source)["ok"]

    tokens = torch.from_numpy(np.load(token_rows))
    opened = PackedCheckpoint(out)
    routed = {}

    def keep(name, x):
        if name.endswith(f".{ROUTER}"):
            routed[name] = x
        return x

    with Checkpoint(source) as checkpoint:
        ReferenceModel(opened.config, lambda prefix: LayerWeights(checkpoint, prefix)).hidden(
            tokens, tap=keep
        )
    rounded = opened.tap()
    x = ReferenceModel(opened.config, opened.weights).embed(tokens)
    for i, kind in enumerate(opened.config.layers):
        prefix = f"backbone.layers.{i}."
        tap = prefixed(lambda name, x: routed[name] if name in routed else rounded(name, x), prefix)
        x, _ = layer_forward(opened.config.of_layer(i), kind, opened.weights(prefix), x, None, tap)
    opened.checkpoint.close()
    torch.testing.assert_close(states[0], x, rtol=1e-4, atol=1e-4)


def test_before_the_first_error_nothing_changes(source, token_rows, tmp_path):
    """In the first layer both streams are one: in_proj gets the same codes, out_proj others."""
    for propagate in ("source", "quantized"):
        make(source, token_rows, tmp_path / f"on-{propagate}", "nvfp4-full-w4a16", propagate=propagate)

    def codes(propagate, module):
        (file,) = (tmp_path / f"on-{propagate}").glob("*.safetensors")
        with safe_open(file, "pt") as shard:
            return shard.get_tensor(f"backbone.layers.0.mixer.{module}.weight")

    assert torch.equal(codes("source", "in_proj"), codes("quantized", "in_proj"))
    assert not torch.equal(codes("source", "out_proj"), codes("quantized", "out_proj"))


def test_an_interrupted_run_ends_with_the_same_bytes(source, token_rows, tmp_path, monkeypatch):
    """Killed after each pass over a layer, and after each layer's state was written."""
    make(source, token_rows, tmp_path / "whole", propagate="quantized")
    out, turned = tmp_path / "out", stream.QuantizedStream._observe

    for count in range(1, 12, 2):
        seen = []

        def until(self, layer, rows, seen=seen, count=count):
            if len(seen) == count:
                raise KeyboardInterrupt
            seen.append(layer.number)
            turned(self, layer, rows)

        monkeypatch.setattr(stream.QuantizedStream, "_observe", until)
        with suppress(Interrupted):
            make(source, token_rows, out, propagate="quantized", resume=count > 1)
    monkeypatch.setattr(stream.QuantizedStream, "_observe", turned)
    make(source, token_rows, out, propagate="quantized", resume=True)
    assert tree(out) == tree(tmp_path / "whole")


def test_damaged_states_are_found(source, token_rows, tmp_path, monkeypatch):
    out, finish = tmp_path / "out", collector.SolveCollector.finish

    def until(self, layer, batches):
        if layer == 3:
            raise KeyboardInterrupt
        finish(self, layer, batches)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(collector.SolveCollector, "finish", until)
        make(source, token_rows, out, propagate="quantized")
    state = json.loads((tmp_path / f"out.partial/{FOLDER}/state.json").read_text())["state"]
    (name,) = set(STREAM) & set(state["calibration"]["collected"]["solved"])
    file = tmp_path / f"out.partial/{FOLDER}/{name}"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    said = []
    quantize(
        source,
        out,
        "nvfp4-full",
        RunOptions(data=token_rows, propagate="quantized", resume=True, **DATA),
        say=said.append,
    )
    assert any("damaged: calibrating from the first layer on" in text for text in said)
    make(source, token_rows, tmp_path / "whole", propagate="quantized")
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("width", "module"),
    [(64, r"layers\.0\.mixer\.out_proj"), (32, r"layers\.2\.mixer\.experts\.\d\.down_proj")],
)
def test_a_stream_that_is_not_finite_is_refused(width, module, source, token_rows, tmp_path, monkeypatch):
    """Also where the layer is not computed to its end."""
    rounded = stream._rounded

    def broken(x, number, scale):
        return torch.full_like(x, torch.inf) if x.shape[-1] == width else rounded(x, number, scale)

    monkeypatch.setattr(stream, "_rounded", broken)
    with pytest.raises(CalibrationError, match=rf"NaN or Inf in the input of .*{module} on the stream of"):
        make(source, token_rows, tmp_path / "out", propagate="quantized")


def test_the_order_of_a_layer(source):
    made = plan(source, "nvfp4-full")
    of = {i: [row for row in made.quantized if row.layer == i] for i in range(6)}
    roles = [sorted({row.role for row in part}) for part in stages("moe", of[2])]
    assert roles == [
        ["experts.up_proj", "shared_experts.up_proj"],
        ["experts.down_proj"],
        ["shared_experts.down_proj"],
    ]
    assert [passes(kind, of[i]) for i, kind in enumerate(made.config.layers)] == [2, 2, 4, 2, 2, 4]
    assert passes("moe", []) == 1


def test_what_is_said_of_it(source, token_rows, tmp_path):
    made = plan(source, "nvfp4", propagate="quantized")
    assert made.propagates and made.recipe.name == "nvfp4-on-quantized"
    assert made.recipe.solve.propagate == "quantized"
    by_default, without = plan(source, "fp8"), plan(source, "fp8", propagate="source")
    assert by_default.propagates and by_default.recipe.name == "fp8"
    assert not without.propagates and without.recipe.name == "fp8-on-source"
    assert not plan(source, "nvfp4-full", method="max", propagate="quantized").propagates
    plain = plan(source, "nvfp4-full", method="max")
    assert method_warnings(plain, Overrides(propagate="quantized")) == [
        "--propagate quantized: has no effect, no weight gets hess or gptq"
    ]
    with pytest.raises(UsageError, match="propagate is 'bf16'; expected source or quantized"):
        RunOptions(propagate="bf16")
    make(source, token_rows, tmp_path / "out", propagate="quantized")
    solved = json.loads((tmp_path / "out/nemoquant_solved.json").read_text())
    assert solved["propagate"] == "quantized"
    card = (tmp_path / "out/README.md").read_text()
    assert "on the stream of the quantized layers before them" in card

"""Errors of outputs weighed by the model's loss, as a part of `quantize`."""

import importlib.util
import json
import math
from contextlib import closing, suppress

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.files import tree
from support.norms import relative_error as relative
from support.overflow import head_of_token_95
from support.small_model import transformers_model

from nemoquant.api import RunOptions, plan, quantize, verify
from nemoquant.calibrate.memory import backward_rows
from nemoquant.checkpoint.folder import FOLDER, gradient_file
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.errors import CalibrationError, Interrupted, NemoquantError, UsageError
from nemoquant.planning.plan import method_warnings
from nemoquant.planning.solving import Overrides
from nemoquant.run.state import read_state, write_state
from nemoquant.solve import backward, collector, layer, memory
from nemoquant.sources.source import open_weights
from nemoquant.tokens.rows import Rows

DATA = {"dtype": "float32", "threads": 1, "row_batch": 3}


@pytest.fixture
def source(fitting):
    return fitting("nvfp4-full")


def make(source, rows, out, recipe="nvfp4-full-w4a16", say=lambda text: None, **options):
    options = {"outputs": "loss", "propagate": "source"} | DATA | options
    return quantize(source, out, recipe, RunOptions(data=rows, **options), say=say)


def gradients(source, token_rows, folder, dtype=torch.float32, row_batch=3):
    """Of all layers, as `quantize` finds them; in files."""
    folder.mkdir()
    ids = np.load(token_rows)
    with (opened := open_weights(source, "")).checkpoint as checkpoint:
        config = opened.config
        files = backward.GradientFiles(folder, (*ids.shape, config.hidden_size), dtype, {})
        told = []
        backward.find_gradients(
            checkpoint,
            config,
            Rows(ids, "test", 0),
            files,
            dead=(),
            device=torch.device("cpu"),
            dtype=dtype,
            row_batch=row_batch,
            keep=lambda *state: told.append(state),
        )
    return config, files, told


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_gradients_are_those_of_transformers(source, token_rows, tmp_path):
    """Of the loss of the labels that were drawn, at the stream before every layer."""
    config, files, told = gradients(source, token_rows, tmp_path / "files")
    assert [count for count, *_ in told] == list(range(1, 2 * len(config.layers) + 1))
    assert set(files.digests) == {gradient_file(i) for i in range(1, len(config.layers) + 1)}
    with Checkpoint(source) as checkpoint:
        from nemoquant.checkpoint.weights import LayerWeights

        weights = {name: w.float().clone() for name, w in LayerWeights(checkpoint, "").items()}
    raw = json.loads((source / "config.json").read_text()) | {"time_step_min": 0.0}
    model = transformers_model(raw, config, weights).eval()
    ids = torch.from_numpy(np.load(token_rows))
    before = {}
    for i, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: before.__setitem__(i, args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    model.model.norm_f.register_forward_pre_hook(
        lambda _, args: before.__setitem__(len(config.layers), args[0])
    )
    logits = model(ids, use_cache=False).logits.float()
    p = torch.softmax(logits.detach(), -1)
    loss = 0
    for row in range(len(ids)):
        draws = torch.rand(ids.shape[1], generator=torch.Generator().manual_seed(backward.SEED + row))
        labels = [int((p[row, t].double().cumsum(-1) <= draws[t]).sum()) for t in range(ids.shape[1])]
        loss = loss - torch.log_softmax(logits[row], -1)[range(ids.shape[1]), labels].sum()
    theirs = torch.autograd.grad(loss, [before[i] for i in range(1, len(config.layers) + 1)])
    for i, their in enumerate(theirs, 1):
        file = files.open(gradient_file(i))
        assert relative(file.read(range(len(ids))), their) < 1e-4
        file.close()


def test_labels_are_drawn_from_the_models_own_distribution():
    """The mean of the gradient at the logits is 0, and its second moment the Fisher matrix diag(p) - p p'."""
    p = torch.tensor([0.5, 0.25, 0.2, 0.05])
    draws = torch.rand(40_000, generator=torch.Generator().manual_seed(1)).double()
    found = backward._missed(p.log().expand(len(draws), -1).clone(), draws).double()
    assert found.mean(0).abs().max() < 0.01
    expected = torch.diag(p) - p[:, None] * p
    torch.testing.assert_close(found.T @ found / len(draws), expected.double(), atol=0.01, rtol=0)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert backward._missed(p.log().expand(2, -1).clone(), ends).argmin(-1).tolist() == [0, 3]


def test_rows_at_once_change_nothing_but_rounding(source, token_rows, tmp_path):
    config, files, _ = gradients(source, token_rows, tmp_path / "a", row_batch=8)
    _, others, _ = gradients(source, token_rows, tmp_path / "b", row_batch=1)
    for i in range(1, len(config.layers) + 1):
        one, other = files.open(gradient_file(i)), others.open(gradient_file(i))
        assert relative(one.read(range(8)), other.read(range(8))) < 1e-5
        one.close(), other.close()


@pytest.mark.parametrize(
    "options", [{}, {"propagate": "quantized"}, {"folds": ["latent", "expert"]}], ids=str
)
def test_codes_are_solved_for_the_loss(options, source, token_rows, tmp_path):
    """The output is whole, its codes are others, and the records' errors are of both metrics."""
    out, plain = tmp_path / "out", tmp_path / "plain"
    make(source, token_rows, out, **options)
    make(source, token_rows, plain, outputs="equal", **options)
    assert verify(out, source)["ok"]
    with (
        safe_open(next(out.glob("*.safetensors")), "pt") as a,
        safe_open(next(plain.glob("*.safetensors")), "pt") as b,
    ):
        names = [name for name in list(a.keys()) if name.endswith("proj.weight")]
        other = [name for name in names if not torch.equal(a.get_tensor(name), b.get_tensor(name))]
    assert len(other) > 0.5 * len(names)
    solved = json.loads((out / "nemoquant_solved.json").read_text())
    assert solved["outputs"] == "loss"
    for unit in solved["units"].values():
        assert all(o <= p for o, p in zip(unit["objective"], unit["plain"], strict=True))


def test_the_metric_is_that_of_the_outputs(source, token_rows, tmp_path, monkeypatch):
    """What solving gets for a weight, against gradients at the weight itself: sums of g x' over tokens."""
    seen = {}
    solve = layer.LayerSolver._weighed

    def look(self, work, rows, start):
        name = work.row.module
        g = np.concatenate(list(self.graded.pieces(name))) if name in self.graded else None
        seen[name] = g
        return solve(self, work, rows, start)

    monkeypatch.setattr(layer.LayerSolver, "_weighed", look)
    make(source, token_rows, tmp_path / "out")
    made = plan(source, "nvfp4-full-w4a16")
    assert set(seen) == {row.module for row in made.quantized if row.layer is not None}
    for row in made.quantized:
        if row.layer is not None and seen[row.module] is not None:
            assert seen[row.module].shape[1] == row.shape[0]
            assert row.expert is not None or len(seen[row.module]) == np.load(token_rows).size


def test_many_outputs_are_weighed_in_parts(source, token_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "OUTPUTS", 24)
    make(source, token_rows, tmp_path / "out")
    assert verify(tmp_path / "out", source)["ok"]


def test_an_interrupted_run_ends_with_the_same_bytes(source, token_rows, tmp_path, monkeypatch):
    """Killed in each layer, forward, back, and when it is solved."""
    make(source, token_rows, tmp_path / "whole")
    layers = len(plan(source, "nvfp4-full").config.layers)
    out, count = tmp_path / "out", 0
    finish, keep = backward.GradientFiles.finish, collector.keep_at_outputs
    while not out.exists():
        left = [3]

        def until(step, left=left):
            def wrapped(*given, **named):
                left[0] -= 1
                if not left[0]:
                    raise KeyboardInterrupt
                return step(*given, **named)

            return wrapped

        with monkeypatch.context() as patch, suppress(Interrupted):
            patch.setattr(backward.GradientFiles, "finish", until(finish))
            patch.setattr(collector, "keep_at_outputs", until(keep))
            make(source, token_rows, out, resume=count > 0)
        count += 1
        if not out.exists():
            inner = {path.name for path in (tmp_path / f"out.partial/{FOLDER}").iterdir()}
            state = json.loads((tmp_path / f"out.partial/{FOLDER}/state.json").read_text())["state"]
            assert state["gradients"] is None or set(state["gradients"]["files"]) <= inner
    assert count > layers
    assert tree(out) == tree(tmp_path / "whole")


def test_a_damaged_file_is_found(source, token_rows, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(collector, "keep_at_outputs", stop)
        make(source, token_rows, out)
    file = tmp_path / f"out.partial/{FOLDER}/{gradient_file(2)}"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(CalibrationError, match=r"gradient.2 is not what the run wrote; remove .*out.partial"):
        make(source, token_rows, out, resume=True)


def test_a_state_that_no_run_writes_is_refused(source, token_rows, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(collector, "keep_at_outputs", stop)
        make(source, token_rows, out)
    file = tmp_path / f"out.partial/{FOLDER}/state.json"
    state = read_state(file)
    files = state["gradients"]["files"]
    lacking = {name: digest for name, digest in files.items() if name != gradient_file(1)}
    for change, says in (
        ({"layers": 99}, "more layers or rows than this run"),
        ({"dead_rows": [8]}, "more layers or rows than this run"),
        ({"dead_rows": [0, 1, 2]}, "more rows came to NaN or Inf"),
        ({"files": {"../x": "0" * 64}}, "not the name of a file of hidden states or of gradients"),
        ({"files": {gradient_file(1): "0"}}, "can't be read"),
        ({"files": lacking}, r"before\.1 is not what the run wrote"),
    ):
        write_state(file, state | {"gradients": state["gradients"] | change})
        with pytest.raises(NemoquantError, match=says):
            make(source, token_rows, out, resume=True)


def stop(*_given, **_named):
    raise KeyboardInterrupt


def test_another_source_is_refused(source, token_rows, tmp_path, monkeypatch):
    """Gradients of other weights are no use: hashes of what they were made from are in the state."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(collector, "keep_at_outputs", stop)
        make(source, token_rows, out)
    file = next(source.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-50] ^= 1
    file.write_bytes(data)
    with pytest.raises(UsageError, match="was begun with other weights"):
        make(source, token_rows, out, resume=True)


def test_gradients_that_are_not_finite_are_refused(source, token_rows, tmp_path, monkeypatch):
    def broken(_checkpoint, _config, x, _row):
        return torch.full_like(x, math.inf)

    monkeypatch.setattr(backward, "head_gradient", broken)
    with pytest.raises(
        CalibrationError, match=r"NaN or Inf in the gradients of the loss; .* --outputs equal"
    ):
        make(source, token_rows, tmp_path / "out")


@pytest.mark.parametrize("propagate", ["source", "quantized"])
def test_a_row_that_comes_to_nan_has_no_gradient(propagate, make_checkpoint, tmp_path):
    """It overflows at the head, where the gradients begin; the others have theirs."""
    source = make_checkpoint("head", head_of_token_95)
    ids = np.random.default_rng(1).integers(3, 95, (20, 16))
    ids[10, 7] = 95
    np.save(tmp_path / "rows.npy", ids)
    _config, files, told = gradients(source, tmp_path / "rows.npy", tmp_path / "files")
    assert [dead for _layers, dead, _files in told][-1] == [10]
    with closing(files.open(gradient_file(1))) as found:
        assert [row for row in range(20) if not found.read([row]).any()] == [10]
    out = tmp_path / "out"
    result = make(source, tmp_path / "rows.npy", out, "fp8", method="gptq", propagate=propagate)
    assert "1 calibration rows came to NaN or Inf and were left out" in result.warnings
    verify(out)


def test_what_is_said_of_it(source, token_rows, tmp_path):
    made = plan(source, "fp8", outputs="loss")
    assert made.weighs_outputs and made.recipe.name == "fp8-by-loss"
    assert not plan(source, "nvfp4-full", method="max", outputs="loss").weighs_outputs
    assert not plan(source, "fp8", descent=0, outputs="loss").weighs_outputs
    given = Overrides(outputs="loss", descent=0)
    assert method_warnings(plan(source, "fp8", descent=0, outputs="loss"), given) == [
        "outputs loss: has no effect, it needs a descent of 1 or more"
    ]
    plain = plan(source, "nvfp4-full", method="max")
    assert method_warnings(plain, Overrides(outputs="loss")) == [
        "--outputs loss: has no effect, no weight gets hess or gptq"
    ]
    with pytest.raises(UsageError, match="outputs is 'bf16'; expected equal or loss"):
        RunOptions(outputs="bf16")
    make(source, token_rows, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "their errors count as they matter to the loss" in card


def test_rows_on_the_way_back():
    assert [backward_rows(rows) for rows in (1, 5, 6, 96)] == [1, 1, 1, 16]

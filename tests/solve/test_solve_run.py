"""Solving as a part of `quantize`: what is written, how it resumes, and what is refused."""

import json
import shutil
from contextlib import suppress

import numpy as np
import pytest
from support.files import tree
from support.places import DEMO

from nemoquant import api
from nemoquant.api import RunOptions, quantize, verify
from nemoquant.calibrate.inputs import InputFile
from nemoquant.errors import CalibrationError, Interrupted, OutputError, UsageError
from nemoquant.planning.plan import method_warnings
from nemoquant.planning.solving import Overrides
from nemoquant.solve import layer as solving
from nemoquant.solve.collector import SolveCollector

DATA = {"dtype": "float32", "threads": 1}
OTHERS = {"dtype": "float32", "threads": 2, "row_batch": 1}


def make(source, rows, out, preset="nvfp4-full", **options):
    return quantize(source, out, preset, RunOptions(data=rows, **DATA, **options))


def solved(out):
    return json.loads((out / "nemoquant_solved.json").read_text())["units"]


@pytest.mark.parametrize("preset", ["nvfp4-full", "fp8", "nvfp4-w4a16", "nvfp4-full-w4a16"])
def test_each_weight_has_a_method_and_is_not_worse_than_plain(preset, fitting, token_rows, tmp_path):
    source = fitting(preset)
    result = make(source, token_rows, tmp_path / "out", preset)
    units = solved(tmp_path / "out")
    assert sum(len(unit["method"]) for unit in units.values()) == len(result.plan.quantized)
    better = 0
    for unit in units.values():
        for method, tokens, objective, plain in zip(
            unit["method"], unit["tokens"], unit["objective"], unit["plain"], strict=True
        ):
            assert objective <= plain
            assert (method == "gptq") == (tokens > 0 and objective < plain)
            better += method == "gptq"
    assert better > 0.9 * len(result.plan.quantized)
    report = verify(tmp_path / "out", source)
    assert report["ok"], report["problems"]
    assert report["checked"]["solved"] == len(result.plan.quantized)


@pytest.mark.parametrize("rule", ["format: nvfp4", "format: fp8, activations: none"])
def test_the_head_is_solved_too(rule, fitting, token_rows, tmp_path):
    """Its input comes in rows, where those of layers come in tokens."""
    recipe = tmp_path / "head.yaml"
    recipe.write_text(f"name: head\nextends: fp8\nrules: [{{roles: [lm_head], scales: gptq, {rule}}}]\n")
    source = fitting("fp8")
    result = make(source, token_rows, tmp_path / "out", str(recipe))
    units = solved(tmp_path / "out")
    tokens = {count for unit in units.values() for count in unit["tokens"]}
    assert max(tokens) == 8 * 32
    assert sum(len(unit["method"]) for unit in units.values()) == len(result.plan.quantized)
    assert [unit["method"] for name, unit in units.items() if "lm_head" in name] == [["gptq"]]
    assert verify(tmp_path / "out", source)["ok"]


def test_the_same_run_gives_the_same_bytes(fitting, token_rows, tmp_path):
    source = fitting("nvfp4-full")
    for name in ("a", "b"):
        make(source, token_rows, tmp_path / name)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_sums_in_another_order_give_nearly_the_same(fitting, token_rows, tmp_path, monkeypatch, compare):
    """As on another machine: with other threads and rows at once, and with tokens summed a few at a time."""
    source = fitting("nvfp4-full")
    make(source, token_rows, tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr("nemoquant.solve.metric._ROWS", 7)
        quantize(source, tmp_path / "b", "nvfp4-full", RunOptions(data=token_rows, **OTHERS))
    first, second = solved(tmp_path / "a"), solved(tmp_path / "b")
    assert [unit["gram"] for unit in first.values()] != [unit["gram"] for unit in second.values()]
    for name, unit in first.items():
        np.testing.assert_allclose(unit["objective"], second[name]["objective"], rtol=1e-3)
    one, other = compare(source, tmp_path / "a", tmp_path / "b").candidates
    assert other.logits.kl.mean == pytest.approx(one.logits.kl.mean, rel=0.05)


def test_a_run_goes_on_within_a_layer(fitting, token_rows, tmp_path, monkeypatch):
    """A group of experts that was solved is not solved again; the bytes are those of one run."""
    source = fitting("nvfp4-full")
    monkeypatch.setattr(solving, "GROUP_BYTES", 8_000)  # a few experts in a record
    make(source, token_rows, tmp_path / "whole")
    appended, append = [], solving.SolvedFile.append

    def until(limit):
        def count(file, key, weights):
            if len(appended) >= limit:
                raise KeyboardInterrupt
            appended.append(key)
            append(file, key, weights)

        return count

    keys = []
    for limit in (2, 5, 9, 10**6):
        monkeypatch.setattr(solving.SolvedFile, "append", until(limit))
        appended.clear()
        with suppress(Interrupted):
            make(source, token_rows, tmp_path / "out", resume=limit != 2)
        keys += appended
    assert len(keys) == len(set(keys)) > 16
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_damage_between_calibration_and_packing_is_found(fitting, token_rows, tmp_path, monkeypatch):
    from nemoquant.pack import write

    source, out = fitting("nvfp4-full"), tmp_path / "out"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(write.Packer, "write", interrupt)
        make(source, token_rows, out)
    state = tmp_path / "out.partial/nemoquant_resume"
    kept = tmp_path / "kept"
    shutil.copytree(state, kept)
    for name in ("solved.0", "folds.2"):
        data = bytearray((kept / name).read_bytes())
        data[-30] ^= 1
        (state / name).write_bytes(data)
        with pytest.raises((CalibrationError, OutputError), match=rf"{name} is"):
            make(source, token_rows, out, resume=True)
        (state / name).write_bytes((kept / name).read_bytes())
    (state / "solved.0").unlink()
    with pytest.raises(CalibrationError, match=r"solved\.0 is not what the run wrote; remove"):
        make(source, token_rows, out, resume=True)
    (state / "solved.0").write_bytes((kept / "solved.0").read_bytes())
    make(source, token_rows, out, resume=True)
    assert verify(out, source)["ok"]


def test_verify_finds_codes_that_are_not_the_noted_ones(fitting, token_rows, tmp_path):
    source, out = fitting("nvfp4-full"), tmp_path / "out"
    make(source, token_rows, out)
    file = out / "nemoquant_solved.json"
    data = json.loads(file.read_text())
    name = "backbone.layers.0.mixer.in_proj.weight"
    data["units"][name]["error"][0] *= 1 + 1e-6
    data["units"][name]["objective"][0] = 2 * data["units"][name]["plain"][0]
    file.write_text(json.dumps(data))
    problems = " ".join(verify(out, source)["problems"])
    assert "its codes are" in problems and "above that of the plain method" in problems
    data["units"].pop(name)
    file.write_text(json.dumps(data))
    assert "does not have the weights of the plan" in " ".join(verify(out, source)["problems"])


def test_scales_of_an_earlier_run_are_not_enough(fitting, token_rows, tmp_path):
    source = fitting("fp8")
    make(source, token_rows, tmp_path / "max", "fp8", method="max")
    scales = tmp_path / "max/nemoquant_scales.json"
    with pytest.raises(UsageError, match=r"has the maxima of GEMM inputs alone.*--method max or mse"):
        quantize(source, tmp_path / "out", "fp8", RunOptions(scales=scales, threads=1))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    quantize(source, tmp_path / "out", "fp8", RunOptions(scales=scales, threads=1, method="max"))


def test_a_cluster_does_not_solve(fitting, token_rows, tmp_path):
    with pytest.raises(UsageError, match="--on ray does not solve for codes or folds"):
        make(fitting("fp8"), token_rows, tmp_path / "out", "fp8", on="ray")


def test_a_method_takes_the_place_of_the_recipes_own():
    def methods(**options):
        plan = api.plan(DEMO, "nvfp4", **options)
        return plan, {(row.format, row.scale_method) for row in plan.quantized}

    plan, found = methods()
    assert found == {("nvfp4", "gptq"), ("fp8", "gptq")} and plan.recipe.folds
    plan, found = methods(method="mse")
    assert found == {("nvfp4", "mse"), ("fp8", "max")}
    assert plan.recipe.name == "nvfp4-mse" and not plan.recipe.folds and not plan.needs_inputs
    plan, found = methods(method="hess", folds=[])
    assert found == {("nvfp4", "hess"), ("fp8", "max")} and plan.needs_inputs
    plan, found = methods(method="max", folds=["latent"])
    assert plan.recipe.folds == ["latent"] and plan.needs_inputs
    assert methods(descent=3)[0].recipe.solve.descent == 3
    (told,) = method_warnings(methods(method="hess")[0], Overrides("hess"))
    assert told == "--method hess: 24 FP8 weights get max, the nearest that FP8 has"
    assert (
        method_warnings(methods(method="gptq")[0], Overrides("gptq", descent=2))
        == method_warnings(plan, Overrides())
        == []
    )
    (told,) = method_warnings(methods(method="max", descent=2)[0], Overrides("max", descent=2))
    assert told == "--descent 2: has no effect, no weight gets hess or gptq"
    with pytest.raises(UsageError, match="method"):
        api.plan(DEMO, "nvfp4", method="best")
    with pytest.raises(UsageError, match="folds"):
        api.plan(DEMO, "nvfp4", folds=["rotation"])


def test_inputs_come_back_in_pieces(tmp_path, monkeypatch):
    import torch

    from nemoquant.calibrate import inputs

    monkeypatch.setattr(inputs, "PIECE_BYTES", 4 * 8 * 5)
    file = InputFile(tmp_path / "inputs", {"a", "b"})
    random = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 8, generator=random).to(torch.bfloat16) for n in (3, 0, 12)]
    other = torch.randn(4, 2, generator=random)
    observer = inputs.InputObserver(file)
    for part in parts:
        observer.observe("a", part)
        observer.observe("c", part)
    observer.observe("b", other)
    file.keep(observer.collect())
    assert file.tokens("a") == 15 and "c" not in file and file.tokens("c") == 0
    pieces = list(file.pieces("a"))
    assert max(map(len, pieces)) == 5
    np.testing.assert_array_equal(np.concatenate(pieces), torch.cat(parts).float().numpy())
    np.testing.assert_array_equal(np.concatenate(list(file.pieces("b"))), other.numpy())
    file.clear()
    assert "a" not in file and (tmp_path / "inputs").stat().st_size == 0
    file.close()


def test_an_expert_without_a_token_gets_the_plain_method(fitting, tmp_path):
    source = fitting("nvfp4-w4a16")
    rows = tmp_path / "few.npy"
    np.save(rows, np.full((1, 3), 5, np.int64))
    make(source, rows, tmp_path / "out", "nvfp4-w4a16")
    units = solved(tmp_path / "out")
    methods = {
        (tokens > 0, method)
        for unit in units.values()
        for tokens, method in zip(unit["tokens"], unit["method"], strict=True)
    }
    assert (False, "mse") in methods and (True, "gptq") in methods and (False, "gptq") not in methods
    assert verify(tmp_path / "out", source)["ok"]


def test_folds_are_repeated_by_verify(token_rows, fitting, tmp_path):
    """With a method that needs no inputs the codes of folded weights are encoded again."""
    source = fitting("nvfp4-full")
    result = make(source, token_rows, tmp_path / "out", method="max", folds=["latent", "norm"])
    assert result.calibration["folded"] > 0
    report = verify(tmp_path / "out", source)
    assert report["ok"] and report["checked"]["encoded_again"] == len(result.plan.quantized)
    from nemoquant.solve.folds.file import load, save

    folds = load(tmp_path / "out/nemoquant_folds.st")
    folds.pop(next(name for name in folds if name.endswith("fc1_latent_proj.weight")))
    (tmp_path / "out/nemoquant_folds.st").unlink()
    save(tmp_path / "out/nemoquant_folds.st", folds)
    assert "differs from the source" in " ".join(verify(tmp_path / "out", source)["problems"])


def test_the_collector_asks_only_for_inputs_that_are_used(tmp_path):
    from nemoquant.calibrate.observers import AmaxCollector
    from nemoquant.calibrate.scales import Scales
    from nemoquant.sources.source import open_weights

    with (opened := open_weights(DEMO, "")).checkpoint:
        plan = api.plan(DEMO, "nvfp4-w4a16")
        amax = AmaxCollector(plan.config, Scales())
        collector = SolveCollector(plan, opened.checkpoint, amax, tmp_path, 1, print, hidden=None, state={})
        wanted = collector._inputs.wanted
        assert len(wanted) == 4 * 16 * 2 and all(".experts." in tap for tap in wanted)
        collector.close()

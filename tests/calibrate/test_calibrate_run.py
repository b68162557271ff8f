"""Calibration's maxima against the reference model with a recording tap that is written here.

Also coverage of experts, batches, rows with NaN, and the scales file.
"""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.overflow import head_of_token_95

from nemoquant.api import RunOptions, quantize
from nemoquant.calibrate.observers import AmaxCollector, AmaxObserver
from nemoquant.calibrate.run import DEFAULT_ROW_BATCH, calibrate, settings
from nemoquant.calibrate.scales import FILE, Scales
from nemoquant.errors import CalibrationError, WeightError
from nemoquant.model.reference import ReferenceModel
from nemoquant.sources.source import open_source
from nemoquant.tokens.rows import Rows

EXPERT = re.compile(r"backbone\.layers\.(\d+)\.mixer\.experts\.(\d+)\.up_proj")


def tokens(count=8, length=32, seed=0):
    return Rows(np.random.default_rng(seed).integers(3, 96, (count, length)), "rows", 0)


def run(folder, rows, **options):
    source = open_source(folder)
    options = {"dtype": torch.float32, "row_batch": DEFAULT_ROW_BATCH, **options}
    dtype = str(options["dtype"] or torch.bfloat16).removeprefix("torch.")
    amax = AmaxCollector(source.config, Scales(settings(rows, "cpu", dtype, options["row_batch"])))
    with source.checkpoint:
        dead = calibrate(source.checkpoint, source.config, rows, [amax], **options)
    amax.scales.non_finite_rows = len(dead)
    return amax.scales


def record(folder, rows):
    """Records all rows at once: name -> amax, and name -> tokens.

    ReferenceModel runs over weights that the safetensors library read.
    """
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    source = open_source(folder)
    amax, seen = {}, {}

    def tap(name, x):
        amax[name] = max(amax.get(name, 0.0), float(x.abs().max()))
        seen[name] = seen.get(name, 0) + x.shape[0]
        return x

    def weights(prefix):
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    ReferenceModel(source.config, weights).forward(torch.from_numpy(rows.ids), tap=tap)
    return amax, seen


@pytest.fixture(autouse=True)
def two_threads_at_most():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_maxima_are_those_of_the_reference_model(make_checkpoint):
    source = make_checkpoint("balanced", balanced)
    scales = run(source, tokens())
    amax, seen = record(source, tokens())
    kv = {name.removesuffix(".output"): value for name, value in amax.items() if name.endswith(".output")}
    inputs = {name: value for name, value in amax.items() if not name.endswith((".output", ".gate"))}
    assert len(kv) == 2
    assert {
        "backbone.layers.0.mixer.in_proj",
        "backbone.layers.2.mixer.experts.0.down_proj",
        "lm_head",
    } <= inputs.keys()
    # the batches differ, so sums are taken in another order: fp32 rounding
    assert scales.input_amax == pytest.approx(inputs, rel=1e-6)
    assert scales.kv_amax == pytest.approx(kv, rel=1e-6)
    counts = {layer: [0] * 8 for layer in (2, 5)}
    for name, count in seen.items():
        if expert := EXPERT.fullmatch(name):
            counts[int(expert[1])][int(expert[2])] = count
    assert scales.tokens_per_expert == counts
    assert all(sum(row) == 8 * 32 * 2 for row in scales.tokens_per_expert.values()), "rows x length x top 2"
    assert all(min(row) > 0 for row in scales.tokens_per_expert.values())
    assert scales.non_finite_rows == 0


def test_values_are_float32(source):
    scales = run(source, tokens(2))
    assert all(float(np.float32(v)) == v for v in (scales.input_amax | scales.kv_amax).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_batch(dtype, source):
    one, four = (
        run(source, tokens(), dtype=dtype, row_batch=1),
        run(source, tokens(), dtype=dtype, row_batch=4),
    )
    if dtype == torch.float32:  # docs/design.md, "Reproducible": within 1e-5
        assert one.input_amax == pytest.approx(four.input_amax, rel=1e-5)
        assert one.kv_amax == pytest.approx(four.kv_amax, rel=1e-5)
        assert one.tokens_per_expert == four.tokens_per_expert
    assert (one.settings["row_batch"], four.settings["row_batch"]) == (1, 4)
    assert one.input_amax.keys() == four.input_amax.keys()


def test_the_same_settings_give_the_same_bytes(source):
    assert run(source, tokens()).dump() == run(source, tokens()).dump()


def test_bfloat16_is_near_float32(source):
    """A maximum of values that are rounded to 8 bits in each of some 20 operations.

    5% is far above that error, and far below the effect of a missed layer.
    """
    a, b = run(source, tokens(), dtype=torch.bfloat16), run(source, tokens())
    shared = [n for n in b.input_amax if ".experts." not in n]  # rounding sends some tokens to other experts
    assert {n: a.input_amax[n] for n in shared} == pytest.approx(
        {n: b.input_amax[n] for n in shared}, rel=0.05
    )


# Coverage of experts.


def balanced(tensors):
    for layer in (2, 5):
        tensors[f"backbone.layers.{layer}.mixer.gate.e_score_correction_bias"].zero_()


def without_expert(tensors, layer=2, expert=5):
    """Changes the router's bias so that one expert is never chosen.

    Sigmoid scores are in (0, 1): a bias of -10 keeps an expert out of every top 2, and 0 lets all others in.
    """
    balanced(tensors)
    tensors[f"backbone.layers.{layer}.mixer.gate.e_score_correction_bias"][expert] = -10.0


def test_an_expert_that_no_token_reached(make_checkpoint, token_rows, tmp_path):
    source = make_checkpoint("unreached", without_expert)
    scales = run(source, tokens())
    assert scales.tokens_per_expert[2][5] == 0
    assert sum(scales.tokens_per_expert[2]) == 8 * 32 * 2
    assert not any("layers.2.mixer.experts.5." in name for name in scales.input_amax)

    def result(name, **options):
        given = RunOptions(method="max", data=token_rows, dtype="float32", threads=1, **options)
        made = quantize(source, tmp_path / name, "nvfp4", given)
        tensors = load_file(made.out / "model-00001-of-00001.safetensors")
        inputs = {
            p: [tensors[f"backbone.layers.2.mixer.experts.{e}.{p}_proj.input_scale"].item() for e in range(8)]
            for p in ("up", "down")
        }
        return made.warnings, inputs

    told = [
        "1 of 16 experts got no calibration token (layer 2 expert 5); each has the largest input scale of "
        "its layer and projection, "
        "give more rows to see them"
    ]
    warnings, inputs = result("grouped")
    assert warnings == told
    assert all(len(set(values)) == 1 for values in inputs.values())
    warnings, apart = result("apart", scale_groups=False)
    assert warnings == told
    for p in ("up", "down"):
        assert apart[p][5] == inputs[p][5] == max(apart[p])
        assert len(set(apart[p])) > 2


def test_experts_of_a_whole_layer_that_no_token_reached(source, tmp_path):
    """A router cannot cause this, but a scales file can say it."""
    scales = run(source, tokens())
    for name in [
        n
        for n in scales.input_amax
        if n.startswith("backbone.layers.2.mixer.experts.") and n.endswith("up_proj")
    ]:
        del scales.input_amax[name]
    (tmp_path / FILE).write_text(scales.dump())
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(
        CalibrationError,
        match=r"backbone\.layers\.2\.mixer\.experts\.up_proj: no calibration token reached it, .*calibrate "
        r"with more rows",
    ):
        quantize(source, tmp_path / "out", "nvfp4", RunOptions(method="max", scales=tmp_path / FILE))
    assert sorted(p.name for p in tmp_path.iterdir()) == before


# Rows with NaN.


def poisoned(tensors):
    """Embeds token 95 as NaN: a row that has it is lost, the other rows are unaffected."""
    tensors["backbone.embeddings.weight"][95] = torch.nan


def with_token_95(rows, count=20):
    ids = np.random.default_rng(1).integers(3, 95, (count, 16))
    for row in rows:
        ids[row, 7] = 95
    return Rows(ids, "rows", 0)


@pytest.mark.parametrize("row_batch", [1, 4, 20])
@pytest.mark.parametrize("bad", [[3], [0, 19], [4, 5]])
def test_rows_with_nan_are_counted_and_left_out(bad, row_batch, make_checkpoint):
    source = make_checkpoint("poisoned", poisoned)
    with_them = run(source, with_token_95(bad), row_batch=row_batch)
    clean = Rows(np.delete(with_token_95(bad).ids, bad, 0), "rows", 0)
    without = run(source, clean, row_batch=row_batch)
    assert with_them.non_finite_rows == len(bad)
    assert with_them.input_amax == pytest.approx(without.input_amax, rel=1e-5)  # other rows share a batch
    assert with_them.kv_amax == pytest.approx(without.kv_amax, rel=1e-5)
    assert with_them.tokens_per_expert == without.tokens_per_expert


def test_too_many_rows_with_nan(make_checkpoint):
    with pytest.raises(
        CalibrationError,
        match=r"layer 3 \(mlp\): NaN or Inf in 4 of 20 rows \(0, 1, 2, 3\), more than 10%, first in the "
        r"input of backbone\.layers\.3\.mixer\.down_proj; .* is the source damaged\?",
    ):
        run(make_checkpoint("huge", huge), with_token_95([]))  # stopped after the first four
    with pytest.raises(CalibrationError, match=r"first in the layer's output; .* try --compute float32"):
        run(make_checkpoint("last", last_product), with_token_95([]), dtype=torch.bfloat16)


def last_product(tensors):
    """Finite weights and inputs, a layer whose last product overflows."""
    tensors["backbone.layers.3.mixer.down_proj.weight"].mul_(1e20)
    tensors["backbone.layers.3.mixer.up_proj.weight"].mul_(1e10)


def test_the_input_of_the_head_is_finite_too(make_checkpoint):
    """The final norm's weight is finite, its product is not."""
    source = make_checkpoint("head", head_of_token_95)
    found = run(source, with_token_95([0, 7]))
    clean = run(source, Rows(np.delete(with_token_95([0, 7]).ids, [0, 7], 0), "rows", 0))
    assert (found.non_finite_rows, clean.non_finite_rows) == (2, 0)
    assert found.input_amax["lm_head"] == clean.input_amax["lm_head"]
    with pytest.raises(
        CalibrationError,
        match=r"head: NaN or Inf in 3 of 20 rows \(0, 1, 2\), more than 10%, first in the input of lm_head;",
    ):
        run(source, with_token_95([0, 1, 2]))


def huge(tensors):
    """Finite weights whose product is not: relu(up(x))^2 overflows."""
    tensors["backbone.layers.3.mixer.up_proj.weight"].mul_(1e25)


def test_the_limit_is_a_tenth(make_checkpoint):
    source = make_checkpoint("poisoned", poisoned)
    assert run(source, with_token_95([0, 1])).non_finite_rows == 2
    with pytest.raises(WeightError, match=r"backbone\.embeddings\.weight has NaN or Inf"):
        run(source, with_token_95([0, 1, 2]))


# The scales file.


def test_scales_file_round_trip_is_exact(source, tmp_path):
    scales = run(source, tokens())
    scales.warnings = ["told"]
    path = tmp_path / FILE
    path.write_text(scales.dump())
    again = Scales.load(path)
    assert again == scales
    assert again.dump() == scales.dump()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=1), r"schema 1, expected 3; calibrate again"),
        (lambda d: d.update(schema=2), r"schema 2, expected 3; calibrate again"),
        (lambda d: d.pop("schema"), r"`schema`: field required"),
        (lambda d: d.update(schema="3"), r"`schema` is '3': input should be a valid integer"),
        (lambda d: d.update(schema=10**400), r"schema 1000\d+\.\.\.0+, expected 3"),
        (lambda d: d.pop("kv_amax"), r"`kv_amax`: field required"),
        (lambda d: d.pop("folded_amax"), r"`folded_amax`: field required"),
        (lambda d: d["folded_amax"].update(x=-1), r"`folded_amax.x` is -1: input should be"),
        (lambda d: d.update(input_amax=[1]), r"`input_amax` is \[1\]: input should be a valid dictionary"),
        (
            lambda d: d["input_amax"].update(lm_head="much"),
            r"`input_amax.lm_head` is 'much': input should be",
        ),
        (lambda d: d["input_amax"].update(lm_head=None), r"`input_amax.lm_head` is None: input should be"),
        (lambda d: d["input_amax"].update(lm_head=True), r"`input_amax.lm_head` is True: input should be"),
        (
            lambda d: d["input_amax"].update(lm_head=10**400),
            r"`input_amax.lm_head` is 1000.* and 1 more|is 1000",
        ),
        (
            lambda d: d["input_amax"].update(lm_head=float("nan")),
            r"`input_amax.lm_head` is nan: input should",
        ),
        (
            lambda d: d["input_amax"].update(lm_head=float("inf")),
            r"`input_amax.lm_head` is inf: input should",
        ),
        (lambda d: d["input_amax"].update(lm_head=3.5e38), r"`input_amax.lm_head` is 3.5e\+38: input should"),
        (lambda d: d["input_amax"].update(lm_head=-1.0), r"`input_amax.lm_head` is -1.0: input should be"),
        (lambda d: d["kv_amax"].update(x=-1), r"`kv_amax.x` is -1: input should be"),
        (lambda d: d.pop("settings"), r"`settings`: field required"),
        (lambda d: d.update(settings={}), r"`settings.rows`: field required, and 7 more"),
        (
            lambda d: d["settings"].update(rows="8"),
            r"`settings.rows` is '8': input should be a valid integer",
        ),
        (lambda d: d["settings"].update(rows=float("inf")), r"`settings.rows` is inf: "),
        (
            lambda d: d["settings"].update(data=None),
            r"`settings.data` is None: input should be a valid string",
        ),
        (lambda d: d["settings"].update(more=[[]]), r"`settings.more` is \[\[\]\]: extra inputs"),
        (lambda d: d["settings"].update(row_batch={"moe": 0}), r"`settings.row_batch.*` is "),
        (lambda d: d.update(warnings="x"), r"`warnings` is 'x': input should be a valid list"),
        (lambda d: d.update(warnings=["x" * 10_001]), r"`warnings.0` is 'xxx.*: string should have at most"),
        (lambda d: d.update(non_finite_rows=-1), r"`non_finite_rows` is -1: input should be greater"),
        (
            lambda d: d.update(tokens_per_expert={"x": [1]}),
            r"`tokens_per_expert.x` is 'x': string should match",
        ),
        (lambda d: d.update(tokens_per_expert={"\u00b2": [1]}), r"`tokens_per_expert.\u00b2` is "),
        (lambda d: d.update(tokens_per_expert={"2": [1.5]}), r"`tokens_per_expert.2.0` is 1.5: "),
        (lambda d: d.update(units=None), r"`units` is None: input should be a valid dictionary"),
        (lambda d: d.update(units={"a": "x"}), r"`units.a` is 'x': string should match"),
        (lambda d: d.update(more=1), r"`more` is 1: extra inputs are not permitted"),
        (lambda d: d.update({"n" * 100_000: 1}), r"`n{80}` is 1: extra inputs are not permitted"),
    ],
)
def test_damaged_scales_files(change, message, source, tmp_path):
    path = tmp_path / FILE
    data = json.loads(run(source, tokens(1)).dump())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(CalibrationError, match=message) as error:
        Scales.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '"x"', "[" * 100_000, '{"schema": 3, "schema": 3}', '{"a": "\\ud800"}', "\xff"],
)
def test_files_that_are_no_scales_files(text, tmp_path):
    path = tmp_path / FILE
    path.write_text(text, encoding="latin-1")
    with pytest.raises(CalibrationError, match="is not a scales file"):
        Scales.load(path)


# The observer alone.


def test_observer():
    observer = AmaxObserver()
    tap = observer.observe
    x = torch.tensor([[1.0, -3.0], [2.0, 0.5]])
    assert tap("m.in_proj", x) is x
    tap("m.in_proj", -0.5 * x)
    tap("l.mixer.experts.11.up_proj", x)
    tap("l.mixer.experts.11.up_proj", x[:1])
    tap("l.mixer.experts.11.down_proj", torch.zeros(3, 2))
    tap("bf16", torch.tensor([[-7.0]], dtype=torch.bfloat16))
    amax = {
        "m.in_proj": 3.0,
        "l.mixer.experts.11.up_proj": 3.0,
        "l.mixer.experts.11.down_proj": 0.0,
        "bf16": 7.0,
    }
    assert observer.collect() == (amax, {11: 3})
    assert AmaxObserver().collect() == ({}, {})

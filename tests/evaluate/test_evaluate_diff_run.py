"""Whole diffs: no error in the source itself, damage shown where it was done, and consistent figures."""

import json
import math

import numpy as np
import pytest
import torch
from support import modelopt_run
from support.files import leaves, parse_strictly
from support.pack_oracle import PRESETS, UNCALIBRATED
from support.places import DEMO
from support.synthetic import synthetic_checkpoint, write_rows
from support.tampering import overwrite, sign

import nemoquant
from nemoquant.checkpoint.header import read_header
from nemoquant.evaluate.modules import EFFECT_ROWS
from nemoquant.evaluate.schema import Report
from nemoquant.model.parse import load_config
from nemoquant.model.roles import tensor_table

ROWS, LENGTH, CHOSEN = 8, 32, 2  # rows and length of token_rows; experts that a token takes
LAYER = "backbone.layers.{}.mixer."
IN_PROJ, O_PROJ, K_PROJ = (
    LAYER.format(i) + name for i, name in ((0, "in_proj"), (1, "o_proj"), (1, "k_proj"))
)


def strict(report):
    """The JSON, read by a parser that refuses NaN and Infinity."""
    return parse_strictly(report.dump())


def layer(candidate, name):
    return next(found for found in candidate.layers if found.name == name)


def module(candidate, name):
    return next(found for found in candidate.modules if found.name == name)


def mtp_tensors(source):
    """How many tensors of multi-token prediction a checkpoint has."""
    return sum(spec.role.startswith("mtp.") for spec in tensor_table(load_config(source)[0]))


def figures(candidate):
    """All numbers and texts of a candidate except its name."""
    return candidate.model_dump(exclude={"name"})


# The source itself.


def test_the_source_is_no_different_from_itself(source, compare):
    report = compare(source, source)
    (found,) = strict(report)["candidates"]
    assert found["logits"]["kl"] == {"mean": 0, "median": 0, "p99": 0, "max": 0}
    assert (found["logits"]["top1_agreement"], found["logits"]["top5_agreement"]) == (1, 1)
    assert found["logits"]["perplexity"] == report.reference.perplexity > 1
    assert found["logits"]["perplexity_ratio"] == 1
    assert found["mtp_acceptance"] == report.reference.mtp_acceptance
    assert [entry["name"] for entry in found["layers"]] == ["embedding", "0", "1", "2", "3", "4", "5", "head"]
    for entry in found["layers"]:
        assert entry["stream"] == entry["alone"] == {"relative": 0, "sqnr_db": None}
        assert (entry["routing"] is not None) == (entry["kind"] == "moe")
        assert (entry["ssm_state"] is not None) == (entry["kind"] == "mamba")
        assert entry["ssm_state"] in (None, {"relative": 0, "sqnr_db": None})
        if entry["routing"]:
            assert (entry["routing"]["flipped"], entry["routing"]["tokens_with_flip"]) == (0, 0)
    assert (found["modules"], found["worst_modules"], found["warnings"]) == ([], [], [])
    assert (found["bytes"], found["compression"], found["recipe"]) == (report.reference.bytes, 1, None)
    assert (list(found["formats"]), found["bits_per_quantized_weight"], found["kv_cache"]) == (
        ["source"],
        None,
        "source",
    )
    assert report.warnings == []


# One tensor of the source changed. Doubled, its error is as large as the tensor itself: 0 dB.

PERTURBED = {  # tensor -> module and layer that the diff must name
    "backbone.embeddings.weight": ("backbone.embeddings", "embedding"),
    LAYER.format(0) + "in_proj.weight": (IN_PROJ, "0"),
    LAYER.format(0) + "conv1d.weight": (LAYER.format(0) + "conv1d", "0"),
    LAYER.format(0) + "conv1d.bias": (LAYER.format(0) + "conv1d.bias", "0"),
    LAYER.format(0) + "A_log": (LAYER.format(0) + "A_log", "0"),
    LAYER.format(4) + "norm.weight": (LAYER.format(4) + "norm", "4"),
    LAYER.format(1) + "o_proj.weight": (O_PROJ, "1"),
    "backbone.layers.1.norm.weight": ("backbone.layers.1.norm", "1"),
    LAYER.format(2) + "gate.weight": (LAYER.format(2) + "gate", "2"),
    LAYER.format(2) + "fc1_latent_proj.weight": (LAYER.format(2) + "fc1_latent_proj", "2"),
    LAYER.format(2) + "shared_experts.up_proj.weight": (LAYER.format(2) + "shared_experts.up_proj", "2"),
    LAYER.format(5) + "experts.6.down_proj.weight": (LAYER.format(5) + "experts.down_proj", "5"),
    LAYER.format(3) + "up_proj.weight": (LAYER.format(3) + "up_proj", "3"),
    "backbone.norm_f.weight": ("backbone.norm_f", "head"),
    "lm_head.weight": ("lm_head", "head"),
}


@pytest.mark.parametrize("name", PERTURBED)
def test_a_changed_tensor_is_found(name, source, make_checkpoint, compare):
    expected, place = PERTURBED[name]
    signal = {}

    def double(tensors):
        group = {
            name.replace(".experts.6.", f".experts.{e}.") for e in range(8)
        }  # all experts, or the one tensor
        signal["module"], signal["tensor"] = (
            sum(tensors[n].double().square().sum() for n in some) for some in (group, [name])
        )
        tensors[name] = tensors[name] * 2

    report = compare(source, make_checkpoint("other", double))
    (found,) = report.candidates
    strict(report)
    assert [m.name for m in found.modules] == found.worst_modules == [expected]
    (only,) = found.modules
    assert (only.format, only.input_format, only.input) == ("changed", None, None)
    assert only.effect > 0
    assert only.weight.sqnr_db == pytest.approx(
        10 * math.log10(signal["module"] / signal["tensor"]), abs=1e-9
    )  # sums in float64
    names = [entry.name for entry in found.layers]
    at = names.index(place)
    exact = {entry.name for entry in found.layers if entry.stream.relative == 0}
    assert exact == set(names[:at]), "upstream nothing differs, from there on everything"
    alone = {entry.name for entry in found.layers if entry.alone.relative > 0}
    assert alone == {place}, "the other layers do what the source's do"
    assert found.logits.kl.mean > 0
    assert found.warnings == [f"1 tensors are not quantized and yet differ from the source's: {expected}"]


def test_the_changed_expert_is_named(source, make_checkpoint, compare):
    name = LAYER.format(5) + "experts.6.down_proj.weight"
    (found,) = compare(source, make_checkpoint("other", lambda t: t[name].mul_(2))).candidates
    experts = module(found, LAYER.format(5) + "experts.down_proj").experts
    assert experts.worst_expert == 6
    assert [e for e, db in enumerate(experts.weight_sqnr_db) if db is not None] == [6]
    assert experts.weight_sqnr_db[6] == pytest.approx(0, abs=1e-9)
    assert experts.input_sqnr_db == experts.input_saturated == [None] * 8


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gate.weight", lambda t: t.neg_()),
        ("gate.e_score_correction_bias", lambda t: t[:1].fill_(9)),
    ],
)
def test_a_changed_router_flips_choices(name, change, source, make_checkpoint, compare):
    (found,) = compare(
        source, make_checkpoint("other", lambda t: change(t[LAYER.format(2) + name]))
    ).candidates
    assert [m.name for m in found.modules] == [LAYER.format(2) + name.removesuffix(".weight")]
    routing = layer(found, "2").routing
    assert routing.flipped > 0.3
    assert routing.tokens_with_flip >= routing.flipped
    assert (
        sum(routing.tokens_per_expert) == sum(routing.tokens_per_expert_reference) == ROWS * LENGTH * CHOSEN
    )
    assert routing.tokens_per_expert != routing.tokens_per_expert_reference
    if "bias" in name:
        assert routing.tokens_per_expert[0] == ROWS * LENGTH, "the expert that everyone chooses"


def test_the_effect_is_what_reaches_the_stream(source, make_checkpoint, compare, tmp_path):
    """One module is changed, and effects are measured on all rows: effect and stream are then one number."""
    data = tmp_path / "few.npy"
    np.save(data, np.random.default_rng(1).integers(3, 96, (EFFECT_ROWS, LENGTH)))
    for name, place in ((IN_PROJ, "0"), (LAYER.format(2) + "experts.3.up_proj", "2"), ("lm_head", "head")):
        other = make_checkpoint(f"other-{place}", lambda t, name=name: t[f"{name}.weight"].mul_(1.25))
        (found,) = compare(source, other, data=data).candidates
        assert found.modules[0].effect == pytest.approx(
            layer(found, place).stream.relative, rel=1e-6
        )  # float32 sums, in two shapes


# One part of a quantized checkpoint damaged in the file.


def flipped(mask):
    """Inverts the signs of all codes: an error of twice the tensor."""
    return lambda data: bytes(byte ^ mask for byte in data)


def scaled(factor):
    """Multiplies a scale by a factor."""
    return lambda data: (np.frombuffer(data, np.float32) * np.float32(factor)).tobytes()


DAMAGE = {  # what -> preset, tensor, change, the module that must be the worst
    "FP8 codes": ("nvfp4", f"{IN_PROJ}.weight", flipped(0x80), IN_PROJ),
    "FP8 codes of o_proj": ("fp8", f"{O_PROJ}.weight", flipped(0x80), O_PROJ),
    "NVFP4 codes": ("nvfp4-full", f"{IN_PROJ}.weight", flipped(0x88), IN_PROJ),
    "NVFP4 codes of one expert": (
        "nvfp4",
        LAYER.format(5) + "experts.6.down_proj.weight",
        flipped(0x88),
        LAYER.format(5) + "experts.down_proj",
    ),
    "NVFP4 block scales": ("nvfp4-full", f"{IN_PROJ}.weight_scale", lambda data: bytes(len(data)), IN_PROJ),
    "weight scale": ("nvfp4", f"{IN_PROJ}.weight_scale", scaled(4), IN_PROJ),
    "input scale": ("nvfp4", f"{IN_PROJ}.input_scale", scaled(1 / 64), IN_PROJ),
    "KV cache scale": ("nvfp4", f"{K_PROJ}.k_scale", scaled(1 / 256), LAYER.format(1) + "kv_cache"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_the_worst_module_by_far(what, source, quantized, compare):
    preset, name, change, expected = DAMAGE[what]
    out = quantized(preset)
    sound = compare(source, out).candidates[0]
    overwrite(out, name, change)
    sign(out)  # else it is refused
    (found,) = compare(source, out).candidates
    assert [m.name for m in found.modules] == [m.name for m in sound.modules]
    assert found.worst_modules[0] == expected
    effects = sorted((m.effect for m in found.modules), reverse=True)
    assert effects[0] > 2 * effects[1]
    assert found.logits.kl.mean > sound.logits.kl.mean
    worst, before = module(found, expected), module(sound, expected)
    for one, other in zip(found.modules, sound.modules, strict=True):
        if one.layer != worst.layer:
            assert one == other, "other layers are measured as before"
        elif one.name != expected:
            assert (one.weight, one.effect) == (
                other.weight,
                other.effect,
            )  # its input may come from the damaged module
    if what == "input scale":
        assert worst.weight == before.weight
        assert worst.input.saturated > 0.5 > before.input.saturated
    elif what == "KV cache scale":
        assert worst.weight is None
        assert worst.input.saturated > 0.3 > before.input.saturated
    else:
        assert worst.weight.sqnr_db < before.weight.sqnr_db - 6
    if worst.experts:
        assert worst.experts.worst_expert == 6
        assert worst.experts.weight_sqnr_db[6] == pytest.approx(-6, abs=0.1)  # twice the value: -6.02 dB
    if what == "NVFP4 block scales":
        assert worst.weight.flushed > 0.99


# Formats, KV cache, inputs.


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_preset_rounds_is_what_is_measured(preset, fitting, quantized, compare):
    source = fitting(preset)
    made = nemoquant.plan(source, preset, method="max")
    (found,) = compare(source, quantized(preset)).candidates
    rows = {}  # module -> formats of weight and input
    for row in made.rows:
        if row.format != "source":
            name = (
                row.module
                if row.expert is None
                else row.module.replace(f".experts.{row.expert}.", ".experts.")
            )
            rows[name] = (row.format, row.activation_format)
    cache = LAYER.format(1) + "kv_cache"
    if made.kv_layers:
        rows[cache] = ("source", "fp8")
    assert {m.name: (m.format, m.input_format) for m in found.modules} == rows
    assert all((m.input is None) == (m.input_format is None) for m in found.modules)
    assert all(m.effect > 0 for m in found.modules)
    assert (cache in rows) == (found.kv_cache == "fp8") == (preset not in UNCALIBRATED)
    if cache in rows:
        kv = module(found, cache)
        assert (kv.role, kv.layer, kv.weight, kv.elements, kv.bytes) == ("kv_cache", 1, None, 0, 8)
        assert 20 < kv.input.sqnr_db < 45, "E4M3 has three bits of mantissa: about 32 dB"
    assert found.recipe == made.recipe.name


@pytest.mark.parametrize("preset", ["source", *PRESETS])
def test_figures_add_up(preset, fitting, quantized, compare):
    source = fitting(preset)
    out = source if preset == "source" else quantized(preset)
    report = compare(source, out)
    (found,) = report.candidates
    strict(report)
    table = tensor_table(load_config(source)[0])
    elements = sum(math.prod(s.shape) for s in table)
    main = sum(math.prod(s.shape) for s in table if not s.role.startswith("mtp."))
    by_format = {}
    for entry in found.layers:
        for name, count in entry.elements_by_format.items():
            by_format[name] = by_format.get(name, 0) + count
    assert sum(by_format.values()) == main
    size = sum(info.nbytes for file in out.glob("*.safetensors") for info in read_header(file)[0].values())
    assert found.bytes == size
    assert found.bits_per_weight == 8 * size / elements
    assert found.compression == report.reference.bytes / size
    assert report.reference.parameters == elements
    assert (report.reference.pattern, report.reference.bytes) == (
        "M*E-ME",
        compare(source, source).candidates[0].bytes,
    )
    if preset != "source":
        made = nemoquant.plan(source, preset)
        assert found.bits_per_weight == made.bits_per_weight
        assert found.bits_per_quantized_weight == pytest.approx(made.bits_per_quantized_weight, rel=1e-12)
        for name in set(by_format) - {"source"}:
            assert by_format[name] == sum(m.elements for m in found.modules if m.format == name)
            assert by_format[name] == sum(math.prod(row.shape) for row in made.rows if row.format == name)
    positions = ROWS * (LENGTH - 1)
    assert (report.data.rows, report.data.seq_len, report.data.predicted_positions) == (
        ROWS,
        LENGTH,
        positions,
    )
    histogram = found.logits.kl_histogram
    assert len(histogram.edges) == len(histogram.counts) + 1
    assert sum(histogram.counts) == positions
    ranges = [(r.first, r.last) for r in found.logits.kl_by_position]
    assert ranges == [(i, i) for i in range(LENGTH - 1)]
    assert np.mean([r.kl for r in found.logits.kl_by_position]) == pytest.approx(
        found.logits.kl.mean, rel=1e-12
    )
    for entry in found.layers:
        if entry.routing:
            assert sum(entry.routing.tokens_per_expert) == ROWS * LENGTH * CHOSEN
            assert sum(entry.routing.tokens_per_expert_reference) == ROWS * LENGTH * CHOSEN


# Several candidates, threads.


def test_candidates_do_not_touch_each_other(source, quantized, compare):
    one, other = quantized("fp8"), quantized("nvfp4-w4a16")
    both, turned = compare(source, one, other), compare(source, other, one)
    alone = [compare(source, out) for out in (one, other)]
    assert [c.name for c in both.candidates] == ["fp8", "nvfp4-w4a16"]
    assert both.candidates == [report.candidates[0] for report in alone]
    assert both.candidates == turned.candidates[::-1]
    assert both.reference == turned.reference == alone[0].reference == alone[1].reference


def test_two_folders_of_one_name_are_told_apart(source, quantized, compare, tmp_path):
    (tmp_path / "deeper").mkdir()
    one, other = quantized("fp8", name="out"), quantized("fp8", name="deeper/out")
    report = compare(source, one, other)
    assert [c.name for c in report.candidates] == [str(one), str(other)]
    assert figures(report.candidates[0]) == figures(report.candidates[1])


def numbers(value):
    """Every float of a JSON value, by its path."""
    return {path: leaf for path, leaf in leaves(value).items() if isinstance(leaf, float)}


def test_threads_change_nothing_that_matters(source, quantized, compare):
    out = quantized("nvfp4")
    one, two = (compare(source, out, threads=threads) for threads in (1, 2))
    assert (one.threads, two.threads) == (1, 2)
    a, b = numbers(strict(one)), numbers(strict(two))
    assert a.keys() == b.keys()
    assert len(a) > 300
    far = {
        place: (a[place], b[place]) for place in a if abs(a[place] - b[place]) > 1e-6 * max(1, abs(a[place]))
    }
    assert far == {}, "at most the order of sums differs"


def test_the_same_run_gives_the_same_report(source, quantized, compare):
    out = quantized("nvfp4")
    assert compare(source, out).dump() == compare(source, out).dump()


# Other models.


def test_rows_of_two_tokens(source, quantized, compare, tmp_path):
    data = tmp_path / "ids.jsonl"
    data.write_text(json.dumps({"input_ids": list(range(3, 60))}) + "\n")
    report = compare(source, quantized("nvfp4"), data=data, rows=5, seq_len=2)
    (found,) = report.candidates
    strict(report)
    assert (report.data.rows, report.data.seq_len, report.data.predicted_positions) == (5, 2, 5)
    assert [(r.first, r.last) for r in found.logits.kl_by_position] == [(0, 0)]
    assert found.logits.kl.mean > 0
    assert found.mtp_acceptance is not None


OTHERS = {
    "tied embeddings": {"tie_word_embeddings": True},
    "no MTP": {"num_nextn_predict_layers": 0},
    "no word of MTP": {"num_nextn_predict_layers": None, "mtp_hybrid_override_pattern": None},
    "no MoE": {"hybrid_override_pattern": "M*-M", "num_nextn_predict_layers": 0},
    "no Mamba-2": {"hybrid_override_pattern": "*E-"},
    "no attention": {"hybrid_override_pattern": "ME", "num_nextn_predict_layers": 0},
    "one MLP": {"hybrid_override_pattern": "-", "num_nextn_predict_layers": 0},
    "no latent": {"moe_latent_size": None},
    "no shared experts": {"n_shared_experts": 0},
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_models(what, make_checkpoint, quantized, compare):
    source = make_checkpoint("other", **OTHERS[what])
    report = compare(source, source, quantized("fp8", of=source))
    strict(report)
    same, found = report.candidates
    assert (same.logits.kl.max, same.modules, same.warnings) == (0, [], [])
    assert found.logits.kl.mean > 0
    assert found.modules and found.warnings == []
    has_mtp = "MTP" not in what and OTHERS[what].get("num_nextn_predict_layers", 1)
    assert all(
        (value is not None) == bool(has_mtp)
        for value in (report.reference.mtp_acceptance, found.mtp_acceptance)
    )
    kinds = {entry.kind for entry in found.layers}
    assert ("moe" in kinds, "mamba" in kinds, "attention" in kinds) == tuple(
        letter in report.reference.pattern for letter in "EM*"
    )
    assert (found.kv_cache == "fp8") == ("attention" in kinds)


def test_a_changed_embedding_that_is_the_head_too(make_checkpoint, compare):
    """With a tied head the embedding is listed once, and the head's own error is shown."""
    source = make_checkpoint("tied", tie_word_embeddings=True)
    name = "backbone.embeddings.weight"
    other = make_checkpoint("other", lambda t: t.update({name: t[name] * 2}), tie_word_embeddings=True)
    (found,) = compare(source, other).candidates
    assert [m.name for m in found.modules] == ["backbone.embeddings"]
    assert layer(found, "embedding").stream.relative == pytest.approx(1)
    assert layer(found, "head").alone.relative == pytest.approx(1), "doubled logits, on the source's stream"


def test_mtp_weights_may_be_missing(source, quantized, changed, compare):
    def drop(tensors):
        for name in [n for n in tensors if n.startswith("mtp.")]:
            del tensors[name]

    out = quantized("fp8")
    whole, (found,) = (
        compare(source, out).candidates[0],
        compare(source, changed(out, drop, "fp8-no-mtp")).candidates,
    )
    assert found.warnings == [
        f"it lacks {mtp_tensors(source)} multi-token-prediction tensors: no acceptance is measured"
    ]
    assert found.mtp_acceptance is None
    assert found.logits == whole.logits
    assert found.modules == whole.modules
    assert found.bytes < whole.bytes
    foreign = changed(
        out, drop, "foreign", num_nextn_predict_layers=0
    )  # the config may contain that, as other tools write it
    (other,) = compare(source, foreign).candidates
    assert figures(other) | {"warnings": []} == figures(found) | {"recipe": None, "warnings": []}
    assert ["multi-token-prediction" in warning for warning in other.warnings] == [True]


def test_mtp_weights_that_the_source_lacks(make_checkpoint, compare):
    """Without the source's MTP weights only the main model is compared, and no acceptance is given."""
    source = make_checkpoint("without", num_nextn_predict_layers=0)
    report = compare(source, make_checkpoint("with"))
    (found,) = report.candidates
    assert (found.logits.kl.max, found.modules) == (0, [])
    assert (report.reference.mtp_acceptance, found.mtp_acceptance) == (None, None)
    assert found.bytes > report.reference.bytes


# The trained model: a better preset must have better figures.


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Report:
    """All presets of the demo model next to each other; calibrated once."""
    folder, scales = tmp_path_factory.mktemp("trained"), None
    for preset in PRESETS:
        given = scales if nemoquant.plan(DEMO, preset, method="max").needs_calibration else None
        options = nemoquant.RunOptions(
            method="max", rows=4, seq_len=256, dtype="float32", scales=given, threads=1
        )
        out = nemoquant.quantize(DEMO, folder / preset, preset, options).out
        scales = scales or out / "nemoquant_scales.json"
    return nemoquant.diff(
        DEMO, [folder / preset for preset in PRESETS], rows=6, seq_len=256, threads=1, card=False
    )


@pytest.mark.slow
def test_the_order_of_presets(trained):
    found = {c.name: c for c in trained.candidates}
    kl = {name: c.logits.kl.mean for name, c in found.items()}
    assert 0 < kl["fp8"] < kl["nvfp4"] < kl["nvfp4-full"]
    assert kl["nvfp4"] > 1.5 * kl["fp8"] and kl["nvfp4-full"] > 1.5 * kl["nvfp4"], kl
    assert 0 < kl["nvfp4-w4a16"] < kl["nvfp4"]  # its inputs, attention and Mamba-2 are not rounded
    top1 = {name: c.logits.top1_agreement for name, c in found.items()}
    assert 1 > top1["fp8"] > top1["nvfp4"] > top1["nvfp4-full"] > 0.5, top1
    weights = {name: {m.name: m.weight for m in c.modules if m.weight} for name, c in found.items()}
    published = {name: w for name, w in weights["fp8"].items() if name in weights["fp8-published"]}
    assert published == weights["fp8-published"], "what both quantize is the same"
    assert all(24 < w.sqnr_db < 40 for w in weights["fp8"].values())
    assert all(14 < w.sqnr_db < 24 for w in weights["nvfp4-full"].values())
    strict(trained)


@pytest.mark.slow
def test_errors_build_up_and_flip_choices(trained):
    for candidate in trained.candidates:
        flips = [entry.routing.flipped for entry in candidate.layers if entry.routing]
        assert 0 < max(flips) < 0.5
        assert candidate.layers[0].stream.relative == 0, "the embedding is as the source has it"
        assert candidate.mtp_acceptance > 0.5 * trained.reference.mtp_acceptance


# Model Optimizer's own output.


@pytest.fixture(scope="session")
def modelopt_fp8(tmp_path_factory):
    """(source, Model Optimizer's FP8 output, rows) of the synthetic checkpoint."""
    folder = tmp_path_factory.mktemp("modelopt")
    source, rows = synthetic_checkpoint(folder / "source"), write_rows(folder / "rows.npy", (ROWS, LENGTH))
    theirs = modelopt_run.run(
        source, folder / "theirs", "fp8", torch.from_numpy(np.load(rows)), torch.float32
    )
    return source, theirs, rows


@pytest.mark.slow
class TestModelOptimizer:
    pytestmark = modelopt_run.MARKS

    def test_its_output_stands_beside_ours(self, modelopt_fp8, compare, quantized):
        source, theirs, rows = modelopt_fp8
        report = compare(source, quantized("fp8", name="ours", of=source), theirs, data=rows)
        strict(report)
        ours, other = report.candidates
        assert (ours.recipe, other.recipe, other.kv_cache) == ("fp8-max", None, "fp8")
        assert [w for w in other.warnings if "multi-token-prediction" in w] == [
            f"it lacks {mtp_tensors(source)} multi-token-prediction tensors: no acceptance is measured"
        ]
        assert (ours.mtp_acceptance is None, other.mtp_acceptance) == (False, None)
        assert {(m.name, m.format, m.input_format) for m in ours.modules} == {
            (m.name, m.format, m.input_format) for m in other.modules
        }
        alone = [
            m.name for m in ours.modules if m.weight and not m.name.endswith(("q_proj", "k_proj", "v_proj"))
        ]
        assert len(alone) >= 12, "those whose scale is not shared with another tensor's"
        for name in alone:
            assert module(ours, name).weight == module(other, name).weight, name
            assert module(ours, name).effect == pytest.approx(module(other, name).effect, rel=1e-3), (
                name
            )  # measured 2e-5: input scales are 5e-7 apart
        assert other.logits.kl.mean == pytest.approx(
            ours.logits.kl.mean, rel=0.1
        )  # measured 2%: q, k, v share no weight scale there

    def test_its_mxfp8_has_our_figures(self, fitting, quantized, compare, token_rows, tmp_path):
        """Equal bytes, and no calibrated scale: all but what depends on MTP, which it drops."""
        source, rows = fitting("mxfp8"), torch.from_numpy(np.load(token_rows))
        theirs = modelopt_run.run(source, tmp_path / "theirs", "mxfp8", rows)
        ours, other = compare(source, quantized("mxfp8"), theirs).candidates
        left_out = {"name", "recipe", "warnings", "mtp_acceptance", "bytes", "compression", "bits_per_weight"}
        assert ours.model_dump(exclude=left_out) == other.model_dump(exclude=left_out)
        assert ours.logits.kl.mean > 0
        assert (ours.mtp_acceptance is None, other.mtp_acceptance) == (False, None)
        assert {(m.format, m.input_format) for m in other.modules} == {("mxfp8", "mxfp8")}

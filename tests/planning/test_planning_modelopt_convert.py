"""Recipes of Model Optimizer become recipes of ours: formats, methods, layers; what is told, what is refused.

What a pattern matches is held against Model Optimizer in tests/oracles/test_oracle_modelopt_recipes.py.
"""

import re
from typing import Any

import pytest
from support.modelopt_recipes import made
from support.places import SUPER
from support.synthetic import CONFIG

from nemoquant.errors import RecipeError
from nemoquant.formats import FORMATS
from nemoquant.model.parse import parse_config
from nemoquant.model.roles import tensor_table
from nemoquant.planning.modelopt import quantizers
from nemoquant.planning.modelopt.convert import Fitted, convert
from nemoquant.planning.modelopt.numerics import words
from nemoquant.planning.recipe import parse_recipe
from nemoquant.planning.resolve import resolve

Entry = dict[str, Any]
OFF: Entry = {"quantizer_name": "*", "enable": False}
FP8 = {"num_bits": [4, 3]}
MXFP8 = {"num_bits": [4, 3], "block_sizes": {"-1": 32, "type": "dynamic", "scale_bits": [8, 0]}}
NVFP4 = {"num_bits": [2, 1], "block_sizes": {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]}}
STATIC = {"num_bits": [2, 1], "block_sizes": {"-1": 16, "type": "static", "scale_bits": [4, 3]}}
TWO = {"num_bits": [2, 1], "block_sizes": STATIC["block_sizes"] | {"four_over_six": True}}  # type: ignore[operator]
KV = "*[kv]_bmm_quantizer"
MULTIPLES = {"fp8_scale_sweep": False, "start_multiplier": 1.0, "stop_multiplier": 1.5, "step_size": 0.5}
MTP_NOTE = "multi-token prediction is kept as the source has it; Model Optimizer's file lacks it"


def on(pattern: str, cfg: Any, **more: Any) -> Entry:
    return {"quantizer_name": pattern, "cfg": cfg, **more}


def both(modules: str, weights: Any, inputs: Any = None) -> list[Entry]:
    """Weights and inputs of modules."""
    return [on(f"{modules}weight_quantizer", weights), on(f"{modules}input_quantizer", inputs or weights)]


def converted(*entries: Entry, method: str = "max", raw: Any = CONFIG, **options: Any) -> Fitted:
    config = parse_config(raw)
    return convert(made([OFF, *entries], {"method": method, **options}), config, tensor_table(config))


def rules(*entries: Entry, **given: Any) -> list[dict[str, Any]]:
    """The rules without the last, which leaves the rest as it is."""
    recipe = converted(*entries, **given).recipe.dump()
    assert recipe["rules"][-1] == {"roles": ["*"], "format": "source"}
    return list(recipe["rules"][:-1])


def notes(*entries: Entry, **given: Any) -> list[str]:
    found = converted(*entries, **given).notes
    assert all(note.startswith("modelopt-theirs: ") for note in found)
    texts = [note.removeprefix("modelopt-theirs: ") for note in found]
    assert texts[-1] == MTP_NOTE  # the model has a module of it
    return texts[:-1]


def refusal(*entries: Entry, **given: Any) -> str:
    with pytest.raises(RecipeError) as error:
        converted(*entries, **given)
    assert "\n" not in str(error.value)
    return str(error.value)


EXPERTS = both("*mixer.experts.*", NVFP4)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (both("*mixer.experts.*", FP8), {"format": "fp8"}),
        (both("*mixer.experts.*", MXFP8), {"format": "mxfp8"}),
        (both("*mixer.experts.*", NVFP4), {"format": "nvfp4"}),
        (both("*mixer.experts.*", STATIC, NVFP4), {"format": "nvfp4"}),
        ([on("*experts.*weight_quantizer", NVFP4), on("*shared*", FP8, enable=False)], "none"),
        (both("*mixer.experts.*", NVFP4 | {"effective_bits": 4.5}), {"format": "nvfp4"}),
    ],
    ids=["fp8", "mxfp8", "nvfp4", "static", "weights only", "what a search counts"],
)
def test_formats(entries: list[Entry], expected: Any) -> None:
    weights_only = {"format": "nvfp4", "activations": "none"}
    assert rules(*entries) == [{"roles": ["experts.*"]} | (weights_only if expected == "none" else expected)]


@pytest.mark.parametrize(
    ("weights", "method", "options", "scales"),
    [
        (NVFP4, "max", {}, "max"),
        (STATIC, "max", {}, "max"),
        (NVFP4, "mse", {"fp8_scale_sweep": True}, "max"),  # dynamic scales are not searched
        (STATIC, "mse", {"fp8_scale_sweep": True}, "mse"),
        (STATIC, "mse", {}, "mse"),
        (TWO, "mse", MULTIPLES, "four_over_six"),
        (STATIC, "local_hessian", {}, "hess"),
        (NVFP4, "local_hessian", {}, "max"),
        (NVFP4, "gptq", {}, "gptq"),
        (STATIC, "gptq", {"perc_damp": 0.1}, "gptq"),
        (FP8, "gptq", {}, "gptq"),
        (FP8, "mse", {"fp8_scale_sweep": True}, "max"),
        (FP8, "mse", {}, "max"),
        (FP8, "local_hessian", {}, "max"),
        (MXFP8, "mse", {}, "max"),
    ],
)
def test_methods(weights: Any, method: str, options: Any, scales: str) -> None:
    inputs = NVFP4 if weights in (STATIC, TWO) else weights
    found = converted(*both("*in_proj*", weights, inputs), method=method, **options).recipe
    assert [rule.scales for rule in found.rules[:-1]] == [scales]
    assert found.solve.descent == (0 if scales == "hess" else 1)  # their search has no sweeps


@pytest.mark.parametrize(("name", "cfg"), [("fp8", FP8), ("mxfp8", MXFP8), ("nvfp4", NVFP4)])
def test_weights_only_where_the_format_has_it(name: str, cfg: Any) -> None:
    entries = [*EXPERTS, on("*in_proj*weight_quantizer", cfg)]
    if FORMATS[name].weights_only:  # type: ignore[index]
        assert rules(*entries)[0] == {"roles": ["mamba.in_proj"], "format": name, "activations": "none"}
    else:
        assert f"{name.upper()} weights whose inputs are not quantized (entry '" in refusal(*entries)


def test_the_last_entry_wins_and_a_switch_keeps_the_attributes() -> None:
    entries = [
        *both("*", FP8),
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*shared_experts*quantizer", "enable": True},
        {"quantizer_name": "*output_quantizer", "enable": False},
    ]
    assert rules(*entries) == [{"roles": ["shared_experts.*"], "format": "fp8"}]


def test_layers_stand_where_a_role_has_several_formats() -> None:
    entries = [*both("*in_proj*", FP8), *both("*layers.4.mixer.in_proj*", NVFP4)]
    assert rules(*entries) == [
        {"roles": ["mamba.in_proj"], "layers": [0], "format": "fp8"},
        {"roles": ["mamba.in_proj"], "layers": [4], "format": "nvfp4"},
    ]
    raw = CONFIG | {"hybrid_override_pattern": "M*E-MEME", "num_hidden_layers": 8}
    entries = [*both("*in_proj*", FP8), {"quantizer_name": "*layers.4.*", "enable": False}]
    assert rules(*entries, raw=raw) == [{"roles": ["mamba.in_proj"], "layers": [0, 6], "format": "fp8"}]


def test_roles_are_one_rule_where_they_have_the_same() -> None:
    entries = [*both("*", FP8), *EXPERTS, {"quantizer_name": "*[qkv]_proj*", "enable": False}]
    entries += [{"quantizer_name": p, "enable": False} for p in ("*conv1d*", "*embeddings*", "*bmm*")]
    assert rules(*entries) == [
        {
            "roles": ["mamba.*", "shared_experts.*", "latent.*", "attention.o_proj", "mlp.*", "lm_head"],
            "format": "fp8",
        },
        {"roles": ["experts.*"], "format": "nvfp4"},
    ]


def test_the_recipe_is_one_of_ours() -> None:
    """It can be kept as a file, and the plan of that file is the same."""
    config = parse_config(CONFIG)
    table = tensor_table(config)
    recipe = converted(*EXPERTS, *both("*in_proj*", FP8), on(KV, FP8)).recipe
    again = parse_recipe(recipe.dump())
    assert again == recipe
    assert (
        resolve(again, config, table, assumed=True).rows == resolve(recipe, config, table, assumed=True).rows
    )
    assert recipe.kv_cache == "fp8"
    assert recipe.name == "modelopt-theirs"


def test_what_has_no_effect_is_told() -> None:
    told = notes(*EXPERTS, method="max", layerwise={"enable": True}, distributed_sync=False, debug=None)
    assert told == ["these options of its algorithm have no effect here: layerwise"]


@pytest.mark.parametrize(
    ("entries", "given", "note"),
    [
        (
            [on(KV, FP8 | {"use_constant_amax": True})],
            {},
            "K and V scales are calibrated here, where Model Optimizer writes none and engines take 1.0 "
            "(use_constant_amax)",
        ),
        (
            both("*in_proj*", NVFP4, NVFP4 | {"constant_amax": 2688.0}),
            {},
            "the input scales of 2 modules are calibrated here, where Model Optimizer writes a constant",
        ),
        (
            [on("*in_proj*input_quantizer", FP8)],
            {},
            "2 modules whose input alone is quantized stay as the source has them, as in Model "
            "Optimizer's own "
            "file",
        ),
        (
            [on("*[qkvp]_bmm_quantizer", FP8)],
            {},
            "2 quantizers of queries and probabilities inside attention (*[qkvp]_bmm_quantizer) are "
            "left out: "
            "nothing of them stands in a checkpoint",
        ),
        (
            both("*[qkv]_proj*", FP8),
            {},
            "q, k and v of a layer share their scales here, which are apart in Model Optimizer's file "
            "(--no-scale-groups)",
        ),
        (
            [on("*mlp*weight_quantizer", FP8), {"quantizer_name": "*visual*", "enable": False}],
            {},
            "1 patterns match nothing in this model: *mlp*weight_quantizer",
        ),
        (
            both("backbone.layers.0.mixer.in_proj*", FP8),
            {},
            "backbone.layers.0.mixer.in_proj*weight_quantizer, "
            "backbone.layers.0.mixer.in_proj*input_quantizer "
            "match by the names of the checkpoint's own code, and are taken so; by transformers' "
            "names, which "
            "Model Optimizer has now, they match nothing",
        ),
        (
            both("*down_proj.", FP8),
            {},
            "*down_proj.weight_quantizer, *down_proj.input_quantizer leave routed experts out, as in Model "
            "Optimizer, where the experts of a layer are one module "
            "(`*experts.*_proj_weight_quantizer` matches "
            "them)",
        ),
        (
            both("*in_proj*", STATIC, NVFP4),
            {"method": "mse"},
            "mse: block scales are searched among all E4M3 values, where Model Optimizer tries 39 "
            "multiples of "
            "the largest magnitude",
        ),
        (
            both("*in_proj*", FP8),
            {"method": "mse"},
            "mse: the one scale of an FP8 weight is from its largest magnitude (2 weights), where Model "
            "Optimizer also tries 39 multiples of it",
        ),
        (
            EXPERTS,
            {"method": "gptq", "block_size": 64},
            "gptq is done by nemoquant's own GPTQ, with its damping and sweeps, for routed experts "
            "too (in Model "
            "Optimizer fused experts keep max); its options block_size are not used",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_differences_are_told(entries: list[Entry], given: Any, note: str) -> None:
    assert note in notes(*EXPERTS, *entries, **given)


def test_the_cache_alone() -> None:
    found = converted(on(KV, FP8), on("*mlp*weight_quantizer", NVFP4))
    assert (found.recipe.kv_cache, len(found.recipe.rules)) == ("fp8", 1)
    assert "no weight is quantized, the KV cache alone: its patterns are for another model" in found.notes[0]


def test_names_of_the_checkpoints_own_code() -> None:
    """Where a pattern means nothing in transformers: one expert is one module, all of them are meant."""
    entries = both("*.experts.*.up_proj.", NVFP4) + both(
        "backbone.layers.*.mixer.experts.*.down_proj.", NVFP4
    )
    assert rules(*entries) == [{"roles": ["experts.*"], "format": "nvfp4"}]


@pytest.mark.parametrize(
    ("entries", "given", "parts"),
    [
        (
            [on("*embeddings*weight_quantizer", NVFP4)],
            {},
            ["NVFP4 weights of the role embedding, which stays as it is: "],
        ),
        (
            both("*conv1d*", FP8),
            {},
            ["FP8 weights of the role conv1d", "depthwise", "'*conv1d*', enable: false"],
        ),
        (
            [on("*in_proj*output_quantizer", FP8)],
            {},
            ["FP8 outputs, which no engine reads", "'*output_quantizer'"],
        ),
        (both("*in_proj*", {"num_bits": 8, "axis": 0}), {}, ["INT8 per channel weights", "'*in_proj*'"]),
        (
            both("*in_proj*", {"num_bits": 4, "block_sizes": {"-1": 128}}),
            {},
            ["INT4 in blocks of 128 weights"],
        ),
        (both("*in_proj*", STATIC), {}, ["inputs of NVFP4 weights (expected inputs of the same format)"]),
        (both("*in_proj*", NVFP4, FP8), {}, ["FP8 inputs of NVFP4 weights"]),
        (both("*in_proj*", [NVFP4, FP8], FP8), {}, ["FP8 after NVFP4 weights"]),
        (both("*in_proj*", FP8 | {"bias": {"-2": None}}), {}, ["E4M3 with bias weights"]),
        (both("*in_proj*", FP8 | {"type": "dynamic"}), {}, ["E4M3 scaled at run time weights"]),
        ([on("*in_proj*weight_quantizer", FP8 | {"constant_amax": 1.0})], {}, ["with a constant scale"]),
        (
            [on(KV, NVFP4)],
            {},
            ["a KV cache of NVFP4 (entry '*[kv]_bmm_quantizer')", "; the KV cache fp8), or end"],
        ),
        ([on("*k_bmm_quantizer", FP8)], {}, ["a KV cache of which some layers, or K or V alone"]),
        (both("*in_proj*", TWO, NVFP4), {}, ["four_over_six by another algorithm than mse with"]),
        (
            both("*in_proj*", TWO, NVFP4),
            {"method": "mse"},
            ["four_over_six by another algorithm than mse with"],
        ),
        (
            [on("*up_proj_weight_quantizers.3", FP8)],
            {},
            ["another format for some routed experts of a layer"],
        ),
        (
            EXPERTS,
            {"method": "awq_lite"},
            ["the algorithm awq_lite: input channels are not scaled", "--method"],
        ),
        (EXPERTS, {"method": "svdquant", "lowrank": 32}, ["no part of a weight is kept in 16 bits"]),
        (EXPERTS, {"method": "lsq"}, ["scales are not learned by training here"]),
        (EXPERTS, {"method": "nvfp4_act_headroom"}, ["not a percentile"]),
        (EXPERTS, {"method": "something"}, ["the algorithm something.", "local_hessian, gptq"]),
        (
            EXPERTS,
            {"fp8_scale_swep": True},
            ["the option 'fp8_scale_swep' of the algorithm max is not known"],
        ),
        (
            EXPERTS,
            {"method": "mse", "step_size": 0},
            ["no search; expected numbers such as 1.0, 1.5 and 0.5"],
        ),
        (EXPERTS, {"method": "mse", "step_size": "x"}, ["no search"]),
        (both("*mlp*", NVFP4), {}, ["quantizes nothing in this model", "*mlp*weight_quantizer"]),
        ([on("*" * 401, FP8)], {}, ["has 401 characters; expected at most 400"]),
    ],
    ids=lambda value: value[0][:40] if isinstance(value, list) and isinstance(value[0], str) else "",
)
def test_what_cannot_be_done_is_refused(entries: list[Entry], given: Any, parts: list[str]) -> None:
    text = refusal(*entries, **given)
    assert text.startswith("recipe theirs.yaml")
    assert [part for part in parts if part not in text] == []


def test_all_that_can_not_be_done_is_in_one_line() -> None:
    text = refusal(
        on("*embeddings*weight_quantizer", NVFP4), *both("*in_proj*", {"num_bits": 8}), on(KV, NVFP4)
    )
    assert text.count("entry '") == 3
    assert "backbone.layers.0.mixer.in_proj, backbone.layers.4.mixer.in_proj" in text
    for pattern in ("*embeddings*", "*in_proj*", KV):
        assert f"`- {{quantizer_name: '{pattern}', enable: false}}`" in text
    fixed = [
        {"quantizer_name": f"*{p}*", "enable": False} for p in ("embeddings", "in_proj", "[kv]_bmm_quantizer")
    ]
    entries = [on("*embeddings*weight_quantizer", NVFP4), *both("*in_proj*", {"num_bits": 8}), on(KV, NVFP4)]
    assert rules(*EXPERTS, *entries, *fixed) == [{"roles": ["experts.*"], "format": "nvfp4"}]


def test_what_no_entry_touches_is_int8_as_there() -> None:
    config = parse_config(CONFIG)
    with pytest.raises(
        RecipeError, match=re.escape("begin quant_cfg with `- {quantizer_name: '*', enable")
    ) as error:
        convert(made(both("*in_proj*", FP8)), config, tensor_table(config))
    assert "INT8 weights, a format that is not written here (no entry says otherwise)" in str(error.value)


def test_two_algorithms() -> None:
    config = parse_config(CONFIG)
    theirs = made([OFF, *EXPERTS], {"method": "awq_lite"}, {"method": "max"})
    with pytest.raises(RecipeError, match="the algorithm awq_lite and then max"):
        convert(theirs, config, tensor_table(config))


def test_no_algorithm_is_max() -> None:
    config = parse_config(CONFIG)
    found = convert(made([OFF, *EXPERTS]), config, tensor_table(config))
    assert [rule.scales for rule in found.recipe.rules] == ["max", "max"]


def test_a_head_that_is_tied_to_the_embedding() -> None:
    raw = CONFIG | {"tie_word_embeddings": True}
    assert "FP8 weights of a head that is tied to the embedding" in refusal(*both("*lm_head*", FP8), raw=raw)
    assert rules(*EXPERTS, raw=raw) == [{"roles": ["experts.*"], "format": "nvfp4"}]


def test_patterns_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "MOST_COMPARED", 200)
    assert "were compared with more than 200 names" in refusal(*EXPERTS, *EXPERTS, *EXPERTS)


def test_a_large_model_takes_a_moment() -> None:
    """512 experts in 40 layers: their names are compared only where a pattern may mean one of them."""
    from nemoquant.model.parse import load_config

    config, _ = load_config(SUPER)
    table = tensor_table(config)
    found = convert(made([OFF, *EXPERTS, *both("*in_proj*", FP8), on(KV, FP8)]), config, table)
    assert [rule.roles for rule in found.recipe.rules] == [["mamba.in_proj"], ["experts.*"], ["*"]]
    applied = quantizers.Applied(made([OFF, *EXPERTS]), config, table)
    assert applied._compared < 10_000


@pytest.mark.parametrize(
    ("cfg", "text"),
    [
        (({"num_bits": 8},), "INT8"),
        (({"num_bits": [4, 3], "block_sizes": {"-1": 128, "-2": 128}},), "E4M3 in blocks of 128 x 128"),
        (({"num_bits": [4, 3], "axis": 1},), "E4M3 per index of axis 1"),
        (({"num_bits": [4, 3], "block_sizes": {"-1": None, "type": "dynamic"}},), "E4M3 in blocks of a row"),
        (
            ({"num_bits": [2, 1], "block_sizes": {"-1": 32, "scale_bits": [8, 0]}},),
            "E2M1 in blocks of 32 with E8M0 scales",
        ),
        (({"num_bits": [4, 3], "rotate": True},), "E4M3 with rotate"),
        ((FP8,), "FP8"),
    ],
)
def test_words(cfg: Any, text: str) -> None:
    assert words(cfg) == text

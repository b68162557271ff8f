"""Recipes against tensor tables: matching, every refusal, scale groups, and the plan's identity."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.places import SUPER
from support.processes import run_python

import nemoquant.planning.resolve as resolve_module
from nemoquant import api
from nemoquant.errors import RecipeError
from nemoquant.model.parse import parse_config
from nemoquant.model.roles import tensor_table
from nemoquant.planning.plan import Plan
from nemoquant.planning.recipe import parse_recipe
from nemoquant.planning.resolve import resolve
from nemoquant.planning.row import Row

Rule = dict[str, Any]
Make = Callable[..., Path]

RAW: dict[str, Any] = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M*E-ME*",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "n_routed_experts": 12,
    "num_experts_per_tok": 2,
    "moe_latent_size": 32,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 80,
    "num_nextn_predict_layers": 1,
}
REST: Rule = {"roles": ["*"], "format": "source"}


def planned(*rules: Rule, raw: dict[str, Any] = RAW, kv_cache: str = "source", **options: Any) -> Plan:
    recipe = parse_recipe({"name": "mine", "summary": "s", "rules": list(rules), "kv_cache": kv_cache})
    config = parse_config(raw)
    return resolve(recipe, config, tensor_table(config), assumed=True, **options)


def refusal(*rules: Rule, raw: dict[str, Any] = RAW) -> str:
    with pytest.raises(RecipeError) as error:
        planned(*rules, raw=raw)
    assert "\n" not in str(error.value)
    return str(error.value)


def rows(plan: Plan) -> dict[str, Row]:
    return {row.name: row for row in plan.rows}


def quantized(plan: Plan) -> set[str]:
    return {row.name.removesuffix(".weight") for row in plan.rows if row.format != "source"}


# --- which patterns match


def test_the_first_match_wins() -> None:
    made = rows(
        planned(
            {"names": ["backbone.layers.1.mixer.o_proj"], "format": "source"},
            {"roles": ["attention.o_proj", "mlp.*"], "layers": [3, 6], "format": "nvfp4", "scales": "mse"},
            {"roles": ["attention.*", "mamba.*", "mlp.*", "lm_head"], "format": "fp8"},
            REST,
        )
    )
    expected = {
        "backbone.layers.1.mixer.o_proj.weight": (
            "source",
            None,
            None,
            "rule 1: names backbone.layers.1.mixer.o_proj",
        ),
        "backbone.layers.6.mixer.o_proj.weight": (
            "nvfp4",
            "mse",
            "nvfp4",
            "rule 2: roles attention.o_proj, mlp.* in 2 layers",
        ),
        "backbone.layers.3.mixer.up_proj.weight": (
            "nvfp4",
            "mse",
            "nvfp4",
            "rule 2: roles attention.o_proj, mlp.* in 2 layers",
        ),
        "backbone.layers.6.mixer.q_proj.weight": (
            "fp8",
            "max",
            "fp8",
            "rule 3: roles attention.*, mamba.*, mlp.*, lm_head",
        ),
        "lm_head.weight": ("fp8", "max", "fp8", "rule 3: roles attention.*, mamba.*, mlp.*, lm_head"),
        "backbone.layers.2.mixer.gate.weight": ("source", None, None, "rule 4: roles *"),
    }
    for name, (form, method, activation, reason) in expected.items():
        row = made[name]
        assert (row.format, row.activation_format, row.reason) == (form, activation, reason), name
        assert row.scale_method == method, name


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (
            {"roles": ["mamba.in_proj"]},
            ["backbone.layers.0.mixer.in_proj", "backbone.layers.4.mixer.in_proj"],
        ),
        ({"roles": ["mamba.in_proj"], "layers": [4]}, ["backbone.layers.4.mixer.in_proj"]),
        ({"roles": ["mam*.o*_proj"], "layers": [0]}, ["backbone.layers.0.mixer.out_proj"]),
        (
            {"roles": ["latent.fc[12]"], "layers": [2]},
            [f"backbone.layers.2.mixer.fc{i}_latent_proj" for i in (1, 2)],
        ),
        (
            {"roles": ["latent.fc?"], "layers": [2]},
            [f"backbone.layers.2.mixer.fc{i}_latent_proj" for i in (1, 2)],
        ),
        ({"names": ["backbone.layers.1.mixer.o_proj"]}, ["backbone.layers.1.mixer.o_proj"]),
        ({"names": ["backbone.layers.1.mixer.o_proj.weight"]}, ["backbone.layers.1.mixer.o_proj"]),
        (
            {"names": ["*.o_proj"]},
            ["backbone.layers.1.mixer.o_proj", "backbone.layers.6.mixer.o_proj", "mtp.layers.0.mixer.o_proj"],
        ),
        (
            {"names": ["backbone.*.o_proj"]},
            ["backbone.layers.1.mixer.o_proj", "backbone.layers.6.mixer.o_proj"],
        ),
        ({"names": ["lm_head"]}, ["lm_head"]),
    ],
)
def test_patterns(rule: Rule, expected: list[str]) -> None:
    if any(name.startswith("mtp.") for name in expected):
        assert "mtp.layers.0.mixer.o_proj.weight (role mtp.attention.o_proj) can't be given" in refusal(
            rule | {"format": "fp8"}, REST
        )
    else:
        assert quantized(planned(rule | {"format": "fp8"}, REST)) == set(expected)


def test_patterns_match_whole_names() -> None:
    """``layers.1`` is layer 1, not 10 to 19; no pattern matches a part of a name or role."""
    raw = RAW | {"hybrid_override_pattern": "M" * 12}
    rule = {"names": ["backbone.layers.1.mixer.*_proj"], "format": "fp8"}
    assert quantized(planned(rule, REST, raw=raw)) == {
        f"backbone.layers.1.mixer.{p}_proj" for p in ("in", "out")
    }
    assert "matches none" in refusal({"names": ["in_proj"], "format": "fp8"}, REST)
    assert "matches none" in refusal({"names": ["BACKBONE.*"], "format": "fp8"}, REST)
    assert "no role matches experts;" in refusal({"roles": ["experts"], "format": "fp8"}, REST)


def test_a_role_that_the_config_lacks_matches_nothing() -> None:
    raw = RAW | {"hybrid_override_pattern": "M"}
    absent = {"roles": ["experts.*", "latent.*"], "format": "nvfp4"}
    made = planned(absent, {"roles": ["mlp.*", "mamba.out_proj"], "format": "fp8"}, REST, raw=raw)
    assert {row.role for row in made.quantized} == {"mamba.out_proj"}


# --- refusals, in order


def test_an_unknown_role() -> None:
    message = refusal({"roles": ["experts.*", "expert.*", "shared"], "format": "fp8"}, REST)
    assert message.startswith(
        "recipe mine: no role matches expert.*, shared; roles are mamba.in_proj, mamba.out_proj, "
        "experts.up_proj,"
    )
    assert message.endswith("mtp.router.bias")


def test_a_name_pattern_that_matches_nothing() -> None:
    message = refusal({"names": ["*.o_proj", "language_model*"], "format": "fp8"}, REST)
    count = len(tensor_table(parse_config(RAW)))
    assert message == (
        f"recipe mine: rule 1: the name pattern 'language_model*' matches none of the {count} tensors; "
        f"names look like "
        "'backbone.layers.0.mixer.A_log'"
    )


def test_layers_without_the_role() -> None:
    rule = {"roles": ["mamba.*"], "layers": [0, 1, 4, 99], "format": "fp8"}
    assert refusal(rule, REST) == (
        "recipe mine: rule 1: layers 1, 99 have no tensor of the roles mamba.*; expected layers that have "
        "them, "
        "is the recipe for another model?"
    )
    # naming layers of a role is an error even if the config lacks that role
    assert "rule 1: layers 0 have no tensor" in refusal(
        {"roles": ["mlp.*"], "layers": [0], "format": "fp8"}, REST
    )


@pytest.mark.parametrize(
    ("rules", "dead", "count"),
    [
        (
            [{"roles": ["mlp.*"]}, {"names": ["backbone.layers.3.mixer.up_proj"]}],
            "2 (names backbone.layers.3.mixer.up_proj)",
            1,
        ),
        ([{"roles": ["mlp.*"]}, {"roles": ["mlp.*"], "layers": [3]}], "2 (roles mlp.* in 1 layers)", 2),
        ([{"roles": ["*"]}, {"roles": ["experts.*"]}], "2 (roles experts.*)", 2 * 2 * 12),
        (
            [{"roles": ["mamba.in_proj"]}, {"roles": ["*.out_proj"]}, {"roles": ["mamba.*"]}],
            "3 (roles mamba.*)",
            4,
        ),
    ],
    ids=["name", "layers", "all taken by *", "taken piece by piece"],
)
def test_a_rule_that_does_nothing(rules: list[Rule], dead: str, count: int) -> None:
    assert refusal(*(r | {"format": "source"} for r in rules), REST) == (
        f"recipe mine: rule {dead} does nothing: earlier rules take all {count} tensors that it matches; "
        f"the first match wins, "
        "move it up or remove it"
    )


def test_a_rule_that_finds_something_in_other_models_may_stay() -> None:
    """Here the layers named first are all layers of the model; a recipe should still fit a deeper model."""
    made = planned(
        {"roles": ["mlp.*"], "layers": [3], "format": "fp8"}, {"roles": ["mlp.*"], "format": "nvfp4"}, REST
    )
    assert {row.format for row in made.rows if row.role.startswith("mlp.")} == {"fp8"}


def test_uncovered_tensors() -> None:
    rules = [{"roles": roles, "format": "source"} for roles in (["[!m]*"], ["mtp.*"], ["mamba.*"])]
    assert refusal(*rules) == (
        "recipe mine: no rule covers 2 tensors: backbone.layers.3.mixer.up_proj.weight, "
        "backbone.layers.3.mixer.down_proj.weight; "
        'end the rules with `- roles: ["*"]` and `format: source`'
    )


PROTECTED = {
    "ssm.A_log": (
        "backbone.layers.0.mixer.A_log",
        "the recurrence multiplies their error over the whole sequence, and engines widen",
    ),
    "ssm.D": (
        "backbone.layers.0.mixer.D",
        "the recurrence multiplies their error over the whole sequence, and engines widen",
    ),
    "ssm.dt_bias": (
        "backbone.layers.0.mixer.dt_bias",
        "the recurrence multiplies their error over the whole sequence, and engines",
    ),
    "router": (
        "backbone.layers.2.mixer.gate.weight",
        "a rounded router sends tokens to other experts, and engines compute it in fp32",
    ),
    "router.bias": (
        "backbone.layers.2.mixer.gate.e_score_correction_bias",
        "a rounded router sends tokens to other experts",
    ),
    "norm": (
        "backbone.layers.0.norm.weight",
        "norms are a few kilobytes, and no engine reads a quantized one",
    ),
    "conv1d": (
        "backbone.layers.0.mixer.conv1d.weight",
        "the convolution is depthwise, not a GEMM, and engines always exclude it",
    ),
    "embedding": (
        "backbone.embeddings.weight",
        "no engine loads a quantized one of this family (vLLM 0.33 has none in the ModelOpt layout, SGLang",
    ),
    "mtp.eh_proj": ("mtp.layers.0.eh_proj.weight", "engines load multi-token-prediction modules unquantized"),
    "mtp.attention.o_proj": (
        "mtp.layers.0.mixer.o_proj.weight",
        "engines load multi-token-prediction modules unquantized",
    ),
    "mtp.experts.up_proj": (
        "mtp.layers.1.mixer.experts.0.up_proj.weight",
        "engines load multi-token-prediction modules",
    ),
    "mtp.norm": ("mtp.layers.0.enorm.weight", "engines load multi-token-prediction modules unquantized"),
}


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
@pytest.mark.parametrize("role", PROTECTED)
def test_tensors_that_are_never_quantized(role: str, form: str) -> None:
    name, why = PROTECTED[role]
    for rule in ({"roles": [role], "format": form}, {"names": [name], "format": form}):
        message = refusal(rule, REST)
        assert message.startswith(f"{name} (role {role}) can't be given the format {form}: {why}")
        assert "; give it `format: source` (rule 1: " in message


def test_quantizing_everything_is_refused_with_a_reason() -> None:
    assert "backbone.embeddings.weight (role embedding) can't be given the format fp8" in refusal(
        {"roles": ["*"], "format": "fp8"}
    )


def test_the_other_roles_may_be_quantized() -> None:
    linear = ["mamba.*", "attention.*", "experts.*", "shared_experts.*", "latent.*", "mlp.*", "lm_head"]
    for form in ("fp8", "nvfp4"):
        made = planned({"roles": linear, "format": form}, REST)
        assert len(quantized(made)) == 2 * 2 + 2 * 4 + 2 * (24 + 2 + 2) + 2 + 1


def test_indivisible_dimensions() -> None:
    raw = RAW | {"moe_intermediate_size": 40, "intermediate_size": 97}
    rule = {"roles": ["experts.*", "mlp.*"], "format": "nvfp4"}
    assert refusal(rule, REST, raw=raw) == (
        "25 tensors don't fit their format: "
        + ", ".join(
            f"backbone.layers.2.mixer.experts.{e}.down_proj.weight: input dimension 40 is not a multiple of "
            f"nvfp4's block of 16"
            for e in range(3)
        )
        + " and 22 more; give them fp8 or source"
    )
    assert quantized(planned(rule | {"format": "fp8"}, REST, raw=raw))  # FP8 has no blocks


FUSED = "run as one fused operation in vLLM, SGLang and TensorRT-LLM, but got"
EXPERT = "backbone.layers.2.mixer.experts"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [{"roles": ["attention.q_proj"], "format": "fp8"}],
            f"q, k and v of layer 1 {FUSED} backbone.layers.1.mixer.q_proj.weight fp8, "
            f"backbone.layers.1.mixer.k_proj.weight source; "
            "expected one format",
        ),
        (
            [
                {"names": ["backbone.layers.6.mixer.v_proj"], "format": "nvfp4"},
                {"roles": ["attention.*"], "format": "fp8"},
            ],
            f"q, k and v of layer 6 {FUSED} backbone.layers.6.mixer.q_proj.weight fp8, "
            f"backbone.layers.6.mixer.v_proj.weight nvfp4 with "
            "max scales; expected one format",
        ),
        (
            [
                {"roles": ["attention.k_proj"], "format": "nvfp4", "scales": "four_over_six"},
                {"roles": ["attention.*"], "format": "nvfp4"},
            ],
            f"q, k and v of layer 1 {FUSED} backbone.layers.1.mixer.q_proj.weight nvfp4 with max scales, "
            "backbone.layers.1.mixer.k_proj.weight nvfp4 with four_over_six scales; expected one format",
        ),
        (
            [
                {"names": [f"{EXPERT}.11.up_proj"], "format": "source"},
                {"roles": ["experts.*"], "format": "nvfp4"},
            ],
            f"all experts of layer 2 {FUSED} {EXPERT}.0.up_proj.weight nvfp4, {EXPERT}.11.up_proj.weight "
            f"source; expected one format",
        ),
        (
            [{"roles": ["experts.up_proj"], "format": "nvfp4"}, {"roles": ["experts.*"], "format": "fp8"}],
            f"all experts of layer 2 {FUSED} {EXPERT}.0.up_proj.weight nvfp4, {EXPERT}.0.down_proj.weight "
            f"fp8; expected one format",
        ),
        (
            [
                {"roles": ["experts.up_proj"], "format": "nvfp4", "activations": "none"},
                {"roles": ["experts.*"], "format": "nvfp4"},
            ],
            f"all experts of layer 2 {FUSED} {EXPERT}.0.up_proj.weight nvfp4 weights only, "
            f"{EXPERT}.0.down_proj.weight nvfp4; expected "
            "one format",
        ),
    ],
    ids=["q alone", "v of one layer", "another scale", "one expert", "up and down", "weights only"],
)
def test_parts_of_a_fused_operation(rules: list[Rule], message: str) -> None:
    assert refusal(*rules, REST) == message


def test_what_is_not_fused_may_differ() -> None:
    made = planned(
        {"roles": ["attention.o_proj"], "format": "nvfp4"},
        {"roles": ["attention.*"], "layers": [1], "format": "fp8"},
        {"roles": ["experts.*"], "layers": [2], "format": "fp8"},
        {
            "roles": ["experts.up_proj"],
            "format": "nvfp4",
            "scales": "mse",
        },  # each expert has a weight scale of its own
        {"roles": ["experts.*"], "format": "nvfp4"},
        {"roles": ["shared_experts.up_proj", "mamba.in_proj"], "format": "nvfp4"},
        REST,
    )
    assert {row.format for row in made.rows} == {"source", "fp8", "nvfp4"}


MISTAKES: dict[str, list[Rule]] = {  # in the order of the checks; tensors that no rule covers are the third
    "no role matches": [{"roles": ["no.such"], "format": "fp8"}],
    "matches none of": [{"names": ["nothing"], "format": "fp8"}],
    "no rule covers": [],
    "can't be given": [{"roles": ["norm"], "format": "fp8"}],
    "don't fit their format": [{"roles": ["mlp.down_proj"], "format": "nvfp4"}],
    "run as one fused operation": [{"roles": ["attention.q_proj"], "format": "fp8"}],
}


@pytest.mark.parametrize("place", range(len(MISTAKES)), ids=list(MISTAKES))
def test_the_order_of_checks(place: int) -> None:
    """A recipe with one mistake and all later ones gets the message of the first."""
    rules = [rule for mistake in list(MISTAKES.values())[place:] for rule in mistake]
    rest = [REST] if place > list(MISTAKES).index("no rule covers") else []
    assert list(MISTAKES)[place] in refusal(*rules, *rest, raw=RAW | {"intermediate_size": 97})


# --- scale groups

GROUPED = [{"roles": ["attention.*", "experts.*", "mamba.*"], "format": "nvfp4"}, REST]


def test_scale_groups() -> None:
    made = rows(planned(*GROUPED))
    for projection in "qkv":
        row = made[f"backbone.layers.6.mixer.{projection}_proj.weight"]
        assert row.weight_group == row.input_group == "backbone.layers.6.mixer.qkv_proj"
    for expert in (0, 11):
        row = made[f"backbone.layers.5.mixer.experts.{expert}.down_proj.weight"]
        assert (row.weight_group, row.input_group) == (None, "backbone.layers.5.mixer.experts.down_proj")
        row = made[f"backbone.layers.5.mixer.experts.{expert}.up_proj.weight"]
        assert (row.weight_group, row.input_group) == (None, "backbone.layers.5.mixer.experts.up_proj")
    for name in ("backbone.layers.6.mixer.o_proj.weight", "backbone.layers.0.mixer.in_proj.weight"):
        assert (made[name].weight_group, made[name].input_group) == (None, None)
    members: dict[str, int] = {}
    for row in made.values():
        if row.input_group:
            members[row.input_group] = members.get(row.input_group, 0) + 1
    assert members == {f"backbone.layers.{i}.mixer.qkv_proj": 3 for i in (1, 6)} | {
        f"backbone.layers.{i}.mixer.experts.{p}_proj": 12 for i in (2, 5) for p in ("up", "down")
    }


def test_weights_only_share_no_input_scale() -> None:
    made = rows(
        planned({"roles": ["attention.*", "experts.*"], "format": "nvfp4", "activations": "none"}, REST)
    )
    assert all(row.input_group is None for row in made.values())
    assert made["backbone.layers.1.mixer.k_proj.weight"].weight_group == "backbone.layers.1.mixer.qkv_proj"


def test_unquantized_rows_have_no_groups() -> None:
    assert all(
        row.weight_group is None and row.input_group is None for row in planned(REST, kv_cache="fp8").rows
    )


def test_no_scale_groups() -> None:
    apart, grouped = planned(*GROUPED, scale_groups=False), planned(*GROUPED)
    assert all(row.weight_group is None and row.input_group is None for row in apart.rows)
    assert apart.bytes_out == grouped.bytes_out
    assert apart.sha256 != grouped.sha256


# --- identity


def test_the_same_plan_has_the_same_hash() -> None:
    assert planned(*GROUPED).sha256 == planned(*GROUPED).sha256


@pytest.mark.parametrize(
    ("rules", "options"),
    [
        (GROUPED, {"kv_cache": "fp8"}),
        ([GROUPED[0] | {"format": "fp8"}, REST], {}),
        ([GROUPED[0] | {"scales": "mse"}, REST], {}),
        ([GROUPED[0] | {"activations": "none"}, REST], {}),
        ([GROUPED[0] | {"roles": ["experts.*", "attention.*", "mamba.*"]}, REST], {}),
        (GROUPED, {"raw": RAW | {"vocab_size": 97}}),
        (GROUPED, {"raw": RAW | {"hybrid_override_pattern": "M*E-ME*M"}}),
    ],
    ids=["kv cache", "format", "scales", "activations", "recipe text", "shape", "layers"],
)
def test_another_plan_has_another_hash(rules: list[Rule], options: dict[str, Any]) -> None:
    assert planned(*rules, **options).sha256 != planned(*GROUPED).sha256


def test_dtypes_of_the_source_are_part_of_the_plan(make_checkpoint: Make) -> None:
    def wide(tensors: dict[str, torch.Tensor]) -> None:
        tensors["backbone.layers.2.mixer.gate.weight"] = tensors[
            "backbone.layers.2.mixer.gate.weight"
        ].float()

    folder = make_checkpoint()
    from_headers, from_config = api.plan(folder, "fp8"), api.plan(folder / "config.json", "fp8")
    assert from_headers.rows == from_config.rows
    assert from_headers.sha256 == from_config.sha256
    assert (from_headers.summary()["source_dtypes"], from_config.summary()["source_dtypes"]) == (
        "headers",
        "assumed",
    )
    other = api.plan(make_checkpoint("wide", wide), "fp8")
    assert other.sha256 != from_headers.sha256
    assert other.bytes_in == from_headers.bytes_in + 2 * 8 * 64
    assert other.bytes_out == from_headers.bytes_out + 2 * 8 * 64
    assert rows(other)["backbone.layers.2.mixer.gate.weight"].source_dtype == "F32"


def test_the_hash_is_stable_across_processes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    code = (
        "import sys, nemoquant; from pathlib import Path; "
        "print(nemoquant.plan(Path(sys.argv[1]), 'nvfp4').sha256, end='')"
    )
    found = {run_python(code, tmp_path / "config.json", PYTHONHASHSEED=seed).stdout for seed in ("1", "2")}
    assert found == {api.plan(tmp_path / "config.json", "nvfp4").sha256}
    assert len(found.pop()) == 64


# --- the plan's figures


def test_a_recipe_that_changes_nothing_is_refused() -> None:
    """Otherwise it would write a copy and call it quantized."""
    kept = "recipe mine quantizes nothing in this model: all of its rules keep the source; expected"
    assert refusal(REST).startswith(kept)
    dense = RAW | {"hybrid_override_pattern": "M-"}
    with pytest.raises(RecipeError, match="quantizes nothing in this model, which has none of"):
        planned({"roles": ["experts.*"], "format": "nvfp4"}, REST, raw=dense)


def test_an_fp8_cache_needs_calibration_and_adds_its_scales() -> None:
    made = planned(REST, kv_cache="fp8")
    assert made.needs_calibration
    assert made.kv_layers == [1, 6]  # of the main model only: MTP's cache is not quantized
    assert made.tensors_out == len(made.rows) + 4
    assert made.bytes_out == made.bytes_in + 4 * 4
    assert made.kv_cache_bytes_per_token() == {"source": 2 * 2 * 2 * 16 * 2, "planned": 2 * 2 * 2 * 16}


# --- recipes that would take long


@pytest.fixture(scope="module")
def super_raw() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(SUPER.read_text())
    return raw


def test_patterns_that_could_be_matched_in_many_ways_are_matched_in_one(super_raw: dict[str, Any]) -> None:
    globs = [f"*{'?*e*' * 40}z{i}" for i in range(500)]
    began = time.process_time()
    assert "the name pattern" in refusal({"names": globs, "format": "fp8"}, REST, raw=super_raw)
    assert time.process_time() - began < 20


def test_a_pattern_is_compared_with_the_names_that_begin_as_it_does(super_raw: dict[str, Any]) -> None:
    experts = [{"names": [f"backbone.layers.1.mixer.experts.{i}.*"], "format": "fp8"} for i in range(500)]
    began = time.process_time()
    plan = planned(*experts, {"roles": ["experts.*"], "layers": [1], "format": "fp8"}, REST, raw=super_raw)
    assert time.process_time() - began < 5
    assert [row.reason.split(":")[0] for row in plan.quantized[498:503]] == [
        f"rule {number}" for number in (499, 500, 501, 501, 501)
    ]
    assert len(plan.quantized) == 2 * 512


def test_patterns_that_would_be_compared_with_too_many_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names = len({name for spec in tensor_table(parse_config(RAW)) for name in (spec.name, spec.module)})
    rules = [{"names": [f"*.{i}.mixer.*_proj"], "format": "source"} for i in range(6)]
    monkeypatch.setattr(resolve_module, "MOST_COMPARED", 3 * names)
    assert refusal(rules[0], rules[2], rules[4], rules[5], REST) == (
        f"recipe mine: rule 4: the name patterns up to '*.5.mixer.*_proj' would be compared with "
        f"{4 * names:,} names; expected at most {3 * names:,}, begin them as the names begin, or use `roles` "
        f"and `layers`"
    )


def test_the_names_of_all_experts_in_one_rule(super_raw: dict[str, Any]) -> None:
    """They are looked up, and each row's reason names a few of them: all of all would be 80 GB."""
    names = [
        spec.module for spec in tensor_table(parse_config(super_raw)) if spec.role.startswith("experts.")
    ]
    assert len(names) == 40_960
    began = time.process_time()
    plan = planned({"names": names, "format": "fp8"}, REST, raw=super_raw)
    assert time.process_time() - began < 10
    assert quantized(plan) == set(names)
    reason = plan.quantized[0].reason
    assert reason.startswith(f"rule 1: names {names[0]}, {names[1]}, ")
    assert reason.endswith(" and 40940 more")


def test_a_rule_for_each_layer_of_a_large_model(super_raw: dict[str, Any]) -> None:
    count = len(super_raw["hybrid_override_pattern"])
    rules = [{"roles": ["experts.*"], "layers": [i], "format": "fp8"} for i in range(count)]
    moe = [r for r in rules if super_raw["hybrid_override_pattern"][r["layers"][0]] == "E"]
    began = time.process_time()
    plan = planned(*moe, REST, raw=super_raw)
    assert time.process_time() - began < 5
    assert len(plan.quantized) == 40_960


# --- layers by words, and bf16


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (["first"], {1}),
        (["last"], {6}),
        (["first", "last"], {1, 6}),
        ([-1], {6}),
        ([-6, 6], {1, 6}),
        (["0..3"], {1}),
        (["0..-1"], {1, 6}),
    ],
)
def test_layers_by_words(layers: list[int | str], found: set[int]) -> None:
    plan = planned({"roles": ["attention.q_proj", "attention.k_proj", "attention.v_proj"], "layers": layers,
                    "format": "fp8"}, REST)  # fmt: skip
    assert {row.layer for row in plan.quantized} == found
    assert all(row.reason.endswith(f"in layers {', '.join(map(str, layers))}") for row in plan.quantized) == (
        not all(isinstance(entry, int) and entry >= 0 for entry in layers)
    )


@pytest.mark.parametrize("entry", [-2, "2..5", "0..99", "-99..-1", "6..1"])
def test_words_that_mean_no_layer_of_the_role(entry: int | str) -> None:
    assert refusal({"roles": ["attention.*"], "layers": ["first", entry], "format": "fp8"}, REST) == (
        f"recipe mine: rule 1: layers {entry} mean no layers, of the model's 7, that have the roles "
        "attention.*; expected layers that have them, is the recipe for another model?"
    )


def test_words_of_a_role_that_the_model_lacks() -> None:
    dense = RAW | {"hybrid_override_pattern": "M-", "num_nextn_predict_layers": 0}
    message = refusal({"roles": ["attention.*"], "layers": ["last"], "format": "fp8"}, REST, raw=dense)
    assert "layers last mean no layers, of the model's 2, that have the roles attention.*" in message


def test_multi_token_prediction_counts_its_layers_apart() -> None:
    """``last`` of roles of both is one layer of the model and one of its module."""
    plan = planned(
        {"roles": ["mtp.*", "norm"], "layers": ["last"], "format": "source"},
        {"roles": ["mamba.*"], "format": "fp8"},
        REST,
    )
    assert {
        (row.role.startswith("mtp."), row.layer) for row in plan.rows if row.reason.startswith("rule 1")
    } == {
        (False, 6),
        (True, 1),
    }


def test_bf16_is_the_source_where_that_is_bf16() -> None:
    says = {"roles": ["attention.*", "lm_head"], "format": "bf16"}
    plan = planned(says, {"roles": ["mamba.*"], "format": "fp8"}, REST)
    assert {row.format for row in plan.rows if row.reason.startswith("rule 1")} == {"source"}
    assert plan.unused_formats == []
    assert parse_recipe(plan.recipe.dump()) == plan.recipe


def test_bf16_where_the_source_is_something_else(make_checkpoint: Make) -> None:
    assert refusal(
        {"roles": ["router*"], "format": "bf16"}, {"roles": ["mamba.*"], "format": "fp8"}, REST
    ) == (
        "2 tensors that the recipe gives `format: bf16` are not bf16 in the source: "
        + ", ".join(
            f"{name}.mixer.gate.e_score_correction_bias is F32 (rule 1: roles router*)"
            for name in ("backbone.layers.2", "backbone.layers.5")
        )
        + "; nothing is converted, give them `format: source`"
    )

    def half(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].half()

    source = make_checkpoint()
    recipe = source.parent / "mine.yaml"
    recipe.write_text("name: mine\nextends: fp8\nrules: [{roles: [lm_head], format: bf16}]\n")
    assert api.plan(source, str(recipe)).quantized
    with pytest.raises(
        RecipeError, match=r"1 tensors that .* lm_head.weight is F16 \(rule 1: roles lm_head\)"
    ):
        api.plan(make_checkpoint("half", half), str(recipe))

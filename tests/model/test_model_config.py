"""config.json: every spelling that published configs use, and every contradiction that is refused."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from support.places import NANO, SUPER

from nemoquant.errors import ConfigError
from nemoquant.model import parse
from nemoquant.model.parse import load_config, parse_config
from nemoquant.model.roles import tensor_table

RAW: dict[str, Any] = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M*E-",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 80,
}


def raw(**changes: Any) -> dict[str, Any]:
    """The base, with keys changed; ``...`` removes one."""
    return {k: v for k, v in (RAW | changes).items() if v is not ...}


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(raw(**changes))
    message = str(error.value)
    assert message.startswith("config.json: ")
    assert "\n" not in message
    return message.removeprefix("config.json: ")


# --- schedule

KINDS = ("mamba", "attention", "moe", "mlp")


@pytest.mark.parametrize(
    "spelling",
    [
        {"hybrid_override_pattern": "M*E-"},
        {"layers_block_type": ["mamba", "attention", "moe", "mlp"]},
        {"layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"]},
        {"layer_types": ["linear_attention", "full_attention", "moe", "mlp"]},
        {
            "hybrid_override_pattern": "M*E-",
            "layers_block_type": ["linear_attention", "attention", "moe", "mlp"],
        },
        {"hybrid_override_pattern": "M*E-", "num_hidden_layers": 4},
        {"hybrid_override_pattern": "M*E-", "layers_block_type": None, "num_hidden_layers": None},
    ],
)
def test_the_schedule_in_its_spellings(spelling: dict[str, Any]) -> None:
    config = parse_config(raw(hybrid_override_pattern=...) | spelling)
    assert config.layers == KINDS
    assert [config.count(kind) for kind in KINDS] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hybrid_override_pattern": ...},
            "no layer schedule; expected `hybrid_override_pattern`, `layers_block_type` or `block_configs`",
        ),
        (
            {"hybrid_override_pattern": "ME|M"},
            "`hybrid_override_pattern` has the unknown layer letter '|' at layer 2; expected M (Mamba-2), E "
            "(mixture of experts), "
            "* (attention) or - (MLP)",
        ),
        (
            {"hybrid_override_pattern": "MEm"},
            "`hybrid_override_pattern` has the unknown layer letter 'm' at layer 2; expected M",
        ),
        (
            {"hybrid_override_pattern": ""},
            "`hybrid_override_pattern` is ''; expected a string of the letters M E * -",
        ),
        ({"hybrid_override_pattern": ["M"]}, "`hybrid_override_pattern` is ['M']; expected a string"),
        (
            {"hybrid_override_pattern": ..., "layers_block_type": ["mamba", "rwkv"]},
            "`layers_block_type` has the unknown layer kind ['rwkv']; expected a list of mamba, moe, "
            "attention, mlp, ",
        ),
        (
            {"hybrid_override_pattern": ..., "layers_block_type": [["mamba"]]},
            "`layers_block_type` has the unknown layer kind [[",
        ),
        (
            {"hybrid_override_pattern": ..., "layers_block_type": []},
            "`layers_block_type` has the unknown layer kind []; expected",
        ),
        (
            {"hybrid_override_pattern": ..., "layers_block_type": "MEM"},
            "`layers_block_type` has the unknown layer kind 'MEM'",
        ),
        (
            {"layers_block_type": ["mamba", "attention", "moe", "moe"]},
            "`hybrid_override_pattern` and `layers_block_type` describe different layers; expected the same "
            "schedule, remove the wrong",
        ),
        (
            {"num_hidden_layers": 5},
            "`num_hidden_layers` is 5, but the layer schedule has 4 layers; expected the same",
        ),
        (
            {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*X"},
            "`mtp_hybrid_override_pattern` has the unknown layer",
        ),
    ],
)
def test_schedules_that_are_refused(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes).startswith(message)


@pytest.mark.parametrize(
    ("changes", "modules", "layers"),
    [
        ({}, 0, ()),
        ({"num_nextn_predict_layers": 0, "mtp_hybrid_override_pattern": "*E"}, 0, ()),
        ({"num_nextn_predict_layers": 1}, 1, ("attention", "moe")),
        ({"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}, 1, ("attention", "moe")),
        ({"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "M-"}, 2, ("mamba", "mlp")),
        (
            {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["full_attention", "moe"]},
            1,
            ("attention", "moe"),
        ),
    ],
)
def test_multi_token_prediction(changes: dict[str, Any], modules: int, layers: tuple[str, ...]) -> None:
    config = parse_config(raw(**changes))
    assert (config.mtp_modules, config.mtp_layers) == (modules, layers)


def test_sizes_of_a_kind_that_only_mtp_has() -> None:
    config = parse_config(
        raw(hybrid_override_pattern="M", num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*")
    )
    assert (config.num_attention_heads, config.head_dim, config.n_routed_experts) == (4, 16, 0)


# --- scalars


@pytest.mark.parametrize(
    ("alias", "name", "field", "value"),
    [
        ("mamba_n_groups", "n_groups", "n_groups", 4),
        ("mamba_d_conv", "conv_kernel", "conv_kernel", 3),
        ("mamba_conv_bias", "use_conv_bias", "use_conv_bias", False),
        ("mamba_chunk_size", "chunk_size", "chunk_size", 64),
        ("mamba_d_state", "ssm_state_size", "ssm_state_size", 32),
        ("mamba_state_dim", "ssm_state_size", "ssm_state_size", 32),
        ("mamba_n_heads", "mamba_num_heads", "mamba_num_heads", 6),
        ("mamba_d_head", "mamba_head_dim", "mamba_head_dim", 24),
        ("mamba_dt_limit", "time_step_limit", "time_step_limit", (0.25, 2.0)),
        ("mamba_dt_min", "time_step_min", "time_step_min", 0.125),
        ("attention_head_dim", "head_dim", "head_dim", 32),
        ("num_local_experts", "n_routed_experts", "n_routed_experts", 16),
        ("norm_eps", "layer_norm_epsilon", "norm_eps", 0.5),
        ("rms_norm_eps", "layer_norm_epsilon", "norm_eps", 0.5),
    ],
)
def test_legacy_names(alias: str, name: str, field: str, value: Any) -> None:
    assert getattr(parse_config(raw(**{name: ..., alias: value})), field) == value
    assert getattr(parse_config(raw(**{name: None, alias: value})), field) == value
    assert getattr(parse_config(raw(**{name: value, alias: value})), field) == value


def test_aliases_that_contradict_each_other() -> None:
    assert refusal(mamba_n_groups=4) == (
        "{'n_groups': 2, 'mamba_n_groups': 4} contradict each other; expected one value, remove the wrong key"
    )
    assert refusal(layer_norm_epsilon=1e-5, norm_eps=1e-6).startswith(
        "{'layer_norm_epsilon': 1e-05, 'norm_eps': 1e-06} contradict"
    )


@pytest.mark.parametrize(
    "spelling",
    [
        [0, math.inf],
        [0.0, "inf"],
        [0.0, "Infinity"],
        [{"__float__": "0.0"}, {"__float__": "Infinity"}],
        [0.0, {"__float__": "inf"}],
        None,
        ...,
    ],
)
def test_infinity_in_its_spellings(spelling: Any) -> None:
    assert parse_config(raw(time_step_limit=spelling)).time_step_limit == (0.0, math.inf)


def test_infinity_as_python_writes_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw(time_step_limit=[0.001, math.inf])))
    config, found = load_config(tmp_path)
    assert config.time_step_limit == (0.001, math.inf)
    assert found["time_step_limit"] == [0.001, math.inf]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.1], "`time_step_limit` is [0.1]; expected a pair of numbers"),
        (0.1, "`time_step_limit` is 0.1; expected a pair of numbers"),
        ([0.2, 0.1], "`time_step_limit` is [0.2, 0.1]; expected 0 <= low < high"),
        ([-1, 1], "`time_step_limit` is [-1.0, 1.0]; expected 0 <= low < high"),
        ([0.0, "much"], "`time_step_limit` is 'much'; expected a number"),
        ([0.0, math.nan], "`time_step_limit` is nan; expected a number"),
        ([0.0, {"__float__": []}], "`time_step_limit` is []; expected a number"),
        ([0.0, {"float": "1"}], "`time_step_limit` is {'float': '1'}; expected a number"),
    ],
)
def test_limits_that_are_refused(value: Any, message: str) -> None:
    assert refusal(time_step_limit=value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": ...}, "`vocab_size` is missing; expected an integer of at least 1"),
        ({"hidden_size": 0}, "`hidden_size` is 0; expected an integer of at least 1"),
        ({"hidden_size": 64.0}, "`hidden_size` is 64.0; expected an integer of at least 1"),
        ({"hidden_size": "64"}, "`hidden_size` is '64'; expected an integer of at least 1"),
        ({"conv_kernel": True}, "`conv_kernel` is True; expected an integer of at least 1"),
        ({"n_shared_experts": -1}, "`n_shared_experts` is -1; expected an integer of at least 0"),
        (
            {"num_nextn_predict_layers": -1},
            "`num_nextn_predict_layers` is -1; expected an integer of at least 0",
        ),
        ({"layer_norm_epsilon": "small"}, "`layer_norm_epsilon` is 'small'; expected a number"),
        ({"layer_norm_epsilon": True}, "`layer_norm_epsilon` is True; expected a number"),
        ({"layer_norm_epsilon": 10**400}, "`layer_norm_epsilon` is 1000"),
        ({"tie_word_embeddings": "no"}, "`tie_word_embeddings` is 'no'; expected true or false"),
        ({"norm_topk_prob": 1}, "`norm_topk_prob` is 1; expected true or false"),
        (
            {"mamba_ssm_cache_dtype": "float8"},
            "`mamba_ssm_cache_dtype` is 'float8'; expected float32, float16 or bfloat16",
        ),
        ({"intermediate_size": ...}, "`intermediate_size` is missing; expected an integer of at least 1"),
        ({"moe_intermediate_size": ...}, "`moe_intermediate_size` is missing"),
        ({"moe_shared_expert_intermediate_size": ...}, "`moe_shared_expert_intermediate_size` is missing"),
        (
            {"model_type": "llama"},
            "`model_type` is 'llama', expected 'nemotron_h'; nemoquant quantizes the Nemotron-H family only",
        ),
        ({"model_type": ...}, "`model_type` is None, expected 'nemotron_h'"),
        *(
            (
                {key: True},
                f"`{key}` is True, expected false; no published model of this family has biases in its "
                f"projections",
            )
            for key in ("use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias")
        ),
        (
            {"mlp_hidden_act": "silu"},
            "`mlp_hidden_act` is 'silu', expected 'relu2', the only one that this family has",
        ),
        ({"mamba_hidden_act": "gelu"}, "`mamba_hidden_act` is 'gelu', expected 'silu'"),
        (
            {"sliding_window": 4096},
            "`sliding_window` is 4096, expected null; this family attends to the whole context",
        ),
        (
            {"num_key_value_heads": 3},
            "`num_attention_heads` is 4, which `num_key_value_heads` = 3 does not divide; expected a "
            "multiple",
        ),
        (
            {"n_groups": 3},
            "`mamba_num_heads` is 4, which `n_groups` = 3 does not divide; expected a multiple",
        ),
        ({"n_group": 3}, "`n_routed_experts` is 8, which `n_group` = 3 does not divide; expected a multiple"),
        ({"num_experts_per_tok": 9}, "`num_experts_per_tok` is 9, more than the 8 experts of a layer"),
    ],
)
def test_values_that_are_refused(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes).startswith(message)


@pytest.mark.parametrize(
    "key", ["use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias", "sliding_window"]
)
def test_what_may_be_absent_may_be_null(key: str) -> None:
    assert parse_config(raw(**{key: None})) == parse_config(raw())


def test_defaults() -> None:
    config = parse_config(raw())
    assert {
        "norm_eps": config.norm_eps,
        "tie": config.tie_word_embeddings,
        "context": config.max_position_embeddings,
        "conv_bias": config.use_conv_bias,
        "chunk": config.chunk_size,
        "limit": config.time_step_limit,
        "dt_min": config.time_step_min,
        "state": config.mamba_ssm_cache_dtype,
        "shared": config.n_shared_experts,
        "latent": config.moe_latent_size,
        "factor": config.routed_scaling_factor,
        "normalised": config.norm_topk_prob,
        "groups": (config.n_group, config.topk_group),
        "bos": config.bos_token_id,
        "eos": config.eos_token_ids,
    } == {
        "norm_eps": 1e-5,
        "tie": False,
        "context": 4096,
        "conv_bias": True,
        "chunk": 128,
        "limit": (0.0, math.inf),
        "dt_min": 0.001,
        "state": "float32",
        "shared": 1,
        "latent": 0,
        "factor": 1.0,
        "normalised": True,
        "groups": (1, 1),
        "bos": None,
        "eos": (),
    }
    silent = parse_config(raw(num_key_value_heads=..., head_dim=...))
    assert (silent.num_key_value_heads, silent.head_dim) == (
        4,
        16,
    )  # the number of query heads; hidden size over heads


@pytest.mark.parametrize(("value", "ids"), [(2, (2,)), ([2, 11], (2, 11)), (None, ())])
def test_end_tokens(value: Any, ids: tuple[int, ...]) -> None:
    assert parse_config(raw(eos_token_id=value)).eos_token_ids == ids


def test_derived_sizes() -> None:
    config = parse_config(raw(moe_latent_size=32))
    assert (config.mamba_inner, config.conv_channels, config.expert_input) == (4 * 8, 4 * 8 + 2 * 2 * 16, 32)
    assert parse_config(raw()).expert_input == 64


def test_a_kind_that_the_schedule_lacks_has_size_0_and_needs_no_keys() -> None:
    mamba_only = {
        k: v for k, v in RAW.items() if "experts" not in k and "moe" not in k and not k.startswith("num_")
    }
    config = parse_config(
        mamba_only | {"hybrid_override_pattern": "MM", "head_dim": ..., "intermediate_size": None}
    )
    assert (
        config.num_attention_heads,
        config.head_dim,
        config.n_routed_experts,
        config.n_shared_experts,
    ) == (0, 0, 0, 0)
    assert (config.intermediate_size, config.moe_shared_expert_intermediate_size) == (0, 0)


def test_super() -> None:
    config, _ = load_config(SUPER)
    assert [config.count(kind) for kind in KINDS] == [40, 8, 40, 0]
    assert [i for i, kind in enumerate(config.layers) if kind == "attention"] == [
        7,
        16,
        25,
        36,
        47,
        58,
        69,
        78,
    ]
    assert (config.mtp_modules, config.mtp_layers) == (1, ("attention", "moe"))
    assert (config.mamba_inner, config.conv_channels, config.expert_input) == (8192, 10240, 1024)
    assert (config.time_step_limit, config.time_step_min) == ((0.0, math.inf), 0.001)
    assert (config.n_routed_experts, config.num_experts_per_tok, config.routed_scaling_factor) == (
        512,
        22,
        5.0,
    )


def test_nano() -> None:
    config, _ = load_config(NANO)
    assert [config.count(kind) for kind in KINDS] == [23, 6, 23, 0]
    assert (config.mtp_modules, config.mtp_layers, config.moe_latent_size, config.expert_input) == (
        0,
        (),
        0,
        2688,
    )


# --- the file


def test_the_folder_or_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw(anything=[1, {"b": 2}])))
    assert load_config(tmp_path) == load_config(tmp_path / "config.json")
    assert load_config(tmp_path)[1] == raw(anything=[1, {"b": 2}])  # unused keys are kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON (Expecting value"),
        ('{"a": 1', "cannot be read as JSON ("),
        ("\xff", "cannot be read as JSON ('utf-8' codec"),
        ("[" * 100_000, "cannot be read as JSON (it is nested too deeply"),
        ('{"a":' * 65 + "1" + "}" * 65, "cannot be read as JSON (it is nested too deeply"),
        ('{"a": 1, "a": 2}', "cannot be read as JSON (duplicate key 'a'"),
        ('{"a": "\\ud800"}', "cannot be read as JSON (a string in it has half of a surrogate pair"),
        (" " * (16 << 20) + "{}", "cannot be read as JSON (it has more than 16,777,216 bytes"),
        ("1" * 5000, "cannot be read as JSON (Exceeds the limit"),
        ("[]", "holds a JSON list, expected an object with `model_type: nemotron_h`"),
        ("null", "holds a JSON NoneType, expected an object"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path)
    assert str(error.value).startswith(f"{file} {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hybrid_override_pattern": "M" * 4097},
            "`hybrid_override_pattern` has 4,097 layers; expected at most 4,096",
        ),
        (
            {"hybrid_override_pattern": "M" * 5_000_000},
            "`hybrid_override_pattern` has 5,000,000 layers; expected at most 4,096",
        ),
        (
            {"hybrid_override_pattern": ..., "layers_block_type": ["moe"] * 4097},
            "`layers_block_type` has 4,097 layers; expected at most 4,096",
        ),
        (
            {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*" * 4097},
            "`mtp_hybrid_override_pattern` has 4,097 layers; expected at most 4,096",
        ),
        (
            {"num_nextn_predict_layers": 10**8},
            "`num_nextn_predict_layers` is 100000000; expected an integer of at most 4,096",
        ),
        (
            {"num_nextn_predict_layers": 4000, "mtp_hybrid_override_pattern": "*E"},
            "`num_nextn_predict_layers` is 4,000, of 2 layers each; expected at most 4,096 layers in all",
        ),
        (
            {"n_routed_experts": 10**8},
            "`n_routed_experts` is 100000000; expected an integer of at most 65,536",
        ),
        (
            {"n_routed_experts": 1 << 16, "hybrid_override_pattern": "EEEEE"},
            "its 5 layers would have more than 524,288 tensors (`n_routed_experts` is 65,536); expected that "
            "many at most",
        ),
        (
            {"n_routed_experts": 1 << 12, "hybrid_override_pattern": "E", "num_nextn_predict_layers": 64},
            "its 129 layers would have more than 524,288 tensors",
        ),
        (
            {"hidden_size": 1 << 31},
            "`hidden_size` is 2147483648; expected an integer of at most 2,147,483,647",
        ),
        ({"vocab_size": 10**3000}, "`vocab_size` is 100000000000000000000000000"),
        ({"layer_norm_epsilon": math.inf}, "`layer_norm_epsilon` is inf; expected a finite number"),
        (
            {"eos_token_id": [1 << 31]},
            "`eos_token_id` is [2147483648]; expected a token id or a list of them",
        ),
    ],
)
def test_configs_without_bounds(changes: dict[str, Any], message: str) -> None:
    began = time.process_time()
    refused = refusal(**changes)
    assert refused.startswith(message)
    assert len(refused) < 300
    assert time.process_time() - began < 3, "no table was made"


def test_the_bounds_are_far_above_super() -> None:
    config, _ = load_config(SUPER)
    assert 40 * len(config.layers) < parse.MOST_LAYERS
    assert 100 * config.n_routed_experts < parse.MOST_EXPERTS
    assert 10_000 * config.vocab_size < parse.MOST_SIZE
    assert 12 * len(tensor_table(config)) < parse.MOST_TENSORS


@pytest.mark.parametrize("value", ["x" * 100_000, ["x" * 1000] * 1000, {"a": ["b"] * 1000}, 10**3000])
@pytest.mark.parametrize(
    "key", sorted({*RAW, "num_hidden_layers", "time_step_limit", "eos_token_id", "use_bias"})
)
def test_a_message_cuts_what_the_config_holds(key: str, value: Any) -> None:
    assert len(refusal(**{key: value})) < 500


def test_messages_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw(vocab_size=...)))
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: `vocab_size` is missing")

"""What a checkpoint declares about its quantization, read from either config file, and every refusal."""

import json
import random
import time
from fnmatch import fnmatchcase

import pytest

from nemoquant.errors import CheckpointError
from nemoquant.layouts.modelopt import (
    contradictions,
    declared_algorithm,
    declared_cache,
    declared_quantization,
    module_algorithm,
    unknown_cache,
)

SECTION = {
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4", "group_size": 16}},
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "ignore": ["lm_head"],
}


def legacy(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "hf_quant_config.json").write_text(text, encoding="latin-1")
    return declared_quantization(folder, {})


def test_both_files_say_the_same(tmp_path):
    newer = declared_quantization(tmp_path, {"quantization_config": SECTION})
    assert newer == SECTION
    older = legacy(
        tmp_path,
        {
            "producer": {"name": "modelopt"},
            "quantization": {
                "quant_algo": "MIXED_PRECISION",
                "kv_cache_quant_algo": "FP8",
                "quantized_layers": SECTION["quantized_layers"],
            },
        },
    )
    for declared in (newer, older):
        assert declared_algorithm(declared) == "MIXED_PRECISION"
        assert [module_algorithm(declared, m) for m in "abc"] == ["FP8", "NVFP4", None]
        assert declared_cache(declared).name == "fp8"
        assert unknown_cache(declared) is None


@pytest.mark.parametrize("section", [None, {}])
def test_nothing_is_declared(section, tmp_path):
    assert declared_quantization(tmp_path, {"quantization_config": section}) == {}
    (tmp_path / "config.json").write_text("{}")
    assert declared_quantization(tmp_path / "config.json", {}) == {}


def test_sections_of_other_tools_are_left_to_the_reader(tmp_path):
    section = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "kv_cache_scheme": None,
        "ignore": [],
    }
    assert declared_quantization(tmp_path, {"quantization_config": section}) == section
    section["config_groups"] = {"FP8": ["Linear"]}  # compressed-tensors' preset, by its name
    section["ignore"] = ["re:.*gate", "lm_head"]
    assert declared_quantization(tmp_path, {"quantization_config": section}) == section
    assert contradictions(tmp_path, {"quantization_config": section}, {"lm_head": "source", "a": "fp8"}) == []


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ([], "`the whole` is []: input should be"),
        ("FP8", "`the whole` is 'FP8': input should be"),
        (True, "`the whole` is True: input should be"),
        ({"quant_algo": ["FP8"]}, "`quant_algo` is ['FP8']: input should be a valid string"),
        ({"quant_algo": 8}, "`quant_algo` is 8: input should be a valid string"),
        ({"quantized_layers": "all"}, "`quantized_layers` is 'all': input should be a valid dictionary"),
        ({"quantized_layers": ["a"]}, "`quantized_layers` is ['a']: input should be a valid dictionary"),
        ({"quantized_layers": {"a": "FP8"}}, "`quantized_layers.a` is 'FP8': input should be"),
        ({"quantized_layers": {"a": {"quant_algo": {}}}}, "`quantized_layers.a.quant_algo` is {}: input"),
        ({"kv_cache_scheme": 8}, "`kv_cache_scheme.dict[str,any]` is 8: input should be a valid dictionary"),
    ],
)
def test_declarations_that_cannot_be_read(section, problem, tmp_path):
    with pytest.raises(CheckpointError) as error:
        declared_quantization(tmp_path, {"quantization_config": section})
    assert str(error.value).startswith(
        f"{tmp_path}: `quantization_config` of its config can't be read ({problem}"
    )
    if isinstance(section, dict) and "kv_cache_scheme" not in section:
        with pytest.raises(CheckpointError) as error:
            legacy(tmp_path, {"quantization": section})
        assert f"hf_quant_config.json: `quantization` can't be read ({problem}" in str(error.value)


@pytest.mark.parametrize(
    ("patterns", "wildcards"), [(["*a*", "lm_head"] * 257, 514), (["*" + "a" * 200], 1)], ids=["many", "long"]
)
def test_exclusions_with_too_many_wildcards(patterns, wildcards, tmp_path):
    problem = f"its patterns have {wildcards} wildcards; expected at most 512, and at most 200 characters"
    with pytest.raises(CheckpointError, match=rf"`ignore` is .*: {problem}"):
        declared_quantization(tmp_path, {"quantization_config": {"ignore": patterns}})
    with pytest.raises(CheckpointError, match=rf"`exclude_modules` is .*: {problem}"):
        legacy(tmp_path, {"quantization": {"exclude_modules": patterns}})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "cannot be read (Expecting value"),
        ("\xff", "cannot be read ('utf-8' codec"),
        ("[" * 100_000, "cannot be read (it is nested too deeply"),
        ('{"quantization": {}, "quantization": {}}', "cannot be read (duplicate key 'quantization'"),
        ('{"quantization": {"quant_algo": "\\ud800"}}', "cannot be read (a string in it has half of"),
        ([], ": `quantization` can't be read (`the whole` is None"),
        ({}, ": `quantization` can't be read (`the whole` is None"),
        ({"quantization": {"kv_cache_quant_algo": ["FP8"]}}, "(`kv_cache_quant_algo` is ['FP8']: input"),
    ],
)
def test_older_files_that_cannot_be_read(content, problem, tmp_path):
    """They were taken as none: a quantized checkpoint passed as an unquantized one."""
    with pytest.raises(CheckpointError) as error:
        legacy(tmp_path, content)
    assert problem in str(error.value)


def test_a_long_declaration_is_cut_in_messages():
    assert len(unknown_cache({"kv_cache_scheme": {"type": "x" * 100_000}})) == 200


def test_exclusions_are_matched_as_one_by_one(tmp_path):
    """Random names and patterns, against the rule written plainly."""
    drawn, count = random.Random(1), 0
    for _ in range(2000):
        modules = {"".join(drawn.choices("aab.b.[*", k=drawn.randrange(8))): "fp8" for _ in range(5)}
        patterns = ["".join(drawn.choices("ab.*?[]!-", k=drawn.randrange(6))) for _ in range(4)]
        excluded = [
            module
            for module in modules
            if any(module == p or module.startswith(f"{p}.") or fnmatchcase(module, p) for p in patterns)
        ]
        found = contradictions(tmp_path, {"quantization_config": {"ignore": patterns}}, modules)
        text = "config.json excludes in `ignore` modules that are quantized: "
        assert found == ([text + ", ".join(excluded)] if excluded else [])
        count += len(excluded)
    assert count > 500


@pytest.mark.parametrize(
    "patterns",
    [[f"backbone.layers.{i}.mixer.conv1d" for i in range(40_000)], [f"*e{i}*" for i in range(16)]],
    ids=["names", "patterns"],
)
def test_many_exclusions_of_many_modules_take_no_time(patterns, tmp_path):
    """41,000 modules with 160 exclusions, as Super has, took 26 s."""
    modules = {f"backbone.layers.{i % 88}.mixer.experts.{i}.up_proj": "fp8" for i in range(40_000)}
    began = time.process_time()
    assert contradictions(tmp_path, {"quantization_config": {"ignore": patterns}}, modules) == []
    assert time.process_time() - began < 5

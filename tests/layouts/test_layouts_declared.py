"""What a checkpoint declares about its quantization, read from either config file, and every refusal."""

import json

import pytest

from nemoquant.errors import CheckpointError
from nemoquant.layouts.modelopt import (
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

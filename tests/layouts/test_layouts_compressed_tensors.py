"""The compressed-tensors layout: folders made by the package's own compressors, read by us."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import refusal
from support.files import edit_json
from support.oracle_tensors import read as tensors_of
from support.pack_oracle import format_of
from support.synthetic import CONFIG

import nemoquant
from nemoquant.errors import CheckpointError
from nemoquant.layouts import compressed_tensors as ct
from nemoquant.layouts.modelopt import SECTION
from nemoquant.quantized.checkpoint import PackedCheckpoint, PackedWeights

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="needs compressed-tensors (extra: dev)"
)
Make = Callable[..., Path]
ALGORITHMS = {"FP8": "FP8", "NVFP4": "NVFP4", "NVFP4A16": "W4A16_NVFP4", "MXFP8": "MXFP8"}
MODULE = "backbone.layers.0.mixer.in_proj"


@pytest.fixture
def theirs(fitting: Make, tmp_path: Path) -> Callable[..., Path]:
    """A folder in one of the package's preset schemes, with changes of its config's section."""

    def make(scheme: str, **changes: Any) -> Path:
        from support.ct_folder import ct_folder

        return ct_folder(fitting("mxfp8"), tmp_path / scheme, scheme, **changes)

    return make


@needs_package
@pytest.mark.parametrize("scheme", ALGORITHMS)
def test_what_the_package_wrote(theirs: Make, scheme: str) -> None:
    """Weights decode to what the package decodes, inputs have its scales; inspect and verify tell it."""
    from support.ct_folder import INPUT, decompressed

    folder = theirs(scheme)
    file = tensors_of(folder)
    opened = PackedCheckpoint(folder)
    with opened.checkpoint:
        quantized = [name for name, stored in opened.stored.items() if stored.format != "source"]
        assert len(quantized) == 46
        for name in quantized:
            module = name.removesuffix("weight")
            parts = {key.removeprefix(module): t for key, t in file.items() if key.startswith(module)}
            expected = decompressed({k: t for k, t in parts.items() if "input" not in k}, scheme).float()
            weight = PackedWeights(opened, "").packed(opened.stored[name])
            found = np.empty(weight.shape, np.float32)
            weight.decode(found)
            # the package computes FP8 and MXFP8 in bf16, and divides by a global scale where we multiply
            assert torch.allclose(torch.from_numpy(found), expected, rtol=2**-8, atol=0), name
        assert {scale for _, scale in opened.inputs.values()} == (
            {"FP8": {INPUT}, "NVFP4": {INPUT}, "MXFP8": {1}}.get(scheme, set())
        )
        assert opened.cache is None and opened.warnings == []
    facts = nemoquant.inspect(folder)
    assert facts["quantization"] == f"compressed-tensors: {ALGORITHMS[scheme]}"
    assert facts["weights"] == {"BF16": 50, ALGORITHMS[scheme].removeprefix("W4A16_"): 46}
    report = nemoquant.verify(folder, progress=False)
    assert report["ok"] and report["checked"]["decoded"] == 46
    assert report["warnings"] == [
        "it has no nemoquant.json, another tool wrote it: no hash of a file and no plan could be checked"
    ]


@needs_package
@pytest.mark.parametrize("scheme", ["FP8", "NVFP4"])
def test_they_are_decoded_to_bf16(theirs: Make, tmp_path: Path, scheme: str) -> None:
    made = nemoquant.convert(theirs(scheme), tmp_path / "bf16", "bf16", progress=False)
    assert made.layout == "compressed-tensors" and sum(made.decoded.values()) == 46
    assert nemoquant.plan(made.out, "fp8").quantized


@needs_package
@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("FP8_DYNAMIC", "weights float8 by channel, inputs float8 by token at run time"),
        ("FP8_BLOCK", "weights float8 by block, inputs float8 by group of 128 at run time"),
        ("W4A16", "weights int4 by group of 128, inputs not quantized"),
        ("W4A16_ASYM", "weights int4 by group of 128 asymmetric, inputs not quantized"),
        ("W8A8", "weights int8 by channel, inputs int8 by token at run time"),
        ("MXFP4", "weights float4 by group of 32, inputs float4 by group of 32 at run time"),
        ("MXFP8A16", "weights float8 by group of 32, inputs not quantized"),
    ],
)
def test_schemes_that_are_refused(source: Path, tmp_path: Path, scheme: str, words: str) -> None:
    """In one line that names the scheme; inspect says it too, and does not call it unquantized."""
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    group = json.loads(preset_name_to_scheme(scheme, ["Linear"]).model_dump_json())
    section = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": []}
    edit_json(source / "config.json", lambda data: data.update({SECTION: section}))
    assert nemoquant.inspect(source)["quantization"] == f"compressed-tensors: {words}"
    parts = [f"'group_0' of its compressed-tensors config is {words}; expected FP8 per tensor"]
    refusal("verify", source, parts=parts)
    refusal("convert", source, tmp_path / "new", "--to", "bf16", parts=parts)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "fp8"])
def test_other_methods(source: Path, method: str) -> None:
    edit_json(source / "config.json", lambda data: data.update({SECTION: {"quant_method": method}}))
    assert nemoquant.inspect(source)["quantization"] == f"{method} (not read here)"
    assert f"quantized by the method '{method}'; expected modelopt or" in refusal("verify", source)


def scheme(*targets: str) -> dict[str, Any]:
    numbers = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    return {"targets": list(targets), "weights": numbers, "input_activations": numbers}


def listed(tmp_path: Path, groups: dict[str, Any], ignore: list[str], modules: list[str]) -> list[str]:
    raw = {SECTION: {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ignore}}
    return list(ct.declared_quantization(tmp_path, raw, modules)["quantized_layers"])


def test_targets_are_resolved_as_the_package_does(tmp_path: Path) -> None:
    """Names, expressions from the beginning of a name, and the class of projections; both spellings."""
    modules = [f"backbone.layers.{i}.mixer.{name}" for i in (1, 10) for name in ("q_proj", "o_proj")]
    first, *_ = modules
    for targets, ignore, expected in (
        (["Linear"], [], modules),
        (["Linear"], ["Linear"], []),
        (["Linear"], [r"re:.*layers\.1\."], modules[2:]),
        ([first], [], [first]),
        (["model.layers.1.mixer.q_proj"], [], [first]),
        ([r"re:model\.layers\.1\..*"], [], modules[:2]),
        ([r"re:.*q_proj$"], ["re:^backbone.layers.10"], [first]),
        (["re:q_proj"], [], []),
        (["Conv1d"], [], []),
    ):
        assert listed(tmp_path, {"g": scheme(*targets)}, ignore, modules) == expected, (targets, ignore)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|aa)(a|aa)(a|aa)", "a?a?a?a?", ".*.*.*x", "(?=x)", r"(a)\1", "x" * 201, "a{1,9}{1,9}", "("],
)
def test_expressions_that_could_take_for_ever(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"ignore.*is not plain; expected at most 200|no regular expression"
    ):
        listed(tmp_path, {"g": scheme("Linear")}, [f"re:{pattern}"], [])


def test_too_many_expressions(tmp_path: Path) -> None:
    many = {f"g{i}": scheme(*(f"re:a{i}{j}" for j in range(40))) for i in range(2)}
    with pytest.raises(CheckpointError, match="has 80 regular expressions; expected at most 64"):
        listed(tmp_path, many, [], [])


@needs_package
def test_a_quantized_cache(theirs: Make, tmp_path: Path) -> None:
    """Its scales stand in the mixer; one that is not static and of a whole tensor is refused."""
    from safetensors.torch import save_file

    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    folder = theirs("FP8", kv_cache_scheme=cache)
    mixer = "backbone.layers.1.mixer"
    scales = {
        f"{mixer}.{name}": torch.tensor([0.25], dtype=torch.bfloat16) for name in ("k_scale", "v_scale")
    }
    save_file(tensors_of(folder) | scales, folder / "model.safetensors")
    opened = PackedCheckpoint(folder)
    with opened.checkpoint:
        assert opened.inputs[f"{mixer}.v_proj.output"] == ("fp8", 0.25) and opened.warnings == []
    assert nemoquant.inspect(folder)["kv_cache"]["bytes_per_token"] == 2 * 2 * 16
    made = nemoquant.convert(folder, tmp_path / "bf16", "bf16", progress=False)
    assert any(note.startswith("The KV cache is bf16") for note in made.notes)
    assert not set(tensors_of(made.out)) & set(scales)
    edit_json(
        folder / "config.json", lambda data: data[SECTION].update(kv_cache_scheme=cache | {"dynamic": True})
    )
    assert "its KV cache has scales by 'tensor', found at run time" in refusal("verify", folder)


@needs_package
def test_what_it_lacks_is_said(theirs: Make) -> None:
    """A config that ignores what is quantized, parts that are missing, scales that are no numbers."""
    from safetensors.torch import save_file

    folder = theirs("FP8", ignore=["re:.*in_proj$"])
    (problem,) = nemoquant.verify(folder, progress=False)["problems"]
    assert "config.json targets no such module, or ignores it, and it is quantized: " + MODULE in problem
    tensors = tensors_of(folder)
    edit_json(folder / "config.json", lambda data: data[SECTION].update(ignore=[]))
    broken = {k: v for k, v in tensors.items() if k != f"{MODULE}.weight_scale"}
    save_file(broken, folder / "model.safetensors")
    assert f"{MODULE}.weight is F8_E4M3" in nemoquant.verify(folder, progress=False)["problems"][0]
    save_file(tensors | {f"{MODULE}.weight_scale": torch.tensor([0.0])}, folder / "model.safetensors")
    assert "expected a positive finite scale" in nemoquant.verify(folder, progress=False)["problems"][0]
    save_file(tensors | {f"{MODULE}.weight_scale": torch.ones(2)}, folder / "model.safetensors")
    (problem,) = nemoquant.verify(folder, progress=False)["problems"]
    assert f"{MODULE}.weight_scale is F32 [2], expected BF16 or F16 or F32 [1]" in problem


@needs_package
@pytest.mark.parametrize("scheme", ["FP8", "NVFP4"])
def test_what_we_write_the_package_reads(quantized: Make, scheme: str) -> None:
    """Its own config class takes our section, and its own matching comes to the same modules."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    format = {"FP8": "fp8", "NVFP4": "nvfp4"}[scheme]
    stored = tensors_of(quantized("fp8"))
    modules = [name.removesuffix(".weight") for name in stored if name.endswith(".weight")]
    ours = [module for module in modules if format_of("fp8", f"{module}.weight")]
    plain = [m for m in modules if m not in ours and "norm" not in m and "embeddings" not in m]
    config = QuantizationConfig.model_validate(ct.section(ours, [], plain, format))  # type: ignore[arg-type]
    group = config.config_groups["group_0"]
    for module in (*ours, *plain):
        name = module.replace("backbone.", "model.")
        meant = any(match_name(name, target) for target in group.targets)
        ignored = any(match_name(name, pattern) for pattern in config.ignore)
        assert (meant and not ignored) == (module in ours), module
    assert len(ours) == 46 and CONFIG["num_hidden_layers"] == 6

"""Every byte of the output against the second implementation in pack_oracle.py, for every preset."""

import json
import re

import numpy as np
import pytest
import torch
from support import oracle_tensors, pack_oracle
from support.commands import nemoquant
from support.pack_oracle import PRESETS, read, scales_of

from nemoquant.pack import write

EXPERTS = 12  # numerically 9 < 10, as text it is not


def differences(found, expected):
    """Names that are missing, extra, or differ in dtype, shape or bytes; empty if the outputs are equal."""
    got = {name: (t.dtype, t.shape, t.data) for name, t in found.items()}
    return sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))


@pytest.mark.parametrize("preset", PRESETS)
def test_bytes_by_the_command_line(preset, fitting, token_rows, tmp_path):
    source, out = fitting(preset, n_routed_experts=EXPERTS), tmp_path / "out"
    options = ("--recipe", preset, "--method", "max", "--calib", token_rows, "--threads", 1)
    nemoquant("quantize", source, out, *options)
    found = read(out)
    assert differences(found, pack_oracle.expected(source, preset, scales_of(out))) == []
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: t.file for name, t in found.items()}
    assert index["metadata"]["total_size"] == sum(len(t.data) for t in found.values())
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("preset", PRESETS)
def test_bytes_by_the_api_without_scale_groups(preset, fitting, quantized):
    source, out = fitting(preset), quantized(preset, scale_groups=False)
    assert differences(read(out), pack_oracle.expected(source, preset, scales_of(out), groups=False)) == []


def test_a_group_is_measured_once_for_all_its_members(quantized, monkeypatch):
    measured, measure = [], write.measure

    def counted(checkpoint, row, part, fold):
        measured.append((row.name, part.start))
        return measure(checkpoint, row, part, fold)

    monkeypatch.setattr(write, "measure", counted)
    quantized("nvfp4")
    assert len(measured) == len(set(measured))
    assert {f"backbone.layers.1.mixer.{p}_proj.weight" for p in "qkv"} <= {name for name, _ in measured}


def test_groups_share_their_scales_and_only_they_do(quantized):
    grouped, apart = read(quantized("nvfp4")), read(quantized("nvfp4", "apart", scale_groups=False))

    def values(tensors, pattern):
        return [t.tensor().item() for name, t in tensors.items() if re.fullmatch(pattern, name)]

    qkv = r"backbone\.layers\.1\.mixer\.[qkv]_proj\.weight_scale"
    assert len(set(values(grouped, qkv))) == 1
    assert len(set(values(apart, qkv))) == 3
    assert max(values(apart, qkv)) == values(grouped, qkv)[0]
    # a shared FP8 scale changes the codes of the two smaller weights
    changed = [
        p for p in "qkv" if grouped[n := f"backbone.layers.1.mixer.{p}_proj.weight"].data != apart[n].data
    ]
    assert len(changed) == 2
    for layer in (2, 5):
        for projection in ("up", "down"):
            inputs = rf"backbone\.layers\.{layer}\.mixer\.experts\.\d+\.{projection}_proj\.input_scale"
            assert len(values(grouped, inputs)) == 8
            assert len(set(values(grouped, inputs))) == 1
            assert len(set(values(apart, inputs))) > 1
            assert max(values(apart, inputs)) == values(grouped, inputs)[0]
            weights = rf"backbone\.layers\.{layer}\.mixer\.experts\.\d+\.{projection}_proj\.weight_scale_2"
            assert values(grouped, weights) == values(apart, weights), (
                "each expert has its own weight scale either way"
            )
            assert len(set(values(grouped, weights))) > 1
    for name in ("mixer.in_proj", "mixer.out_proj"):
        assert grouped[f"backbone.layers.0.{name}.weight"] == apart[f"backbone.layers.0.{name}.weight"]


def test_safetensors_loads_it_and_it_decodes_near_the_source(source, quantized):
    """Read by an independent implementation, the safetensors library.

    SQNR floors: 4-bit codes with a scale for each 16 values give about 20 dB for normal weights, FP8 about 31
    dB; half a bit (3 dB) of slack.
    """
    loaded, original = oracle_tensors.read(quantized("nvfp4")), oracle_tensors.read(source)
    quantized_weights = 0
    for name, weight in original.items():
        module = name.removesuffix(".weight")
        if loaded[name].dtype == torch.uint8:
            scales = loaded[f"{module}.weight_scale"], loaded[f"{module}.weight_scale_2"]
            assert oracle_tensors.sqnr(weight, pack_oracle.decode_nvfp4(loaded[name], *scales)) > 17
        elif loaded[name].dtype == torch.float8_e4m3fn:
            assert oracle_tensors.sqnr(weight, loaded[name].float() * loaded[f"{module}.weight_scale"]) > 28
        else:
            assert loaded[name].dtype == weight.dtype
            assert torch.equal(loaded[name], weight)
            continue
        quantized_weights += 1
    assert (
        quantized_weights == 2 * 8 * 2 + 2 * 2 + 2 + 4 + 2 * 2
    )  # experts, shared, MLP, attention, two Mamba layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["F32", "F16"])
@pytest.mark.parametrize("preset", ["fp8", "nvfp4-full"])
def test_sources_of_other_dtypes(dtype, preset, make_checkpoint, quantized):
    def convert(tensors):
        g = torch.Generator().manual_seed(1)
        for name, t in tensors.items():  # values that bf16 cannot hold
            tensors[name] = (t.float() * (1 + 1e-3 * torch.rand(t.shape, generator=g))).to(dtype)

    source = make_checkpoint("other", convert)
    out = quantized(preset, of=source)
    found = read(out)
    assert differences(found, pack_oracle.expected(source, preset, scales_of(out))) == []
    assert found["lm_head.weight"].dtype == {torch.float32: "F32", torch.float16: "F16"}[dtype]


@pytest.mark.parametrize(
    ("method", "largest"), [("mse", 6 * 448), ("four_over_six", 6 * 256)], ids=["mse", "four_over_six"]
)  # tests/formats tests their block scales
def test_other_scale_methods_reach_the_file(method, largest, source, quantized, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: r\nsummary: s\nrules:\n- "
        f"{{roles: [experts.*, mlp.*], format: nvfp4, scales: {method}, activations: none}}\n"
        "- {roles: ['*'], format: source}\n"
    )
    before, after, plain = read(source), read(quantized(str(recipe))), read(quantized("nvfp4-w4a16", "plain"))
    errors = {}
    for kind, tensors in (("method", after), ("plain", plain)):
        errors[kind] = 0.0
        for name, stored in before.items():
            if pack_oracle.format_of("nvfp4-w4a16", name):
                module = name.removesuffix(".weight")
                scale = tensors[f"{module}.weight_scale_2"].tensor()
                decoded = pack_oracle.decode_nvfp4(
                    tensors[name].tensor(), tensors[f"{module}.weight_scale"].tensor(), scale
                )
                errors[kind] += float((stored.tensor().double() - decoded).square().sum())
                if kind == "method":
                    assert scale.item() == np.float32(stored.tensor().float().abs().max()) / np.float32(
                        largest
                    )
    assert errors["method"] < errors["plain"]

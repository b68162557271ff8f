"""Weights and inputs that are zero or nearly zero."""

import json

import numpy as np
import pytest
import torch
from support import pack_oracle
from support.pack_oracle import read, scales_of
from support.synthetic import WIDE

from nemoquant.api import RunOptions, quantize
from nemoquant.errors import WeightError

ZERO = {  # one of each kind
    "fp8": ["backbone.layers.0.mixer.in_proj", "backbone.layers.2.mixer.shared_experts.down_proj"],
    "nvfp4": ["backbone.layers.2.mixer.experts.3.up_proj", "backbone.layers.5.mixer.experts.7.down_proj"],
}
# The largest magnitude whose scale is no longer a normal fp32 number: below 448 * 2^-126 or 2688 * 2^-126.
TINY = {"fp8": 447 * 2.0**-126, "nvfp4": 2687 * 2.0**-126, "zero": 0.0}


def run(source, token_rows, tmp_path, preset="nvfp4", name="out"):
    return quantize(
        source, tmp_path / name, preset, RunOptions(method="max", data=token_rows, dtype="float32", threads=1)
    )


@pytest.mark.parametrize("kind", ["zero", "tiny", "negative tiny"])
def test_weights_without_magnitude(kind, make_checkpoint, token_rows, tmp_path):
    def edit(tensors):
        for form, modules in ZERO.items():
            for module in modules:
                weight = tensors[f"{module}.weight"]
                value = 0.0 if kind == "zero" else TINY[form] * (0.99 if kind == "tiny" else -0.99)
                tensors[f"{module}.weight"] = torch.full_like(weight, value)
                assert kind == "zero" or (tensors[f"{module}.weight"] != 0).all()

    result = run(make_checkpoint("degenerate", edit), token_rows, tmp_path)
    tensors = read(result.out)
    for form, modules in ZERO.items():
        for module in modules:
            assert not any(tensors[f"{module}.weight"].data), "codes 0, no sign"
            if form == "fp8":
                assert tensors[f"{module}.weight_scale"].tensor().item() == 1.0
            else:
                assert tensors[f"{module}.weight_scale_2"].tensor().item() == 1.0
                assert set(tensors[f"{module}.weight_scale"].data) == {0x38}
    everything = [m for modules in ZERO.values() for m in modules]
    (warning,) = [w for w in result.warnings if "weights are zero or underflow" in w]
    assert warning.startswith(
        "4 weights are zero or underflow; codes set to 0, scales to 1.0 where no group gives one: "
    )
    assert all(module in warning for module in everything)
    assert warning in json.loads((result.out / "nemoquant.json").read_text())["warnings"]
    assert warning in (result.out / "README.md").read_text()


def test_just_above_underflow_is_an_ordinary_weight(make_checkpoint, token_rows, tmp_path):
    name = "backbone.layers.0.mixer.in_proj.weight"
    source = make_checkpoint(
        "small", lambda tensors: tensors.update({name: torch.full_like(tensors[name], 448 * 2.0**-126)})
    )
    result = run(source, token_rows, tmp_path, "fp8")
    tensors = read(result.out)
    assert set(tensors[name].data) == {0x7E}
    assert tensors[f"{name}_scale"].tensor().item() == 2.0**-126
    assert not any("underflow" in w for w in result.warnings)


@pytest.mark.parametrize("preset", ["fp8", "nvfp4-full"])
def test_a_zero_weight_in_a_group_takes_the_groups_scale(preset, make_checkpoint, token_rows, tmp_path):
    source = make_checkpoint("q", lambda tensors: tensors["backbone.layers.1.mixer.q_proj.weight"].zero_())
    out = run(source, token_rows, tmp_path, preset).out
    found = {name: (t.dtype, t.shape, t.data) for name, t in read(out).items()}
    assert found == pack_oracle.expected(source, preset, scales_of(out))
    suffix = "weight_scale" if preset == "fp8" else "weight_scale_2"
    scales = {found[f"backbone.layers.1.mixer.{p}_proj.{suffix}"][2] for p in "qkv"}
    assert len(scales) == 1
    assert scales != {np.float32(1).tobytes()}


@pytest.mark.parametrize("preset", ["fp8", "nvfp4-full"])
def test_zero_inputs(preset, make_checkpoint, token_rows, tmp_path):
    """A norm of zeros: the inputs of layers 1 (attention) and 3 (MLP) are zero."""

    def edit(tensors):
        for layer in (1, 3):
            tensors[f"backbone.layers.{layer}.norm.weight"].zero_()

    result = run(make_checkpoint("mute", edit), token_rows, tmp_path, preset)
    tensors = read(result.out)
    zero = [f"backbone.layers.1.mixer.{p}_proj" for p in "qkvo"] + [
        f"backbone.layers.3.mixer.{p}_proj" for p in ("up", "down")
    ]
    for module in zero:
        assert tensors[f"{module}.input_scale"].tensor().item() == 1.0
    for p in "kv":
        assert tensors[f"backbone.layers.1.mixer.{p}_proj.{p}_scale"].tensor().item() == 1.0
    told = [w.split(":")[0] for w in result.warnings if "was zero in all calibration rows" in w]
    attention = [f"backbone.layers.1.mixer.{p}_proj" for p in ("qkv", "o", "k", "v")]
    assert sorted(told) == sorted([*attention, *zero[4:]])
    assert tensors["backbone.layers.2.mixer.shared_experts.up_proj.input_scale"].tensor().item() != 1.0


def test_a_weight_that_the_format_would_decode_to_inf_is_refused(make_checkpoint, tmp_path):
    """A finite float32 number that MXFP8 rounds up to 2^128."""
    name = "backbone.layers.2.mixer.experts.3.up_proj.weight"

    def edit(tensors):
        for key in tensors:
            tensors[key] = tensors[key].float()
        tensors[name][1, 2] = 3.4e38

    source = make_checkpoint("huge", edit, **WIDE)
    words = rf"{name} has 3.4e\+38, which MXFP8 can't hold; expected at most 3.296"
    with pytest.raises(WeightError, match=words):
        quantize(source, tmp_path / "out", "mxfp8", threads=1)
    assert not list(tmp_path.glob("out*"))


def test_zero_weights_of_a_format_without_a_scale_of_the_tensor(make_checkpoint, tmp_path):
    module = "backbone.layers.2.mixer.experts.3.up_proj"
    source = make_checkpoint("zero", lambda tensors: tensors[f"{module}.weight"].zero_(), **WIDE)
    result = quantize(source, tmp_path / "out", "mxfp8", threads=1)
    assert f"1 weights are zero; codes and block scales set to 0: {module}" in result.warnings
    tensors = read(result.out)
    assert not any(tensors[f"{module}.weight"].data) and not any(tensors[f"{module}.weight_scale"].data)

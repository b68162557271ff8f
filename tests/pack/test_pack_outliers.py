"""Weights whose scale a single huge value decides: counted, and told wherever a user looks."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.commands import nemoquant
from support.places import DEMO
from support.stops import stopped_after

from nemoquant.api import RunOptions, quantize
from nemoquant.errors import Interrupted
from nemoquant.formats import FORMATS
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.pack.outliers import TOO_MUCH, Lost, lost_to_scale, lost_warnings
from nemoquant.sources.source import open_source

METHODS = [(name, method) for name, number in FORMATS.items() for method in number.methods]
MAMBA, EXPERT = "backbone.layers.0.mixer.in_proj", "backbone.layers.5.mixer.experts.3.up_proj"


def bf16(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encoded(weight: np.ndarray, format: str, method: str):
    arithmetic = ARITHMETIC[format]
    scale, _ = arithmetic.decode_scale(np.abs(floats(weight)).max(), method)
    return arithmetic.encode(weight, scale, method), scale


def normal(times: float) -> np.ndarray:
    """A weight in which one value is ``times`` the largest of the others; 0 leaves it out."""
    weight = np.random.default_rng(0).standard_normal((128, 512)).astype(np.float32) * 0.03
    weight[5, :64] = 0
    if times:
        weight[3, 7] = np.abs(weight).max() * times
    return bf16(weight)


@pytest.mark.parametrize(("format", "method"), METHODS)
@pytest.mark.parametrize("times", [0, 1e3, 3e4, 1e5, 1e6])
def test_what_is_counted(format, method, times):
    """Against the decoded values and the block scales, one by one."""
    weight = normal(times)
    codes, scale = encoded(weight, format, method)
    found = lost_to_scale(format, lambda: weight, codes, scale)
    flushed = int(((floats(weight) != 0) & (ARITHMETIC[format].decode(codes, scale) == 0)).sum())
    floored = int((codes.block_scales == 1).sum()) if format == "nvfp4" else 0
    assert found.floored == floored
    assert found.blocks == (0 if codes.block_scales is None else codes.block_scales.size)
    if found.flushed or found.too_much(format):
        assert (found.flushed, found.values) == (flushed, np.count_nonzero(floats(weight)))
    else:
        assert (floored, found.values) == (0, weight.size)
        assert format == "nvfp4" or flushed < weight.size / 50
    harmed = {"fp8": times >= 3e4, "mxfp8": False, "nvfp4": times >= 1e5}
    assert found.too_much(format) == harmed[format]


def test_zeros_of_the_source_are_not_lost():
    """A pruned weight has zeros, and its blocks of zeros have the scale 1.0."""
    weight = normal(0)
    weight[:, ::2] = 0
    weight[:64] = 0
    for format, method in METHODS:
        codes, scale = encoded(weight, format, method)
        found = lost_to_scale(format, lambda: weight, codes, scale)
        assert not found.too_much(format)
        assert (found.floored, found.flushed) == (0, 0) or format != "nvfp4"


def test_a_weight_is_made_only_where_values_are_compared():
    """A fold's product takes long."""
    weight = normal(0)
    for format, method in METHODS:
        codes, scale = encoded(weight, format, method)
        found = lost_to_scale(format, lambda: pytest.fail("it is made"), codes, scale)
        assert (found.flushed, found.values) == (0, weight.size), format


def test_counts_add_up():
    whole = Lost(1, 10, 3, 160) + Lost() + Lost(2, 10, 4, 160)
    assert whole == Lost(3, 20, 7, 320)
    assert (
        whole.words()
        == "15.0% of its block scales are the smallest there is, 2.2% of its nonzero values became zero"
    )
    assert Lost(0, 0, 1, 4).words() == "25.0% of its nonzero values became zero"


def test_the_share_is_of_what_was_not_zero():
    """A pruned weight: of the 4% of its values that there are, nearly all are lost."""
    weight = normal(1e6)
    weight[:, np.arange(weight.shape[1]) % 25 != 7] = 0
    codes, scale = encoded(weight, "fp8", "max")
    found = lost_to_scale("fp8", lambda: weight, codes, scale)
    assert found.flushed < TOO_MUCH * weight.size
    assert found.too_much("fp8")


def test_no_format_is_recommended_in_its_own_place():
    found = {"a": Lost(0, 4, 1, 2), "b": Lost(0, 0, 1, 4)}
    assert lost_warnings(found, {"a": "mxfp8", "b": "fp8"}) == [
        "1 weights lost small values to a scale that a few very large ones decide: b (25.0% of its nonzero "
        "values became zero); are the large values right? Else `format: mxfp8`, which has no scale of the "
        "whole tensor, or `format: source` keeps the small ones",
        "1 weights lost small values to scales of their blocks, which a few very large ones decide: a (50.0% "
        "of its nonzero values became zero); are the large values right? Else `format: source` keeps the "
        "small ones",
    ]


def test_honest_weights_are_far_from_the_limit():
    """The trained model, with every format and method: a fortieth of what is told, at most."""
    checkpoint = open_source(DEMO).checkpoint
    assert checkpoint is not None
    count = 0
    for name, info in checkpoint.tensors.items():
        if len(info.shape) != 2 or info.shape[1] % 32:
            continue
        weight = np.ascontiguousarray(checkpoint.array(name))
        count += 1
        for format, method in METHODS:
            codes, scale = encoded(weight, format, method)
            found = lost_to_scale(format, lambda weight=weight: weight, codes, scale)
            assert found.floored == 0, name
            assert format == "nvfp4" or found.flushed < TOO_MUCH / 40 * found.values, name
    assert count > 100


@pytest.fixture
def outliers(make_checkpoint):
    """A source with a huge value in a projection that has FP8 in nvfp4's preset, and in an expert."""

    def edit(tensors):
        for module in (MAMBA, EXPERT):
            weight = tensors[f"{module}.weight"]
            weight[0, 0] = weight.abs().max() * 1e6
            if module == MAMBA:  # pruned: what is lost is more than 5% of what there is alone
                weight[:, torch.arange(weight.shape[1]) % 25 != 0] = 0

    return make_checkpoint("outliers", edit)


SAYS = (
    r"2 weights lost small values to a scale that a few very large ones decide: "
    r"backbone\.layers\.0\.mixer\.in_proj \((?:99|100)\.\d% of its nonzero values became zero\), "
    r"backbone\.layers\.5\.mixer\.experts\.3\.up_proj \((?:99|100)\.\d% of its block scales are the smallest "
    r"there is, \d\d\.\d% of its nonzero values became zero\); are the large values right\? Else "
    r"`format: mxfp8`, which has no scale of the whole tensor, or `format: source` keeps the small ones"
)


def test_it_is_told_everywhere(outliers, token_rows, tmp_path):
    out = tmp_path / "out"
    said = nemoquant(
        "quantize", outliers, out, "--fmt", "nvfp4", "--method", "max", "--calib", token_rows
    ).stderr
    (warning,) = [line for line in said.splitlines() if "lost small values" in line]
    assert re.fullmatch("warning: " + SAYS, warning)
    text = warning.removeprefix("warning: ")
    assert text in json.loads((out / "nemoquant.json").read_text())["warnings"]
    assert text.replace("`", "\\`") in (out / "README.md").read_text()
    diff = ("diff", outliers, out, "--data", token_rows, "--no-card")
    report = json.loads(nemoquant(*diff, "--json", "-").stdout)
    assert text in report["candidates"][0]["warnings"], "measured again, from the shards"
    assert "lost small values" in nemoquant(*diff).stdout


@pytest.mark.parametrize("preset", ["mxfp8", "nvfp4", "fp8"])
def test_nothing_is_told_of_honest_weights(preset, quantized, fitting, compare):
    out = quantized(preset)
    assert "lost small values" not in (out / "nemoquant.json").read_text()
    report = compare(fitting(preset), out)
    assert not any("lost small" in w for w in report.candidates[0].warnings)


def test_it_is_remembered(outliers, token_rows, tmp_path, monkeypatch):
    """A resumed run tells what the shards of the interrupted one lost."""
    options = RunOptions(method="max", data=token_rows, dtype="float32", threads=1, shard_bytes=30_000)
    whole = quantize(outliers, tmp_path / "whole", "nvfp4", options)
    assert re.fullmatch(SAYS, whole.warnings[-1])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopped_after(3, patch)
        quantize(outliers, tmp_path / "out", "nvfp4", options)
    resumed = quantize(outliers, tmp_path / "out", "nvfp4", replace(options, resume=True))
    assert resumed.warnings == whole.warnings

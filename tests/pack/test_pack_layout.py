"""Positions of bytes: order inside a shard, shards' limits, page alignment, `[E, out, in]` as one range."""

import json
import re

import pytest
import torch
from support import pack_oracle
from support.pack_oracle import read

EXPERTS = 12  # as text, 10 would come before 9
EXPERT = re.compile(r"(.+\.mixer\.experts)\.\d+\.(\w+)\.\w+")
PART = re.compile(r"\.(weight|weight_scale|weight_scale_2|input_scale|k_scale|v_scale)$")


@pytest.fixture
def twelve(make_checkpoint):
    return make_checkpoint("twelve", n_routed_experts=EXPERTS)


def units(tensors):
    """Names in the order of their bytes -> the units that must stay together: (kind, names)."""
    result = []
    for name in tensors:
        expert = EXPERT.fullmatch(name)
        key = (expert[1], expert[2]) if expert else PART.sub("", name)
        if not result or result[-1][0] != key:
            result.append((key, []))
        result[-1][1].append(name)
    return result


@pytest.mark.parametrize("shard_bytes", [1, 30_000, 5_000_000_000], ids=["tiny", "several", "one"])
@pytest.mark.parametrize("preset", ["nvfp4", "fp8", "nvfp4-w4a16"])
def test_experts_lie_back_to_back_in_numeric_order(preset, shard_bytes, twelve, quantized):
    tensors = read(quantized(preset, of=twelve, shard_bytes=shard_bytes))
    kinds = {
        "nvfp4": ["weight", "weight_scale", "weight_scale_2", "input_scale"],
        "fp8": ["weight", "weight_scale", "input_scale"],
        "nvfp4-w4a16": ["weight", "weight_scale", "weight_scale_2"],
    }[preset]
    found = [
        (key, names)
        for key, names in units(tensors)
        if isinstance(key, tuple) and key[0].startswith("backbone.")
    ]
    assert [key for key, _ in found] == [
        (f"backbone.layers.{layer}.mixer.experts", projection)
        for layer in (2, 5)
        for projection in ("up_proj", "down_proj")
    ]
    for (experts, projection), names in found:
        assert names == [f"{experts}.{e}.{projection}.{kind}" for kind in kinds for e in range(EXPERTS)]
        at = tensors[names[0]].start
        for name in names:
            assert tensors[name].start == at, f"{name}: a hole before it"
            at += len(tensors[name].data)


def test_all_experts_are_one_range_of_bytes(twelve, quantized):
    out = quantized("nvfp4", of=twelve)
    tensors = read(out)
    first = tensors["backbone.layers.2.mixer.experts.0.up_proj.weight"]
    rows, columns = first.shape
    raw = (out / first.file).read_bytes()[first.start :][: EXPERTS * rows * columns]
    stacked = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(EXPERTS, rows, columns)
    for e in range(EXPERTS):
        assert torch.equal(
            stacked[e], tensors[f"backbone.layers.2.mixer.experts.{e}.up_proj.weight"].tensor()
        )


@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4-w4a16"])
def test_a_unit_is_in_one_shard_whatever_the_limit(preset, twelve, quantized):
    whole, split = (
        read(quantized(preset, of=twelve)),
        quantized(preset, "split", of=twelve, shard_bytes=20_000),
    )
    files = sorted(split.glob("*.safetensors"))
    assert len(files) > 3
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    tensors = read(split)
    sizes = dict.fromkeys((f.name for f in files), 0)
    counts = dict.fromkeys(sizes, 0)
    for key, names in units(tensors):
        assert len({tensors[n].file for n in names}) == 1, key
        sizes[tensors[names[0]].file] += sum(len(tensors[n].data) for n in names)
        counts[tensors[names[0]].file] += 1
    over = [file for file, size in sizes.items() if size > 20_000]
    assert over, "the experts are larger than the limit"
    assert {counts[file] for file in over} == {1}, "a larger unit has a shard of its own"
    same = {name: (t.dtype, t.shape, t.data) for name, t in tensors.items()}
    assert same == {name: (t.dtype, t.shape, t.data) for name, t in whole.items()}


@pytest.mark.parametrize("shard_bytes", [20_000, 5_000_000_000])
def test_header_data_and_index(shard_bytes, quantized):
    out = quantized("nvfp4", shard_bytes=shard_bytes)
    total, weight_map = 0, {}
    for file in sorted(out.glob("*.safetensors")):
        raw = file.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        assert begin % 4096 == 0
        text = raw[8:begin]
        header = json.loads(text)
        assert text.startswith(b"{"), "readers want the header to begin with its brace"
        assert text.rstrip(b" ").endswith(b"}"), "padded with spaces only"
        assert header.pop("__metadata__") == {"format": "pt"}
        at = 0
        for entry in header.values():  # the header has the order of the data
            assert entry["data_offsets"][0] == at
            at = entry["data_offsets"][1]
        assert begin + at == len(raw)
        total += at
        weight_map |= dict.fromkeys(header, file.name)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": total}, "weight_map": weight_map}


def test_scalars_have_no_dimension(quantized):
    tensors = read(quantized("nvfp4"))
    scalars = [n for n in tensors if n.endswith(("_scale_2", "input_scale", "k_scale", "v_scale"))]
    assert len(scalars) > 60
    assert all((tensors[n].dtype, tensors[n].shape) == ("F32", []) for n in scalars)
    assert (
        tensors["backbone.layers.0.mixer.in_proj.weight_scale"].shape == []
    )  # FP8: one scale; NVFP4's is [out, in / 16]
    assert tensors["backbone.layers.2.mixer.experts.0.up_proj.weight_scale"].shape == [48, 2]


@pytest.mark.parametrize("preset", pack_oracle.PRESETS)
def test_what_stays_is_bit_equal(preset, fitting, quantized):
    before, after = read(fitting(preset)), read(quantized(preset))
    kept = [name for name in before if pack_oracle.format_of(preset, name) is None]
    assert {n for n in before if n.startswith("mtp.")} <= set(kept)
    assert [n for n in kept if after[n][:3] != before[n][:3]] == []
    kv = {"backbone.layers.1.mixer.k_proj.k_scale", "backbone.layers.1.mixer.v_proj.v_scale"}
    assert (kv & after.keys()) == (set() if preset in pack_oracle.UNCALIBRATED else kv)

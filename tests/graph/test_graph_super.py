"""The complete graph of Super, 88 layers, over shards of the right sizes.

The shards are sparse files; only their scalar scales are written.
"""

import importlib.util
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.measured import child
from support.places import SUPER

import nemoquant
from nemoquant.checkpoint.header import ITEM_SIZE, encode_header
from nemoquant.layouts.modelopt import quantization_sections
from nemoquant.pack.shards import shards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("onnx_ir") is None, reason="onnx_ir is not installed (extra: onnx)"
    ),
    pytest.mark.skipif(
        sys.platform != "linux", reason="the peak is read from /proc, and shards are sparse files"
    ),
]

CHILD = """
import time
from nemoquant import api
import onnx_ir, numpy, torch
began = time.monotonic()
made = api.export_onnx(Path(sys.argv[1]), dialect=sys.argv[2], mtp=True)
print([time.monotonic() - began, memory()])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``quantize --fmt nvfp4`` would write it: 78.7 GB of files, a few megabytes of disk."""
    plan = nemoquant.plan(SUPER, "nvfp4")
    out = tmp_path_factory.mktemp("super")
    raw = json.loads(SUPER.read_text())
    section, legacy = quantization_sections(plan)
    (out / "config.json").write_text(json.dumps(raw | {"quantization_config": section}))
    (out / "hf_quant_config.json").write_text(json.dumps(legacy))
    weight_map = {}
    for shard in shards(plan):
        entries = list(shard.entries)
        with (out / shard.file).open("wb") as f:
            at = f.write(encode_header([(e.name, e.dtype, e.shape) for e in entries], {"format": "pt"}))
            for e in entries:
                if e.kind in ("global_scale", "input_scale", "kv_scale"):
                    f.seek(at)
                    f.write(np.float32(0.01).tobytes())
                at += e.nbytes
            f.truncate(at)
        weight_map |= {e.name: shard.file for e in entries}
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": plan.bytes_out}, "weight_map": weight_map})
    )
    assert sum(f.stat().st_size for f in out.glob("*.safetensors")) > 78e9
    assert sum(512 * f.stat().st_blocks for f in out.glob("*.safetensors")) < 2e9
    return out


@pytest.mark.parametrize("dialect", ["onnxruntime", "tensorrt_rtx", "tensorrt"])
def test_the_whole_graph(dialect: str, folder: Path) -> None:
    """Under 30 s and 1 GB (measured on two cores: 3 s).

    Scalar scales are read, one page of the map each, and the pages are released.
    """
    import onnx

    seconds, peak = child(CHILD, folder, dialect)
    print(
        f"{dialect}: {seconds:.1f} s, peak {peak / 1e9:.2f} GB, "
        f"{(folder / 'model.onnx').stat().st_size / 1e6:.2f} MB"
    )
    assert seconds < 30
    assert peak < 1e9
    sizes = {f.name: f.stat().st_size for f in folder.glob("*.safetensors")}
    referred = Counter[str]()
    for name in ("model.onnx", "mtp.onnx"):
        assert (folder / name).stat().st_size < 5e6
        model = onnx.load(str(folder / name), load_external_data=False)
        assert len(model.functions) <= 9
        if dialect == "onnxruntime":  # the other dialects have operators of their runtime
            onnx.checker.check_model(str(folder / name), full_check=True)
        for tensor in model.graph.initializer:
            entry = {e.key: e.value for e in tensor.external_data}
            offset, length = int(entry["offset"]), int(entry["length"])
            assert offset + length <= sizes[entry["location"]], tensor.name
            assert 8 * length == math.prod(tensor.dims) * _bits(onnx, tensor.data_type), tensor.name
            if name == "model.onnx":
                referred[entry["location"]] += length
        if name == "model.onnx":
            calls = Counter(
                node.op_type.split("_")[0] for node in model.graph.node if node.domain == "nemoquant.layers"
            )
            assert calls == {"MambaLayer": 40, "MoeLayer": 40, "AttentionLayer": 8}
    plan = nemoquant.plan(SUPER, "nvfp4")
    mtp = sum(row.bytes_out for row in plan.rows if row.role.startswith("mtp."))
    # every byte of the main model is used once (RTX reads one input scale for all experts of a projection: 4
    # bytes for each other expert are left out)
    left_out = 4 * 2 * 40 * 511 if dialect == "tensorrt_rtx" else 0
    assert sum(referred.values()) == plan.bytes_out - mtp - left_out


def _bits(onnx, dtype: int) -> int:
    types = onnx.TensorProto
    if dtype == types.FLOAT4E2M1:
        return 4
    return 8 * {types.BFLOAT16: 2, types.FLOAT: 4}.get(dtype, ITEM_SIZE["U8"])

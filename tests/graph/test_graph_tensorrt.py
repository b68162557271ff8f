"""The tensorrt dialect: plugin nodes, as specified, for operators that TensorRT lacks.

Nothing here can run it.
"""

import math
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import yaml
from support.commands import nemoquant as command
from support.places import PLUGINS

import nemoquant

NODES = {"CausalConv1d": "causal_conv1d", "Mamba2Scan": "mamba2_scan", "RoutedExperts": "routed_experts"}


@pytest.fixture
def graph(quantized: Callable[..., Path]) -> Callable[..., onnx.ModelProto]:
    def make(preset: str) -> onnx.ModelProto:
        made = nemoquant.export_onnx(quantized(preset), dialect="tensorrt")
        onnx.checker.check_model(str(made.graphs[0]))
        return onnx.load(str(made.graphs[0]), load_external_data=False)

    return make


@pytest.mark.parametrize("preset", ["fp8", "nvfp4", "nvfp4-full", "nvfp4-w4a16"])
def test_plugins_are_nodes_as_their_specifications_have_them(
    preset: str, graph: Callable[..., onnx.ModelProto]
) -> None:
    """No function has that name; inputs by count, attributes by name.

    Version and namespace are there for TensorRT's look-up.
    """
    model = graph(preset)
    assert not {f.name for f in model.functions} & set(NODES)
    found = {node.op_type: node for f in model.functions for node in f.node if node.domain == "nemoquant"}
    assert set(found) == set(NODES)
    for op, folder in NODES.items():
        spec, node = yaml.safe_load((PLUGINS / folder / "spec.yaml").read_text()), found[op]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert set(attributes) == {*spec["attributes"], "plugin_version", "plugin_namespace"}
        assert attributes["plugin_version"] == str(spec["version"]).encode()
        assert attributes["plugin_namespace"] == spec["domain"].encode()
        parts = 2 * len(spec["formats"][attributes["format"].decode()]) if op == "RoutedExperts" else 0
        required = [value for value in spec["inputs"] if not value.get("optional")]
        assert len(node.input) == len(required) + parts
        assert len(node.output) == len(spec["outputs"])


def test_packed_codes_enter_plugins_as_int8(graph: Callable[..., onnx.ModelProto]) -> None:
    """All experts as in the file, [E, out, in / 2] bytes; scales in float32; inputs of GEMMs stay FP8."""
    initializers = {tensor.name: tensor for tensor in graph("nvfp4").graph.initializer}
    stacks = {
        name: t
        for name, t in initializers.items()
        if ".mixer.experts." in name and name.startswith("backbone.")
    }
    assert stacks
    for name, tensor in stacks.items():
        part = name.rsplit(".", 1)[1]
        assert tensor.data_type == (
            onnx.TensorProto.INT8 if part in ("codes", "block_scales") else onnx.TensorProto.FLOAT
        ), name
        length = next(int(e.value) for e in tensor.external_data if e.key == "length")
        size = 1 if part in ("codes", "block_scales") else 4
        assert length == size * math.prod(tensor.dims), name
    assert initializers["backbone.layers.0.mixer.in_proj.weight"].data_type == onnx.TensorProto.FLOAT8E4M3FN


def test_the_engine_is_refused_with_what_it_needs(
    quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemoquant.engine.targets.find_gpu", lambda: None)
    result = command(
        "export", "trt", quantized("fp8"), tmp_path / "e", "--target", "trt", "--sm", 100, code=2
    )
    assert "no CUDA device is usable here" in result.stderr
    assert "nemoquant plugins build --arch sm_100f && nemoquant export trt" in result.stderr
    assert "--dialect tensorrt" in result.stderr
    assert not (tmp_path / "e").exists()

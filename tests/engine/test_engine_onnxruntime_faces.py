"""Graphs that ONNX Runtime loads, and that no export makes: each is refused in one line, none is run."""

import pytest

from nemoquant.errors import CheckpointError, EngineError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FLOAT, BOOL, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL, onnx.TensorProto.INT64


@pytest.fixture
def graph(tmp_path):
    """Loads a graph that returns its state as it is, and logits of a state's shape."""
    from nemoquant.engine.onnxruntime import Graph

    def load(kind=FLOAT, shape=("batch", "past", 4), present="present_key.0", logits=("batch", "past", 4)):
        value = onnx.helper.make_tensor_value_info
        nodes = [
            onnx.helper.make_node("Identity", ["past_key.0"], [present]),
            onnx.helper.make_node("Cast", ["past_key.0"], ["logits"], to=FLOAT),
        ]
        inputs = [value("input_ids", INT64, ["batch", "length"]), value("past_key.0", kind, shape)]
        outputs = [value("logits", FLOAT, logits), value(present, kind, shape)]
        model = onnx.helper.make_model(
            onnx.helper.make_graph(nodes, "graph", inputs, outputs),
            opset_imports=[onnx.helper.make_opsetid("", 17)],
            ir_version=8,
        )
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return Graph(path)

    return load


def test_one_that_fits(graph):
    loaded = graph()
    step = loaded.step({"input_ids": [[1, 2]]}, None)
    assert step.logits.shape == (1, 0, 4)
    assert step.state["past_key.0"].shape == (1, 0, 4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": BOOL}, r"its input past_key\.0 is tensor\(bool\) \['batch', 'past', 4\]"),
        ({"shape": ("batch", "what", 4)}, r"its input past_key\.0 is tensor\(float\) \['batch', 'what', 4\]"),
        ({"shape": ("batch", "past", 1 << 40)}, "its input past_key.0 is"),
        ({"shape": ("batch", 1 << 20, 1 << 20)}, "its input past_key.0 is"),
        ({"present": "later"}, "it has no output present_key.0"),
        ({"shape": ("batch", 4), "logits": ("batch", 4)}, "its logits are tensor"),
    ],
)
def test_faces_that_no_export_has(changes, says, graph):
    with pytest.raises(CheckpointError, match=rf"model\.onnx is no graph that nemoquant exported: .*{says}"):
        graph(**changes)


def test_a_failure_within_it_is_an_error_of_the_engine(graph):
    loaded = graph()
    with pytest.raises(EngineError, match=r"model\.onnx: ONNX Runtime \S+ fails in it \("):
        loaded.run({"input_ids": [[1, 2]]}, {"past_key.0": loaded.empty_state(1)["past_key.0"][0]})

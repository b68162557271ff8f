"""Records beside graphs and engines: each field of the wrong kind is an error that names it."""

import json

import pytest

from nemoquant.checkpoint.manifest import file_sha256
from nemoquant.engine.enginefile import SCHEMA, read_facts
from nemoquant.engine.files import check_shards, graph_facts, read_graph
from nemoquant.engine.generate import stop_tokens
from nemoquant.errors import CheckpointError
from nemoquant.model.parse import load_config

HUGE, HALF, DEEP = "9" * 4000, '{"a": "\\ud800"}', "[" * 100_000


# The facts of an engine.


@pytest.fixture
def engine(make_checkpoint):
    folder = make_checkpoint()
    file = folder / "model.engine"
    file.write_bytes(b"engine")
    facts = {
        **{"schema": SCHEMA, "runtime": "tensorrt", "version": "0", "checkpoint": "source", "sm": 100},
        **{
            "compute": "float32",
            "max_seq_len": 64,
            "max_batch": 3,
            "part": "main",
            "plan": None,
            "mtp": None,
        },
        **dict.fromkeys(("last_token_only", "with_hidden", "strip_weights", "weight_streaming"), False),
        **{"plugins": None, "config": file_sha256(folder / "config.json")},
        **{"bytes": 6, "sha256": file_sha256(file)},
    }

    def read(**changes):
        changed = {k: v for k, v in (facts | changes).items() if v is not ...}
        return written(json.dumps(changed))

    def written(text):
        (folder / "model.engine.json").write_text(text, encoding="latin-1")
        return read_facts(file, folder, "trt")

    read.written = written
    return read


WRONG = {
    "schema": ["2", None, 2.5, True, []],
    "runtime": [1, None, ["tensorrt"], "x" * 1001],
    "version": [1, None],
    "sm": ["100", 0, -1, 1 << 63, 1.5, True, None],
    "compute": ["int8", None, 1],
    "max_seq_len": ["long", 0, 10**30],
    "max_batch": [None, 0],
    "part": ["head", None, 1],
    "sha256": [1, None],
    "config": [None],
    "bytes": ["6", None, 6.0],
    "last_token_only": ["no", 1, None],
    "weight_streaming": [0],
    "plan": [1, []],
    "mtp": [True],
    "plugins": ["x", []],
    "checkpoint": [None],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in [*values, ...]])
def test_facts_of_the_wrong_kind(key, value, engine):
    if key == "plan" and value == 1:
        assert engine()["plan"] is None  # the good facts are read
    with pytest.raises(CheckpointError) as error:
        engine(**{key: value})
    assert f"model.engine.json is not as `export trt` writes it (`{key}`" in str(error.value)
    assert "build it again with" in str(error.value) and len(str(error.value)) < 900


@pytest.mark.parametrize("text", ["", "[]", "3", "null", DEEP, HALF, "\xff", '{"sm": ' + "9" * 5000 + "}"])
def test_facts_that_are_no_record(text, engine):
    with pytest.raises(CheckpointError, match=r"model\.engine\.json is not as `export trt` writes it \("):
        engine.written(text)


def test_a_manifest_whose_blob_is_missing(engine, tmp_path):
    (tmp_path / "source/nemoquant.json").symlink_to("../../blobs/0123")
    with pytest.raises(CheckpointError, match=r"nemoquant\.json is a link that leads nowhere; download"):
        engine()


# The metadata of a graph.


@pytest.fixture
def graph(demo, tmp_path):
    import onnx

    model = onnx.load_model_from_string((demo("fp8") / "model.onnx").read_bytes())
    [entry] = model.metadata_props

    def read(text):
        stand_in = "~" * len(text)  # onnx itself sets no text that is not UTF-8
        entry.value = text if isinstance(text, str) else stand_in
        path, data = tmp_path / "model.onnx", model.SerializeToString()
        path.write_bytes(data if isinstance(text, str) else data.replace(stand_in.encode(), text))
        facts = graph_facts(read_graph(path), path)
        check_shards(path, facts, "onnxruntime")
        return facts

    read.good = json.loads(entry.value)
    return read


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"dialect": None}, "`dialect` is None: input should be a valid string"),
        ({"dialect": ...}, "`dialect`: field required"),
        ({"compute": ["float32"]}, "`compute` is ['float32']: input should be a valid string"),
        ({"files": ["a"]}, "`files` is ['a']: input should be a valid dictionary"),
        ({"files": {}}, "`files` is {}: dictionary should have at least 1 item"),
        (
            {"files": {"../a": {"size": 1, "sha256": None}}},
            "`files.../a` is '../a': expected a plain file name",
        ),
        ({"files": {"": {"size": 1, "sha256": None}}}, "expected a plain file name"),
        ({"files": {"a": 1}}, "`files.a` is 1: input should be a valid dictionary"),
        (
            {"files": {"a": {"size": "1", "sha256": None}}},
            "`files.a.size` is '1': input should be a valid integer",
        ),
        ({"files": {"a": {"size": -1, "sha256": None}}}, "`files.a.size` is -1: input should be greater"),
        ({"files": {"a": {"size": 1 << 64, "sha256": None}}}, "`files.a.size` is 18446744073709551616: "),
        ({"files": {"a": {"size": 1}}}, "`files.a.sha256`: field required"),
        ({"files": {"a": {"size": 1, "sha256": 5}}}, "`files.a.sha256` is 5: input should be a valid string"),
    ],
)
def test_metadata_of_the_wrong_kind(changes, problem, graph):
    with pytest.raises(CheckpointError) as error:
        graph(json.dumps({k: v for k, v in (graph.good | changes).items() if v is not ...}))
    assert f"its metadata are not as expected ({problem}" in str(error.value).replace(
        "(`files.` is '': ", "("
    )
    assert str(error.value).endswith("export it again")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ("[]", "`the whole` is []: input should be"),
        (DEEP, "it is nested too deeply"),
        (HALF, "a string in it has half of a surrogate pair"),
        ('{"files": 1, "files": 2}', "duplicate key 'files'"),
        (b"\xff" * 40, "they are not UTF-8"),
    ],
)
def test_metadata_that_are_no_record(text, why, graph):
    with pytest.raises(CheckpointError) as error:
        graph(text)
    assert f"its metadata are not as expected ({why}" in str(error.value)


def test_a_graph_without_metadata_or_of_another_kind(tmp_path, demo):
    import onnx

    path = tmp_path / "model.onnx"
    model = onnx.load_model_from_string((demo("fp8") / "model.onnx").read_bytes())
    del model.metadata_props[:]
    with pytest.raises(CheckpointError, match=r"not as expected \(there are none\); export it again"):
        graph_facts(model, path)
    path.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read as ONNX"):
        read_graph(path)


# The end of generation.


@pytest.fixture
def stop(source):
    config, _ = load_config(source)

    def read(text):
        (source / "generation_config.json").write_text(text, encoding="latin-1")
        return stop_tokens(source, config)

    read.config = config
    return read


@pytest.mark.parametrize(
    ("text", "ids"),
    [('{"eos_token_id": 7}', {7}), ('{"eos_token_id": [7, 9]}', {7, 9}), ("{}", None)],
)
def test_stop_tokens(text, ids, stop, source):
    assert stop(text) == (ids or set(stop.config.eos_token_ids))
    (source / "generation_config.json").unlink()
    assert stop_tokens(source, stop.config) == set(stop.config.eos_token_ids)


@pytest.mark.parametrize("eos", ["-1", "true", "1.5", '"7"', "[null]", "{}", str(1 << 31), HUGE, "[7, -1]"])
def test_stop_tokens_that_are_none(eos, stop):
    """They were left out without a word."""
    with pytest.raises(CheckpointError, match=r"`eos_token_id` is .*; expected a token id or a list of them"):
        stop(f'{{"eos_token_id": {eos}}}')


@pytest.mark.parametrize("text", ["", "[]", "null", DEEP, HALF, "\xff"])
def test_generation_configs_that_cannot_be_read(text, stop):
    with pytest.raises(CheckpointError, match=r"generation_config\.json (cannot be read|holds a JSON)"):
        stop(text)


def _place(kind, model, tensor):
    """Puts a tensor where a graph can have one."""
    from onnx import AttributeProto, GraphProto, NodeProto, SparseTensorProto

    sparse = SparseTensorProto(**{"indices" if kind == "indices" else "values": tensor})
    attribute = AttributeProto(name="a")
    if kind in ("values", "indices"):
        model.graph.sparse_initializer.append(sparse)
    elif kind == "default of a function":
        attribute.t.CopyFrom(tensor)
        model.functions.add().attribute_proto.append(attribute)
    else:
        if kind == "sparse attribute":
            attribute.sparse_tensor.CopyFrom(sparse)
        elif kind == "sparse attributes":
            attribute.sparse_tensors.append(sparse)
        else:
            attribute.g.CopyFrom(GraphProto(sparse_initializer=[sparse]))
        model.graph.node.append(NodeProto(op_type="Constant", attribute=[attribute]))


@pytest.mark.parametrize(
    "kind",
    ["values", "indices", "sparse attribute", "sparse attributes", "subgraph", "default of a function"],
)
def test_data_elsewhere_wherever_a_graph_can_have_a_tensor(kind, tmp_path):
    import onnx

    tensor = onnx.TensorProto(name="x", data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    model = onnx.ModelProto()
    _place(kind, model, tensor)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        CheckpointError, match=r"'x' has its data in '\.\./secret'; expected a plain file name"
    ):
        read_graph(tmp_path / "model.onnx")

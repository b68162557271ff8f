"""The files that an export writes: graphs over the shards' own bytes; copies; refusals.

Also graphs that the engine refuses to load.
"""

import importlib.util
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import check_parts, error_line, nemoquant
from support.files import tree
from support.oracle_tensors import read
from support.places import DEMO
from support.tampering import changed_copy

from nemoquant.api import RunOptions, export_onnx, quantize, verify
from nemoquant.checkpoint.manifest import FILE
from nemoquant.engine.onnxruntime import Graph, OnnxRuntimeEngine
from nemoquant.engine.torch import TorchEngine
from nemoquant.errors import CheckpointError, OutputError, UsageError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed (extra: ort)"
)

INDEX = "model.safetensors.index.json"


def proto(path: Path) -> Any:
    import onnx

    return onnx.load(str(path), load_external_data=False)


def places(model: Any) -> dict[str, tuple[str, int, int]]:
    """Initializer -> file, offset, length."""
    found = {}
    for tensor in model.graph.initializer:
        entry = {e.key: e.value for e in tensor.external_data}
        found[tensor.name] = entry["location"], int(entry["offset"]), int(entry["length"])
    return found


@pytest.fixture
def quantized(demo: Callable[[str], Path], copied: Callable[..., Path]) -> Callable[..., Path]:
    """A private copy of a demo checkpoint, as ``quantize`` wrote it, without graphs."""

    def make(preset: str = "nvfp4", name: str = "quantized") -> Path:
        from nemoquant.checkpoint.manifest import read_manifest, write_manifest

        folder = copied(demo(preset), name, graphs=False)
        data = read_manifest(folder)
        files = {file: digest for file, digest in data["files"].items() if not file.endswith(".onnx")}
        write_manifest(folder, {k: v for k, v in data.items() if k != "sha256"} | {"files": files})
        return folder

    return make


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Runs ``nemoquant export onnx`` and checks the refusal: one line, its exit code, and no file written."""

    def check(*arguments: Any, parts: list[str], code: int = 2) -> str:
        before = tree(tmp_path)
        line = error_line(nemoquant("export", "onnx", *arguments, code=code).stderr, parts)
        assert tree(tmp_path) == before
        return line

    return check


# The content of the file.


def nested(nodes: Any) -> Iterator[Any]:
    """All nodes, those of subgraphs too."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in [attribute.g, *attribute.graphs]:
                yield from nested(graph.node)


@pytest.mark.parametrize("graph", ["model.onnx", "mtp.onnx"])
@pytest.mark.parametrize("preset", ["bf16", "nvfp4", "nvfp4-full"])
def test_no_weight_is_in_the_file(preset: str, graph: str, demo: Callable[[str], Path]) -> None:
    """Constants stay below 1 KB, in functions and loops too: the largest is a table of 512 bytes."""
    import onnx

    model = proto(demo(preset) / graph)
    assert (demo(preset) / graph).stat().st_size < 150_000
    for tensor in model.graph.initializer:
        assert tensor.data_location == onnx.TensorProto.EXTERNAL
        assert not tensor.raw_data and not tensor.float_data and not tensor.int32_data
    nodes = [*nested(model.graph.node), *(n for function in model.functions for n in nested(function.node))]
    sizes = [a.t.ByteSize() for node in nodes for a in node.attribute if a.HasField("t")]
    assert 0 < max(sizes) < 1000
    assert not [
        n.name for n in nodes for a in n.attribute if a.t.external_data or len(a.floats) + len(a.ints) > 100
    ]


PARTS = {
    "codes": "weight",
    "block_scales": "weight_scale",
    "global_scale": "weight_scale_2",
    "input_scale": "input_scale",
}


def stored_names(name: str, tensors: dict[str, torch.Tensor]) -> list[str]:
    """The tensors of the shards that an initializer stands for.

    ``...experts.up_proj.codes`` stands for those of all 16 experts.
    """
    mixer, experts, rest = name.partition(".experts.")
    if name in tensors or not experts:
        return [name]
    projection, part = rest.split(".")
    suffix = PARTS.get(part, part)
    if part == "global_scale" and f"{mixer}.experts.0.{projection}.weight_scale_2" not in tensors:
        suffix = "weight_scale"  # FP8
    return [f"{mixer}.experts.{e}.{projection}.{suffix}" for e in range(16)]


@pytest.mark.parametrize("preset", ["bf16", "fp8", "nvfp4", "nvfp4-w4a16", "nvfp4-full"])
def test_entries_point_at_the_bytes(preset: str, demo: Callable[[str], Path]) -> None:
    """At each offset are the bytes that safetensors reads under that name; each tensor is used once."""
    import onnx

    folder = demo(preset)
    tensors = read(folder)
    files = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    used: Counter[str] = Counter()
    sizes = {
        onnx.TensorProto.BFLOAT16: 2,
        onnx.TensorProto.FLOAT: 4,
        onnx.TensorProto.UINT8: 1,
        onnx.TensorProto.FLOAT8E4M3FN: 1,
    }
    for graph in ("model.onnx", "mtp.onnx"):
        model = proto(folder / graph)
        found = places(model)
        for tensor in model.graph.initializer:
            file, offset, length = found[tensor.name]
            names = stored_names(tensor.name, tensors)
            data = b"".join(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in names)
            assert files[file][offset : offset + length] == data, tensor.name
            assert np.prod(tensor.dims, dtype=int) * sizes[tensor.data_type] == length
            shape = list(tensors[names[0]].shape)
            assert list(tensor.dims) == ([len(names), *shape] if len(names) > 1 else shape), tensor.name
            if graph == "model.onnx" or names[0].startswith("mtp."):
                used.update(names)
    ignored = {"backbone.embeddings.weight", "lm_head.weight"} & used.keys()  # MTP uses them a second time
    assert len(ignored) == 2
    assert set(used) == set(tensors)
    assert set(used.values()) == {1}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        (
            "nvfp4",
            {
                "MambaLayer_fp8": 4,
                "MoeLayer_experts_nvfp4_shared_experts_fp8_fc1_latent_fc2_latent_bf16": 4,
                "AttentionLayer_fp8_fp8_cache": 2,
            },
        ),
        (
            "nvfp4-w4a16",
            {
                "MambaLayer_bf16": 4,
                "MoeLayer_experts_w4a16_shared_experts_fc1_latent_fc2_latent_bf16": 4,
                "AttentionLayer_bf16": 2,
            },
        ),
        ("bf16", {"MambaLayer_bf16": 4, "MoeLayer_bf16": 4, "AttentionLayer_bf16": 2}),
    ],
)
def test_one_function_for_each_kind_and_format(
    preset: str, expected: dict[str, int], demo: Callable[[str], Path]
) -> None:
    """Ten layers are ten calls of three functions."""
    model = proto(demo(preset) / "model.onnx")
    layers = [f.name for f in model.functions if f.domain == "nemoquant.layers"]
    assert sorted(layers) == sorted(expected)
    assert Counter(n.op_type for n in model.graph.node if n.domain == "nemoquant.layers") == expected
    called = {n.op_type for f in model.functions for n in nested(f.node) if n.domain == "nemoquant"}
    called |= {n.op_type for n in model.graph.node if n.domain == "nemoquant"}
    assert called == {f.name for f in model.functions if f.domain == "nemoquant"}


def test_layers_of_one_kind_in_two_formats(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A recipe by layers, weights only: one function for each format, and torch's results for the whole."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: mixed\nsummary: Two Mamba layers, two formats.\nrules:\n- {roles: [mamba.*], layers: [0], "
        "format: nvfp4, activations: none}\n"
        "- {roles: ['*'], format: source}\n"
    )
    out = quantize(make_checkpoint(), tmp_path / "mixed", str(recipe), RunOptions(threads=1)).out
    made = export_onnx(out)
    assert [name for name in made.functions if name.startswith("MambaLayer")] == [
        "MambaLayer_w4a16",
        "MambaLayer_bf16",
    ]
    tokens = np.random.default_rng(1).integers(3, 96, (2, 20))
    found, expected = OnnxRuntimeEngine(out).forward(tokens).logits, TorchEngine(out).forward(tokens).logits
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)  # measured 1.2e-6


@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4-full", "bf16"])
def test_onnx_checks_it(preset: str, demo: Callable[[str], Path]) -> None:
    import onnx

    for graph in ("model.onnx", "mtp.onnx"):
        onnx.checker.check_model(str(demo(preset) / graph), full_check=True)


# The files that an export writes.


def test_only_graphs_and_the_manifest_are_written(quantized: Callable[..., Path]) -> None:
    folder = quantized()
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()}
    made = export_onnx(folder, mtp=True)
    after = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()}
    assert (made.folder, made.copied_bytes) == (folder, 0)
    assert {name for name in after if after[name] != before.get(name)} == {
        "model.onnx",
        "mtp.onnx",
        "nemoquant.json",
    }
    assert set(before) <= set(after)
    report = verify(folder, DEMO)
    assert (report["ok"], report["problems"], report["warnings"]) == (True, [], [])


def test_an_old_graph_is_replaced_and_entered_again(quantized: Callable[..., Path]) -> None:
    folder = quantized()
    export_onnx(folder)
    first = (folder / "model.onnx").read_bytes()
    export_onnx(folder, folder, compute="float16")  # OUT is the folder itself: this is not a copy
    assert (folder / "model.onnx").read_bytes() != first
    assert verify(folder)["warnings"] == [] and verify(folder)["ok"]


def test_the_same_bytes_each_time_and_anywhere(quantized: Callable[..., Path], tmp_path: Path) -> None:
    a, b = quantized(name="a"), quantized(name="b/deeper")
    for folder in (a, b, a):
        export_onnx(folder, mtp=True)
    assert (a / "model.onnx").read_bytes() == (b / "model.onnx").read_bytes()
    assert tree(a) == tree(b)
    assert str(tmp_path).encode() not in (a / "model.onnx").read_bytes()


def test_a_write_that_fails_leaves_no_graph(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantized()
    before = tree(folder)

    def full(*_: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nemoquant.checkpoint.manifest.replace_bytes", full)
        with pytest.raises(OutputError, match="No space left on device"):
            export_onnx(folder)
    assert tree(folder) == before


# Copies.


def test_out_is_a_whole_checkpoint(quantized: Callable[..., Path], tmp_path: Path) -> None:
    folder = quantized()
    made = export_onnx(folder, tmp_path / "new/deeper/out")
    assert made.copied_bytes > 1e6
    assert sorted(p.name for p in made.folder.iterdir()) == sorted(
        [*(p.name for p in folder.iterdir()), "model.onnx"]
    )
    for file in folder.iterdir():
        assert file.name == "nemoquant.json" or (made.folder / file.name).read_bytes() == file.read_bytes()
    assert not (folder / "model.onnx").exists()
    report = verify(made.folder, DEMO)
    assert (report["ok"], report["problems"], report["warnings"]) == (True, [], [])
    OnnxRuntimeEngine(made.folder)


def test_a_copy_takes_every_side_file(quantized: Callable[..., Path], tmp_path: Path) -> None:
    """Every file that ``quantize`` may have copied from the source: both use the same list."""
    folder = quantized()
    names = [
        "tokenizer.model",
        "special_tokens_map.json",
        "chat_template.txt",
        "LICENSE",
        "LICENSE.txt",
        "NOTICE",
    ]
    for name in names:
        (folder / name).write_text(name)
    made = export_onnx(folder, tmp_path / "out")
    assert [name for name in names if not (made.folder / name).exists()] == []


def test_links_are_refused_in_place_and_followed_for_a_copy(
    quantized: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    """Hub caches consist of links."""
    folder, repository = quantized(), tmp_path / "models--made--up"
    links = repository / "snapshots/0a1b2c"
    links.mkdir(parents=True)
    shutil.copytree(folder, repository / "blobs")
    for file in folder.iterdir():
        (links / file.name).symlink_to(f"../../blobs/{file.name}")
    refused(links, parts=["model-00001-of-00001.safetensors is a link", "ONNX refuses", "give an OUT folder"])
    made = export_onnx(links, tmp_path / "out")
    assert not any(p.is_symlink() for p in made.folder.iterdir())
    assert verify(made.folder, DEMO)["ok"]
    tokens = np.arange(5, 15)[None]
    expected = TorchEngine(folder).forward(tokens).logits
    assert (
        np.median(np.abs(OnnxRuntimeEngine(made.folder).forward(tokens).logits - expected))
        < 1e-3 * np.abs(expected).max()
    )


def test_hard_links_are_refused_too(
    quantized: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = quantized()
    (tmp_path / "other.safetensors").hardlink_to(folder / "model-00001-of-00001.safetensors")
    refused(folder, parts=["is a link"])


def test_a_published_layout_is_written_anew(tmp_path: Path, refused: Callable[..., str]) -> None:
    """The copy stores the experts of one layer and projection without gaps.

    Every tensor keeps its name, dtype, shape and bytes.
    """
    published = Path(shutil.copytree(DEMO, tmp_path / "published"))
    refused(published, parts=[str(published), "experts do not lie back to back", "give an OUT folder"])
    made = export_onnx(published, tmp_path / "out", mtp=True)
    old = read(published)
    new = read(made.folder)
    assert sorted(new) == sorted(old)
    for name, tensor in old.items():
        assert (new[name].dtype, new[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(new[name].view(torch.uint8), tensor.view(torch.uint8)), name
    index = json.loads((made.folder / INDEX).read_text())
    assert sorted(index["weight_map"]) == sorted(old)
    assert index["metadata"]["total_size"] == made.copied_bytes == sum(t.nbytes for t in old.values())
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (made.folder / name).read_bytes() == (published / name).read_bytes()
    export_onnx(made.folder)  # in place from now on


@pytest.mark.parametrize("name", ["two shards", "bf16 source"])
def test_the_synthetic_source_is_written_anew(name: str, source: Path, tmp_path: Path) -> None:
    made = export_onnx(source, tmp_path / name)
    old = read(source)
    new = read(made.folder)
    assert all(torch.equal(new[n].view(torch.uint8), t.view(torch.uint8)) for n, t in old.items())
    assert len(new) == len(old)


def test_no_copy_names_the_reason(
    quantized: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder, links = quantized(), tmp_path / "links"
    shutil.copytree(folder, links)
    shard = "model-00001-of-00001.safetensors"
    (links / shard).unlink()
    (links / shard).symlink_to(folder / shard)
    published = Path(shutil.copytree(DEMO, tmp_path / "published"))
    refused(folder, tmp_path / "out", "--no-copy", parts=["the graph is to stand in", "--no-copy forbids it"])
    refused(links, "--no-copy", parts=[f"{shard} is a link", "--no-copy forbids it"])
    refused(published, "--no-copy", parts=["experts do not lie back to back", "--no-copy forbids it"])
    assert "no tensor copied" in nemoquant("export", "onnx", folder, "--no-copy").stdout


def test_a_copy_that_fails_leaves_nothing(
    quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantized()
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("nemoquant.graph.export._save", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_onnx(folder, tmp_path / "a/b")
    assert tree(tmp_path) == before


# Refusals.


def test_out_must_be_new_and_elsewhere(
    quantized: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = quantized(name="deep/quantized")
    (tmp_path / "there").mkdir()
    refused(folder, tmp_path / "there", parts=["there exists", "nothing is overwritten"])
    refused(folder, folder / "below", parts=["overlaps the source"])
    refused(folder, folder.parent, parts=["overlaps the source"])


@pytest.mark.parametrize(
    ("layers", "parts"),
    [
        ("3", ["--layers 3", "expected A:B"]),
        ("a:b", ["--layers a:b", "expected A:B"]),
        (":4", ["--layers :4", "expected A:B"]),
        ("-1:4", ["--layers -1:4", "expected A:B"]),
        ("1:2:3", ["--layers 1:2:3", "expected A:B"]),
        ("4:4", ["--layers 4:4", "expected 0 <= first < end <= 10"]),
        ("7:3", ["--layers 7:3", "expected 0 <= first < end <= 10"]),
        ("8:11", ["--layers 8:11", "expected 0 <= first < end <= 10"]),
    ],
)
def test_layers_that_make_no_sense(
    layers: str, parts: list[str], quantized: Callable[..., Path], refused: Callable[..., str]
) -> None:
    refused(quantized(), "--layers", layers, parts=parts)


def test_bfloat16_is_not_for_onnxruntime(
    quantized: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = quantized()
    for out in ([], [tmp_path / "out"]):
        refused(
            folder,
            *out,
            "--compute",
            "bfloat16",
            parts=["--compute bfloat16", "onnxruntime", "float32 or float16"],
        )


def test_mtp_needs_the_module(
    make_checkpoint: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    """The config has no module, or the file lacks its tensors; then the rest can be exported."""
    refused(
        make_checkpoint("none", num_nextn_predict_layers=0),
        tmp_path / "out",
        "--mtp",
        parts=["has no multi-token-prediction module"],
    )
    lacking = make_checkpoint(
        "lacking", lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")]
    )
    refused(lacking, tmp_path / "out", "--mtp", parts=["has no multi-token-prediction module"])
    assert export_onnx(lacking, tmp_path / "out").copied_bytes


def test_not_a_checkpoint(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", parts=["config.json does not exist"])
    refused(tmp_path / "nowhere", parts=["nowhere"])
    shutil.copyfile(DEMO / "config.json", tmp_path / "config.json")
    refused(tmp_path / "config.json", parts=["is a config.json", "expected the folder"])


@pytest.mark.parametrize("module", ["onnx", "onnx_ir"])
def test_without_the_extra(
    module: str, quantized: Callable[..., Path], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantized()
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("nemoquant.graph", sys.modules["nemoquant.graph"])  # put back with what is in it
    for name in [n for n in sys.modules if n.startswith("nemoquant.graph")]:
        monkeypatch.delitem(sys.modules, name)
    refused(folder, parts=["extra `onnx`", "pip install 'nemoquant[onnx]'"], code=3)


def test_experts_with_scales_of_their_own(
    source: Path, token_rows: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """``--no-scale-groups``: ONNX Runtime accepts it; TensorRT-RTX has one input scale for all experts."""
    options = RunOptions(method="max", data=token_rows, dtype="float32", threads=1, scale_groups=False)
    folder = quantize(source, tmp_path / "out", "nvfp4", options).out
    refused(
        folder,
        "--dialect",
        "tensorrt_rtx",
        parts=["experts.up_proj", "input scales", "takes one for all", "--no-scale-groups"],
    )
    export_onnx(folder)
    tokens = np.random.default_rng(1).integers(3, 96, (2, 6))
    found, expected = (
        OnnxRuntimeEngine(folder).forward(tokens).logits,
        TorchEngine(folder).forward(tokens).logits,
    )
    errors = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(errors) < 1e-4  # a flip may touch some positions


# Graphs that the engine refuses.

SHARD = "model-00001-of-00001.safetensors"


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as f:
        f.seek(offset)
        f.write(data)


@pytest.fixture
def unsigned(demo: Callable[[str], Path], copied: Callable[..., Path]) -> Path:
    """A checkpoint with its graphs and without a manifest: what the graph itself says is all there is."""
    folder = copied(demo("nvfp4-w4a16"))
    (folder / FILE).unlink()
    return folder


def edited(folder: Path, change: Callable[[Any], Any]) -> None:
    model = proto(folder / "model.onnx")
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def redirect(key: str, value: str) -> Callable[[Path], None]:
    def change(model: Any) -> None:
        for entry in model.graph.initializer[3].external_data:
            if entry.key == key:
                entry.value = value

    return lambda folder: edited(folder, change)


def set_metadata(folder: Path, **facts: Any) -> None:
    def change(model: Any) -> None:
        for entry in model.metadata_props:
            if entry.key == "nemoquant":
                entry.value = json.dumps(json.loads(entry.value) | facts)

    edited(folder, change)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda f: (f / "model.onnx").unlink(), ["model.onnx does not exist", "nemoquant export onnx"]),
        (
            lambda f: (f / "model.onnx").write_bytes(b"no protobuf \xff\xff"),
            ["cannot be read as ONNX", "export it again"],
        ),
        (lambda f: (f / "model.onnx").write_bytes(b""), ["model.onnx", "export it again"]),
        (
            lambda f: edited(f, lambda m: m.ClearField("metadata_props")),
            ["was not exported by nemoquant", "export it again"],
        ),
        (lambda f: (f / SHARD).unlink(), [SHARD, "is missing", "copy it there or export again"]),
        (
            lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-1]),
            [SHARD, "bytes, model.onnx was made for", "export it again"],
        ),
        (
            lambda f: overwrite(f / SHARD, 100_000, b"\x00\x01\x02\x03"),
            [SHARD, "was changed after model.onnx was made"],
        ),
        (
            lambda f: export_onnx(f, dialect="tensorrt_rtx"),
            ["tensorrt_rtx dialect, expected onnxruntime", "--dialect onnxruntime"],
        ),
        (redirect("location", f"../{SHARD}"), [f"'../{SHARD}'", "expected a plain file name"]),
        (redirect("location", "/etc/passwd"), ["'/etc/passwd'", "expected a plain file name"]),
        (redirect("location", f"sub/{SHARD}"), [f"'sub/{SHARD}'", "expected a plain file name"]),
        (redirect("location", ".."), ["'..'", "expected a plain file name"]),
        (redirect("offset", "999999999"), ["model.onnx", "can't load it", "export it again"]),
        (redirect("length", "3"), ["model.onnx", "can't load it", "export it again"]),
        (lambda f: set_metadata(f, dialect="other"), ["other dialect", "expected onnxruntime"]),
    ],
    ids=[
        "no graph",
        "no protobuf",
        "empty file",
        "not ours",
        "no shard",
        "short shard",
        "changed shard",
        "dialect",
        "location above",
        "location absolute",
        "location below",
        "location ..",
        "offset",
        "length",
        "unknown dialect",
    ],
)
def test_the_engine_refuses(damage: Callable[[Path], Any], parts: list[str], unsigned: Path) -> None:
    folder = unsigned
    Graph(folder / "model.onnx")  # this one is complete
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        OnnxRuntimeEngine(folder)
    check_parts(parts, str(caught.value))


@pytest.mark.parametrize(
    "text",
    ["no json", "[]", "{}", '{"dialect": "onnxruntime"}', '{"dialect": "onnxruntime", "files": {"a": 1}}'],
)
def test_metadata_that_are_no_facts(text: str, unsigned: Path) -> None:
    folder = unsigned

    def change(model: Any) -> None:
        next(entry for entry in model.metadata_props if entry.key == "nemoquant").value = text

    edited(folder, change)
    with pytest.raises(CheckpointError):
        OnnxRuntimeEngine(folder)


@pytest.mark.parametrize("inside", ["the graph", "a function", "a subgraph"])
def test_constants_may_not_point_out_of_the_folder(inside: str, unsigned: Path) -> None:
    """External data of a node's attribute, in the graph, a function or a subgraph."""
    import onnx

    folder = unsigned

    def change(model: Any) -> None:
        nodes = {
            "the graph": model.graph.node,
            "a function": model.functions[0].node,
            "a subgraph": next(
                a.g.node for f in model.functions for n in f.node for a in n.attribute if a.HasField("g")
            ),
        }[inside]
        tensor = onnx.TensorProto(
            name="out", data_type=onnx.TensorProto.FLOAT, dims=[1], data_location=onnx.TensorProto.EXTERNAL
        )
        tensor.external_data.add(key="location", value="../secret")
        nodes.append(onnx.helper.make_node("Constant", [], ["out"], value=tensor))

    edited(folder, change)
    with pytest.raises(CheckpointError, match=r"has its data in '\.\./secret'"):
        OnnxRuntimeEngine(folder)


def test_some_layers_are_no_model(quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quantized()
    for layers in ((0, 4), (4, 10), (3, 4)):
        export_onnx(folder, layers=layers)
        monkeypatch.setattr("nemoquant.engine.onnxruntime.hash_once", None)  # refused before a shard is read
        with pytest.raises(UsageError, match="holds some layers only; export the whole model"):
            OnnxRuntimeEngine(folder)


def test_onnxruntime_missing(
    demo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, unread: Callable[[], None]
) -> None:
    folder = demo("nvfp4")
    unread()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = nemoquant("generate", folder, "--prompt", "Once", "--engine", "onnxruntime", code=3)
    assert "extra `ort`" in result.stderr


def test_json_figures(quantized: Callable[..., Path]) -> None:
    folder = quantized()
    found = json.loads(nemoquant("export", "onnx", folder, "--mtp", "--json").stdout)
    assert found["graphs"] == {name: (folder / name).stat().st_size for name in ("model.onnx", "mtp.onnx")}
    assert (found["folder"], found["dialect"], found["copied_bytes"]) == (str(folder), "onnxruntime", 0)


def test_a_graph_needs_the_scales_of_its_cache(quantized: Callable[..., Path], tmp_path: Path) -> None:
    name = "backbone.layers.3.mixer.k_proj.k_scale"
    folder = changed_copy(quantized("fp8"), tmp_path / "changed", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"{name} is missing, and a graph reads the scale"):
        export_onnx(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))

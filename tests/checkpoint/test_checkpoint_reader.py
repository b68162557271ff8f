"""Checkpoint folders: index and shards, published names, mapped bytes, and released memory."""

import json
import os
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.measured import needs_proc

from nemoquant.checkpoint import reader
from nemoquant.checkpoint.header import encode_header
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.errors import CheckpointError, HeaderError, SourceChangedError
from nemoquant.sources.source import open_source

Tensors = dict[str, torch.Tensor]
Make = Callable[..., Path]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write(file: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """Writes a safetensors file by hand: dtype, shape and bytes by name, without gaps."""
    entries, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        entries[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    """``a`` and ``b`` in the first shard, ``c`` in the second."""
    write(tmp_path / FIRST, {"a": ("U8", [2], b"aa"), "b": ("U8", [3], b"bbb")})
    write(tmp_path / SECOND, {"c": ("U8", [1], b"c")})
    write_index(tmp_path, {"a": FIRST, "b": FIRST, "c": SECOND})
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.raw(name).tobytes() for name in checkpoint.tensors}


# --- the folder, its index, its shards


def test_two_shards(two_shards: Path) -> None:
    assert content(two_shards) == {"a": b"aa", "b": b"bbb", "c": b"c"}


def test_a_single_file(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"x": ("U8", [2], b"xy")})
    assert content(tmp_path) == {"x": b"xy"}


def test_two_sets_of_weights_are_refused(two_shards: Path) -> None:
    write(two_shards / "model.safetensors", {"x": ("U8", [2], b"xy")})
    with pytest.raises(
        CheckpointError, match=r"has two sets of weights: .*index\.json, and model\.safetensors,"
    ):
        Checkpoint(two_shards)


def test_shards_that_the_index_does_not_name_are_left_alone(two_shards: Path) -> None:
    (two_shards / "consolidated.safetensors").write_bytes(b"not one of ours")
    assert set(content(two_shards)) == {"a", "b", "c"}


def test_shards_of_a_hub_cache_are_links(two_shards: Path) -> None:
    snapshot = two_shards / "snapshots" / "0f3a"
    blobs = two_shards / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate((FIRST, SECOND, INDEX)):
        (two_shards / name).rename(blobs / f"{number:064x}")
        (snapshot / name).symlink_to(f"../../blobs/{number:064x}")
    assert content(snapshot) == {"a": b"aa", "b": b"bbb", "c": b"c"}


def test_neither_index_nor_single_file(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        CheckpointError, match=r"has neither model\.safetensors\.index\.json nor model\.safetensors; expected"
    ):
        Checkpoint(tmp_path)


def test_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        CheckpointError, match=r"file is not a folder; expected a checkpoint folder with config\.json"
    ):
        Checkpoint(tmp_path / "file")


@pytest.mark.parametrize(
    "shard",
    [
        "sub/model.safetensors",
        "../model.safetensors",
        "/etc/model.safetensors",
        "..",
        ".",
        "",
        "a\\b.safetensors",
        "model.bin",
        "a\n.safetensors",
        "a\x1b.safetensors",
    ],
)
def test_shard_names_are_plain(two_shards: Path, shard: str) -> None:
    write_index(two_shards, {"a": FIRST, "b": FIRST, "c": shard})
    with pytest.raises(CheckpointError) as error:
        Checkpoint(two_shards)
    assert f"{INDEX} names the shard {shard!r}; expected a plain file name ending in .safetensors" in str(
        error.value
    )


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, "\xff", '{"a": 1, "a": 2}', '{"weight_map": {"\\ud800": 1}}']
)
def test_an_index_that_is_not_json(two_shards: Path, text: str) -> None:
    (two_shards / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(
        CheckpointError, match=r"index\.json cannot be read \(.*\); expected JSON with a `weight_map`"
    ):
        Checkpoint(two_shards)


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("[]", "None"),
        ("3", "None"),
        ("{}", "None"),
        ('{"weight_map": []}', "[]"),
        ('{"weight_map": null}', "None"),
        ('{"weight_map": {"a": 1}}', "{'a': 1}"),
        ('{"weight_map": {"a": null, "b": "x.safetensors"}}', "{'a': None, 'b': 'x.safetensors'}"),
    ],
)
def test_an_index_that_is_none(two_shards: Path, text: str, got: str) -> None:
    (two_shards / INDEX).write_text(text)
    with pytest.raises(CheckpointError) as error:
        Checkpoint(two_shards)
    assert f"{INDEX} has the weight_map {got}; expected an object of file names by tensor" in str(error.value)


@pytest.mark.parametrize("shape", [[1 << 40, 0, 1], [(1 << 16) + 1, 0, 8]])
def test_experts_without_values_are_not_counted_out(tmp_path: Path, shape: list[int]) -> None:
    """A header of a hundred bytes asked for 10^12 tensors."""
    text = json.dumps(
        {"backbone.layers.0.mixer.experts.up_proj": {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}}
    ).encode()
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(HeaderError, match=rf"has {shape[0]:,} experts; expected at most 65,536"):
        Checkpoint(tmp_path)


def test_all_shards_together_are_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = b'{"backbone.layers.0.mixer.experts.up_proj":{"dtype":"U8","shape":[9,1,1],"data_offsets":[0,9]}}'
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(9))
    monkeypatch.setattr(reader, "MAX_TENSORS", 9)
    with Checkpoint(tmp_path) as checkpoint:
        assert len(checkpoint.tensors) == 9
    monkeypatch.setattr(reader, "MAX_TENSORS", 8)
    with pytest.raises(CheckpointError, match="has too many tensors; expected at most 8"):
        Checkpoint(tmp_path)


def test_a_missing_shard(two_shards: Path) -> None:
    (two_shards / SECOND).unlink()
    with pytest.raises(
        CheckpointError, match=rf"{SECOND} does not exist, but {INDEX} names it; download the shard"
    ):
        Checkpoint(two_shards)


def test_a_link_to_nothing_is_a_missing_shard(two_shards: Path) -> None:
    (two_shards / SECOND).unlink()
    (two_shards / SECOND).symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError, match=rf"{SECOND} does not exist"):
        Checkpoint(two_shards)


def test_a_truncated_shard(two_shards: Path) -> None:
    whole = (two_shards / FIRST).read_bytes()
    (two_shards / FIRST).write_bytes(whole[:-1])
    with pytest.raises(HeaderError, match=rf"{FIRST}: its tensors end at .* may be truncated"):
        Checkpoint(two_shards)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": FIRST, "b": SECOND, "c": SECOND}, "not where it says: b"),
        ({"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}, "not where it says: d"),
        ({"a": FIRST, "c": SECOND}, "not in it: b"),
    ],
    ids=["in another shard", "in no shard", "not in the index"],
)
def test_an_index_that_does_not_fit(two_shards: Path, weight_map: dict[str, str], message: str) -> None:
    write_index(two_shards, weight_map)
    with pytest.raises(CheckpointError) as error:
        Checkpoint(two_shards)
    assert str(error.value) == f"{two_shards / INDEX} does not fit its shards: {message}"


def test_a_tensor_in_two_shards(two_shards: Path) -> None:
    write(two_shards / SECOND, {"c": ("U8", [1], b"c"), "a": ("U8", [2], b"AA")})
    with pytest.raises(HeaderError, match=rf"tensor 'a' is in {FIRST} and in {SECOND}; expected it once"):
        Checkpoint(two_shards)


# --- published names


def fuse(tensors: Tensors, projection: str, suffix: str) -> None:
    """Stacks the experts as transformers 5 stores them: one [E, out, in] tensor a layer."""
    prefixes = {n.split("experts.")[0] for n in tensors if f".experts.0.{projection}.weight" in n}
    for prefix in sorted(prefixes):
        parts = [tensors.pop(f"{prefix}experts.{e}.{projection}.weight") for e in range(8)]
        tensors[f"{prefix}experts.{projection}{suffix}"] = torch.stack(parts)


def as_transformers_5(tensors: Tensors) -> None:
    fuse(tensors, "up_proj", "")
    fuse(tensors, "down_proj", ".weight")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")


def test_the_spelling_of_transformers_5(make_checkpoint: Make) -> None:
    published, other = make_checkpoint("published"), make_checkpoint("other", as_transformers_5)
    in_files = {n: t for file in (FIRST, SECOND) for n, t in load_file(other / file).items()}
    assert in_files["backbone.layers.2.mixer.experts.up_proj"].shape == (8, 48, 32)
    assert not any(".experts.0." in n for n in in_files)

    assert content(other) == content(published)
    source = open_source(other)  # no tensor is missing, extra or misshapen
    assert source.checkpoint is not None
    with source.checkpoint as checkpoint:
        assert checkpoint.tensors["mtp.layers.1.mixer.experts.7.down_proj.weight"].shape == (32, 48)
        assert (
            len(checkpoint.aliases) == 3 * 16 + 1
        )  # two MoE layers and MTP's, two projections, 8 experts; the embedding
        assert (
            checkpoint.aliases["backbone.layers.2.mixer.experts.5.up_proj.weight"]
            == "backbone.layers.2.mixer.experts.up_proj"
        )
        assert checkpoint.aliases["backbone.embeddings.weight"] == "backbone.embedding.weight"
        assert checkpoint.array("backbone.layers.5.mixer.experts.3.down_proj.weight").shape == (32, 48)


def test_published_names_have_no_aliases(source: Path) -> None:
    with Checkpoint(source) as checkpoint:
        assert checkpoint.aliases == {}


def test_a_tensor_in_both_spellings(make_checkpoint: Make) -> None:
    def both(tensors: Tensors) -> None:
        tensors["backbone.embedding.weight"] = tensors["backbone.embeddings.weight"] + 1

    with pytest.raises(
        CheckpointError,
        match=r"two tensors are named 'backbone\.embeddings\.weight' \(one in .*\); expected each once",
    ):
        Checkpoint(make_checkpoint(edit=both))


# --- bytes


def test_arrays_have_the_bytes_of_their_dtypes(tmp_path: Path) -> None:
    write(
        tmp_path / "model.safetensors",
        {
            "f32": ("F32", [2, 1], b"\0\0\x80\x3f\0\0\0\xc0"),  # 1, -2
            "bf16": ("BF16", [3], b"\x80\x3f\0\x80\xc0\x7f"),  # 1, -0, NaN
            "f16": ("F16", [2], b"\0\x3c\0\xc0"),  # 1, -2
            "e4m3": ("F8_E4M3", [2], b"\x38\xff"),
            "u8": ("U8", [1, 2], b"\x01\x80"),
            "scalar": ("F32", [], b"\0\0\0\x3f"),
            "none": ("F32", [0, 4], b""),
        },
    )
    with Checkpoint(tmp_path) as checkpoint:
        got = {name: checkpoint.array(name) for name in checkpoint.tensors}
    assert {n: (a.dtype.name, a.shape) for n, a in got.items()} == {
        "f32": ("float32", (2, 1)),
        "bf16": ("uint16", (3,)),
        "f16": ("float16", (2,)),
        "e4m3": ("uint8", (2,)),
        "u8": ("uint8", (1, 2)),
        "scalar": ("float32", ()),
        "none": ("float32", (0, 4)),
    }
    assert got["f32"].tolist() == [[1], [-2]]
    assert got["bf16"].tolist() == [0x3F80, 0x8000, 0x7FC0]
    assert got["f16"].tolist() == [1, -2]
    assert got["e4m3"].tolist() == [0x38, 0xFF]
    assert got["u8"].tolist() == [[1, 128]]
    assert got["scalar"] == 0.5


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "F64"])
def test_a_dtype_without_array(tmp_path: Path, dtype: str) -> None:
    write(tmp_path / "model.safetensors", {"t": (dtype, [0], b"")})
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError) as error:
        checkpoint.array("t")
    assert (
        str(error.value)
        == f"model.safetensors: tensor 't' has dtype {dtype}; expected one of BF16, F16, F32, U8, F8_E4M3"
    )


@pytest.mark.parametrize("pad", range(4))
def test_misaligned_data(tmp_path: Path, pad: int) -> None:
    values = np.arange(5, dtype="<f4")
    write(
        tmp_path / "model.safetensors",
        {"pad": ("U8", [pad], bytes(pad)), "x": ("F32", [5], values.tobytes())},
    )
    with Checkpoint(tmp_path) as checkpoint:
        array = checkpoint.array("x")
    assert array.flags.aligned
    assert array.tolist() == [0, 1, 2, 3, 4]


def test_writing_to_an_array_does_not_reach_the_file(two_shards: Path) -> None:
    before = (two_shards / FIRST).read_bytes()
    with Checkpoint(two_shards) as checkpoint:
        checkpoint.raw("a")[:] = 0
    assert (two_shards / FIRST).read_bytes() == before


def test_arrays_outlive_the_checkpoint(two_shards: Path) -> None:
    with Checkpoint(two_shards) as checkpoint:
        array = checkpoint.raw("b")
    assert array.tobytes() == b"bbb"


# --- memory


def smaps(file: Path, field: str) -> list[int]:
    """A figure that the kernel gives, in bytes, for each map of ``file`` in this process."""
    found, inside = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            inside = line.endswith(str(file))
        elif inside and first == f"{field}:":
            found.append(int(line.split()[1]) * 1024)
    return found


def resident() -> int:
    """Bytes of this process in memory."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(text.split("Rss:")[1].split()[0]) * 1024


SIZE = 24 << 20
MARGIN = 4 << 20  # the kernel maps up to 2 MiB around a touched page, beyond a tensor's ends too


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Two tensors of 24 MiB."""
    ones = torch.ones(SIZE, dtype=torch.uint8)
    save_file({"a": ones, "b": 2 * ones}, tmp_path / "model.safetensors")
    return tmp_path


def test_release_drops_resident_pages(large: Path) -> None:
    file = large / "model.safetensors"
    with Checkpoint(large) as checkpoint:
        a, b = checkpoint.raw("a"), checkpoint.raw("b")
        assert smaps(file, "Rss")[0] < MARGIN  # nothing was read yet
        assert (int(a.sum(dtype=np.int64)), int(b.sum(dtype=np.int64))) == (SIZE, 2 * SIZE)
        touched = resident()
        assert smaps(file, "Rss")[0] >= 2 * SIZE
        checkpoint.release(["a"])
        assert SIZE - MARGIN <= smaps(file, "Rss")[0] <= SIZE + MARGIN  # b stays
        assert touched - resident() > SIZE * 3 // 4
        assert int(a.sum(dtype=np.int64)) == SIZE  # the array still works: its pages are read again
        checkpoint.release(["a", "b"])
        assert smaps(file, "Rss")[0] < MARGIN


def test_release_of_what_was_never_touched(two_shards: Path) -> None:
    with Checkpoint(two_shards) as checkpoint:
        checkpoint.release(["a", "c"])
        assert checkpoint.raw("a").tobytes() == b"aa"
        checkpoint.release(["a", "b", "c"])
        assert checkpoint.raw("a").tobytes() == b"aa"


def test_close_unmaps(large: Path) -> None:
    checkpoint = Checkpoint(large)
    checkpoint.raw("a")
    assert len(smaps(large / "model.safetensors", "Rss")) == 1
    checkpoint.close()
    assert smaps(large / "model.safetensors", "Rss") == []
    assert checkpoint.raw("a")[0] == 1  # opened again when needed


def test_threads_share_one_map(large: Path) -> None:
    count = 8
    for _ in range(20):
        checkpoint, barrier = Checkpoint(large), threading.Barrier(count)
        held: list[Any] = []

        def read(
            checkpoint: Checkpoint = checkpoint, barrier: threading.Barrier = barrier, held: list[Any] = held
        ) -> None:
            barrier.wait()
            held.append(checkpoint.raw("a"))

        threads = [threading.Thread(target=read) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({array.ctypes.data for array in held}) == 1
        assert len(smaps(large / "model.safetensors", "Rss")) == 1
        checkpoint.close()
        held.clear()


def test_no_file_stays_open(source: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (a Path would open it once more)
    with Checkpoint(source) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.raw(name)
        assert len(os.listdir("/proc/self/fd")) <= before + 2  # noqa: PTH208 (each map holds one)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# --- a layer's weights as tensors


def test_layer_weights(source: Path) -> None:
    expected = load_file(source / FIRST) | load_file(source / SECOND)
    prefix = "backbone.layers.2."
    with Checkpoint(source) as checkpoint:
        weights = LayerWeights(checkpoint, prefix)
        assert set(weights) == {n.removeprefix(prefix) for n in expected if n.startswith(prefix)}
        assert len(weights) == 1 + 6 + 16
        gate, bias = weights["mixer.gate.weight"], weights["mixer.gate.e_score_correction_bias"]
        assert (gate.dtype, bias.dtype) == (torch.bfloat16, torch.float32)
        weights.release()
        assert torch.equal(gate, expected[prefix + "mixer.gate.weight"])
        assert torch.equal(bias, expected[prefix + "mixer.gate.e_score_correction_bias"])
        with pytest.raises(KeyError):
            weights["mixer.in_proj.weight"]


def test_layer_weights_hold_few_pages(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        large / "model.safetensors",
        {n: ("BF16", [4 << 20], bytes(8 << 20)) for n in ("l.a", "l.b", "l.c", "l.d")},
    )
    monkeypatch.setattr("nemoquant.checkpoint.weights.HELD_BYTES", 16 << 20)
    with Checkpoint(large) as checkpoint:
        weights = LayerWeights(checkpoint, "l.")
        for name in weights:
            assert float(weights[name].sum()) == 0
            assert smaps(large / "model.safetensors", "Rss")[0] <= (16 << 20) + MARGIN
        weights.release()
        assert smaps(large / "model.safetensors", "Rss")[0] <= MARGIN


@needs_proc
def test_a_file_larger_than_memory_can_be_mapped(tmp_path: Path) -> None:
    """A sparse file, mapped privately and writable: the kernel must not count it as promised memory."""
    rows = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (2 * 65536)
    header = encode_header([("a", "BF16", (rows, 65536)), ("b", "BF16", (16,))], {})
    with (tmp_path / "model.safetensors").open("wb") as f:
        f.write(header)
        f.truncate(len(header) + 2 * rows * 65536)
        f.seek(0, 2)
        f.write(b"\x80\x3f" * 16)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.array("b").tolist() == [0x3F80] * 16
        assert checkpoint.array("a").shape == (rows, 65536)


def test_files_that_changed_are_told_when_the_checkpoint_is_left(source: Path, tmp_path: Path) -> None:
    own = shutil.copytree(source, tmp_path / "own")
    says = r"changed while it was read: it had [\d,]+ bytes and has 9"
    with pytest.raises(SourceChangedError, match=says), Checkpoint(own):
        next(own.glob("*.safetensors")).write_bytes(b"truncated")
    with pytest.raises(ZeroDivisionError), Checkpoint(source):  # an error of the body is not hidden
        raise ZeroDivisionError

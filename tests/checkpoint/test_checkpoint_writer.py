"""Written shards, and the manifest, which contains a hash of itself."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from nemoquant.checkpoint.header import TensorInfo
from nemoquant.checkpoint.manifest import (
    canonical,
    file_sha256,
    pack_dtypes,
    read_manifest,
    tensor_table_sha256,
    write_manifest,
)
from nemoquant.checkpoint.writer import ShardWriter
from nemoquant.errors import CheckpointError
from nemoquant.model.roles import TensorSpec

# --- shards


def test_a_shard_to_the_byte(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with ShardWriter(
        file, [("u", "U8", (2, 2)), ("s", "F32", ()), ("h", "BF16", (3,)), ("e", "F32", (0,))]
    ) as writer:
        writer.write(np.array([[1, 2], [3, 4]], np.uint8))
        writer.write(np.array(1, np.float32))
        writer.write(np.array([0x3F80, 0x8000], np.uint16))
        writer.write(np.array([0x7FC0], np.uint16))  # a tensor may come in pieces
        writer.write(np.zeros(0, np.float32))
    written = file.read_bytes()
    assert written[4096:] == b"\1\2\3\4" + b"\0\0\x80\x3f" + b"\x80\x3f\0\x80\xc0\x7f"
    assert struct.unpack("<Q", written[:8]) == (4088,)
    assert writer.sha256 == hashlib.sha256(written).hexdigest()
    with safe_open(file, "np") as f:
        assert f.metadata() == {"format": "pt"}  # transformers refuses a file without it
        assert f.get_tensor("u").tolist() == [[1, 2], [3, 4]]


def test_an_array_in_another_memory_order(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x.safetensors", [("t", "F32", (2, 3))]) as writer:
        writer.write(np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)))
    with safe_open(tmp_path / "x.safetensors", "np") as f:
        assert f.get_tensor("t").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        ShardWriter(file, [("t", "U8", (1,))])
    assert file.read_bytes() == b"mine"


def test_too_many_bytes(tmp_path: Path) -> None:
    refused = pytest.raises(AssertionError, match=r"x\.safetensors: more bytes than its header announces")
    with refused, ShardWriter(tmp_path / "x.safetensors", [("t", "U8", (3,))]) as writer:
        writer.write(np.zeros(4, np.uint8))


def test_too_few_bytes(tmp_path: Path) -> None:
    refused = pytest.raises(AssertionError, match=r"x\.safetensors: 2 bytes are missing")
    with refused, ShardWriter(tmp_path / "x.safetensors", [("t", "U8", (3,))]) as writer:
        writer.write(np.zeros(1, np.uint8))


def test_an_error_inside_is_not_covered_up(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyError, match="mine"),
        ShardWriter(tmp_path / "x.safetensors", [("t", "U8", (3,))]) as writer,
    ):
        raise KeyError("mine")
    assert writer.sha256 == ""


# --- hashes


@pytest.mark.parametrize("size", [0, 1, (8 << 20) - 1, 8 << 20, (8 << 20) + 1])
def test_file_sha256(tmp_path: Path, size: int) -> None:
    data = (b"0123456789abcdef-" * (size // 17 + 1))[:size]
    (tmp_path / "f").write_bytes(data)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(data).hexdigest()


TABLE = {
    "b": TensorInfo("b", "F32", (), Path("1"), 100, 104),
    "a": TensorInfo("a", "BF16", (2, 3), Path("1"), 104, 116),
}


def test_the_identity_of_a_tensor_table() -> None:
    expected = hashlib.sha256(b'[["a", "BF16", [2, 3]], ["b", "F32", []]]').hexdigest()
    assert tensor_table_sha256(TABLE) == expected
    moved = {
        "a": TensorInfo(
            "fused", "BF16", (2, 3), Path("2"), 0, 12
        ),  # in another file and order, under another name there
        "b": TensorInfo("b", "F32", (), Path("3"), 0, 4),
    }
    assert tensor_table_sha256(moved) == expected


@pytest.mark.parametrize(
    "changed",
    [
        {"a": TABLE["a"]},
        TABLE | {"c": TABLE["a"]},
        TABLE | {"a": TensorInfo("a", "F16", (2, 3), Path("1"), 104, 116)},
        TABLE | {"a": TensorInfo("a", "BF16", (3, 2), Path("1"), 104, 116)},
    ],
    ids=["less", "more", "dtype", "shape"],
)
def test_another_tensor_table(changed: dict[str, TensorInfo]) -> None:
    assert tensor_table_sha256(changed) != tensor_table_sha256(TABLE)


def test_dtypes_in_short() -> None:
    table = [
        TensorSpec(name, "norm", (1,), dtype=dtype)
        for name, dtype in (("a", "F32"), ("b", "BF16"), ("c", "BF16"))
    ]
    assert pack_dtypes(table) == {"usual": "BF16", "others": {"a": "F32"}}
    assert pack_dtypes(table[:1]) == {"usual": "F32", "others": {}}


# --- the manifest

DATA: dict[str, Any] = {
    "schema": 2,
    "nemoquant": "0.1.0",
    "files": {"b": "22", "a": "11"},
    "notes": ["é", 0.5, None],
    "plan": {},
    "source": {},
    "shard_bytes": 5,
}
CANONICAL = b"""{
 "files": {
  "a": "11",
  "b": "22"
 },
 "nemoquant": "0.1.0",
 "notes": [
  "\\u00e9",
  0.5,
  null
 ],
 "plan": {},
 "schema": 2,
 "shard_bytes": 5,
 "source": {}
}"""


def test_canonical_bytes() -> None:
    assert canonical(DATA) == CANONICAL
    assert canonical(dict(reversed(DATA.items())) | {"sha256": "what it was"}) == CANONICAL


def test_written_and_read(tmp_path: Path) -> None:
    write_manifest(tmp_path, DATA)
    assert [p.name for p in tmp_path.iterdir()] == ["nemoquant.json"]
    digest = hashlib.sha256(CANONICAL).hexdigest()
    assert json.loads((tmp_path / "nemoquant.json").read_bytes()) == DATA | {"sha256": digest}
    assert read_manifest(tmp_path) == DATA | {"sha256": digest}
    assert "sha256" not in DATA


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    for folder, data in (("x", DATA), ("y", dict(reversed(DATA.items())) | {"sha256": "old"})):
        (tmp_path / folder).mkdir()
        write_manifest(tmp_path / folder, data)
    assert (tmp_path / "x/nemoquant.json").read_bytes() == (tmp_path / "y/nemoquant.json").read_bytes()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"a": "11"', '"a": "12"'),
        ('"a": "11",', ""),
        ('"schema": 2', '"schema": 2, "more": 0'),
        ("0.5", "0.50000001"),
        ('"sha256": "', '"sha256": "0'),
        ('"sha256"', '"sha257"'),
    ],
    ids=["a value", "a file less", "a key more", "a number", "the hash", "no hash"],
)
def test_tampering_is_refused(tmp_path: Path, old: str, new: str) -> None:
    write_manifest(tmp_path, DATA)
    file = tmp_path / "nemoquant.json"
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    with pytest.raises(
        CheckpointError, match=r"nemoquant\.json was changed after it was written: its sha256 does not fit"
    ):
        read_manifest(tmp_path)


def test_white_space_is_not_content(tmp_path: Path) -> None:
    write_manifest(tmp_path, DATA)
    file = tmp_path / "nemoquant.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=8))
    assert read_manifest(tmp_path)["files"] == {"a": "11", "b": "22"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"nemoquant\.json does not exist; expected a checkpoint that nemoquant wrote"),
        ("{", r"nemoquant\.json cannot be read \(.*\); expected JSON"),
        ("[]", r"nemoquant\.json: schema 'list', expected 2; use the version of nemoquant that wrote it"),
        ("{}", r"nemoquant\.json: schema None, expected 2"),
        ('{"schema": 1}', r"nemoquant\.json: schema 1, expected 2"),
        ('{"schema": 2}', r"nemoquant\.json was changed after it was written"),
    ],
)
def test_no_manifest(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "nemoquant.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)

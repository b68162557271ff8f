"""Written shards, and hashes of files and tensor tables."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from nemoquant.checkpoint.header import TensorInfo
from nemoquant.checkpoint.manifest import (
    file_sha256,
    pack_dtypes,
    tensor_table_sha256,
)
from nemoquant.checkpoint.writer import ShardWriter
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

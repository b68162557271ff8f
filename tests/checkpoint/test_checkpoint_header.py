"""safetensors headers, written by hand, and every error that a header can have."""

import json
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from nemoquant.checkpoint import header
from nemoquant.checkpoint.header import TensorInfo, encode_header, read_header
from nemoquant.errors import HeaderError, NemoquantError

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a header (an object, or text that is written unchanged) and data.

    8 bytes of size, little endian, then the JSON, then the data.
    """

    def write(header: Any, data: bytes = b"", size: int | None = None) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        file = tmp_path / "some.safetensors"
        file.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
        return file

    return write


def tensor(begin: int, end: int, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_a_header_to_the_byte(tmp_path: Path) -> None:
    text = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[],"data_offsets":[6,10]},'
        b'"a":{"dtype":"BF16","shape":[3,1],"data_offsets":[0,6]}}'
    )
    assert len(text) == 141
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"\x8d\0\0\0\0\0\0\0" + text + b"0123456789")
    tensors, metadata = read_header(file)
    assert tensors == {
        "b": TensorInfo("b", "F32", (), file, 8 + 141 + 6, 8 + 141 + 10),
        "a": TensorInfo("a", "BF16", (3, 1), file, 8 + 141, 8 + 141 + 6),
    }
    assert [t.nbytes for t in tensors.values()] == [4, 6]
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize("header", [b"{}", b'{"__metadata__":{"a":"b"}}', b"{}      "])
def test_a_file_without_tensors(make: Make, header: bytes) -> None:
    assert read_header(make(header))[0] == {}


def test_empty_tensors_lie_between_others(make: Make) -> None:
    file = make({"e": tensor(2, 2, "F32", [0, 7]), "a": tensor(0, 2), "b": tensor(2, 3)}, b"aab")
    assert {n: t.nbytes for n, t in read_header(file)[0].items()} == {"e": 0, "a": 2, "b": 1}


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("BOOL", 1),
        ("U8", 1),
        ("I8", 1),
        ("F8_E5M2", 1),
        ("F8_E4M3", 1),
        ("F8_E8M0", 1),
        ("I16", 2),
        ("U16", 2),
        ("F16", 2),
        ("BF16", 2),
        ("I32", 4),
        ("U32", 4),
        ("F32", 4),
        ("F64", 8),
        ("I64", 8),
        ("U64", 8),
    ],
)
def test_item_sizes(make: Make, dtype: str, size: int) -> None:
    assert (
        read_header(make({"t": tensor(0, 3 * size, dtype, [3])}, bytes(3 * size)))[0]["t"].nbytes == 3 * size
    )


ONE = tensor(0, 4)
WRONG: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{", b"", "some.safetensors: header is not valid JSON"),
    "not UTF-8": (b'{"\xff":1}', b"", "some.safetensors: header is not valid JSON"),
    "no text at all": (b"", b"", "some.safetensors: header is not valid JSON"),
    "nested beyond reason": (
        b"[" * 100_000,
        b"",
        "some.safetensors: header is not valid JSON (it is nested too deeply",
    ),
    "a list": ([], b"", "some.safetensors: header is a JSON list, expected an object"),
    "a string": ("x", b"", "some.safetensors: header is a JSON str, expected an object"),
    "metadata that are a list": ({"__metadata__": []}, b"", "`__metadata__` is []; expected texts by name"),
    "metadata with a number": (
        {"__metadata__": {"format": 1}},
        b"",
        "`__metadata__` is {'format': 1}; expected texts by name",
    ),
    "half a character": (b'{"\\ud800": 1}', b"", "a string in it has half of a surrogate pair"),
    "more bytes than a number has": (
        {"t": ONE | {"shape": [2**62] * 64}},
        b"0000",
        "tensor 't' has 4 bytes, expected more than any file has for U8 [4611686018427387904, ",
    ),
    "a tensor named twice": (b'{"t":{},"t":{}}', b"", "header is not valid JSON (duplicate key 't')"),
    "a key of an entry twice": (
        b'{"t":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        b"0",
        "(duplicate key 'dtype')",
    ),
    "an entry that is no object": (
        {"t": 3},
        b"",
        "tensor 't' has the entry 3, expected dtype, shape and data_offsets",
    ),
    "a key too few": ({"t": {"dtype": "U8", "shape": []}}, b"", "tensor 't' has the entry"),
    "a key too many": ({"t": ONE | {"more": 1}}, b"0000", "tensor 't' has the entry"),
    "an unknown dtype": (
        {"t": ONE | {"dtype": "F4"}},
        b"0000",
        "tensor 't' has dtype 'F4', expected one of BOOL, U8,",
    ),
    "a dtype that is a list": (
        {"t": ONE | {"dtype": ["U8"]}},
        b"0000",
        "tensor 't' has dtype ['U8'], expected one of",
    ),
    "a negative size": (
        {"t": ONE | {"shape": [-4]}},
        b"0000",
        "tensor 't' has shape [-4], expected a list of sizes",
    ),
    "a fractional size": ({"t": ONE | {"shape": [4.0]}}, b"0000", "tensor 't' has shape [4.0], expected"),
    "a size that is a flag": (
        {"t": ONE | {"shape": [True, 4]}},
        b"0000",
        "tensor 't' has shape [True, 4], expected",
    ),
    "a shape that is a number": ({"t": ONE | {"shape": 4}}, b"0000", "tensor 't' has shape 4, expected"),
    "sizes too long to print": (
        {"t": ONE | {"shape": [10**4000, 10**4000]}},
        b"0000",
        "tensor 't' has shape [1000",
    ),
    "sizes whose product is": ({"t": ONE | {"shape": [2**62] * 300}}, b"0000", "tensor 't' has shape [4611"),
    "one offset": (
        {"t": ONE | {"data_offsets": [0]}},
        b"0000",
        "tensor 't' has data_offsets [0], expected [begin, end]",
    ),
    "offsets backwards": (
        {"t": ONE | {"data_offsets": [4, 0]}},
        b"0000",
        "tensor 't' has data_offsets [4, 0], expected",
    ),
    "a negative offset": (
        {"t": ONE | {"data_offsets": [-4, 0]}},
        b"0000",
        "tensor 't' has data_offsets [-4, 0], expected",
    ),
    "an offset that is text": (
        {"t": ONE | {"data_offsets": ["0", 4]}},
        b"0000",
        "tensor 't' has data_offsets ['0', 4]",
    ),
    "a size unlike its shape": (
        {"t": ONE | {"shape": [3], "dtype": "F16"}},
        b"0000",
        "tensor 't' has 4 bytes, expected 6 for F16 [3]",
    ),
    "an overlap": (
        {"a": tensor(0, 4), "t": tensor(2, 6)},
        b"000000",
        "tensor 't' overlaps the tensor before it",
    ),
    "the same bytes twice": (
        {"a": tensor(0, 4), "t": tensor(0, 4)},
        b"0000",
        "tensor 't' overlaps the tensor before it",
    ),
    "a hole": (
        {"a": tensor(0, 4), "t": tensor(7, 9)},
        b"000000000",
        "tensor 't' leaves a hole of 3 bytes before it",
    ),
    "a hole at the front": ({"t": tensor(1, 3)}, b"000", "tensor 't' leaves a hole of 1 bytes before it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused(make: Make, case: str) -> None:
    header, data, message = WRONG[case]
    with pytest.raises(HeaderError) as error:
        read_header(make(header, data))
    assert str(error.value).startswith("some.safetensors: ")
    assert message in str(error.value)


@pytest.mark.parametrize("cut", [1, 1000])
def test_data_beyond_the_file(make: Make, cut: int) -> None:
    with pytest.raises(
        HeaderError,
        match=r"some\.safetensors: its tensors end at byte 2,0\d\d, but the file has .* may be truncated",
    ):
        read_header(make({"t": tensor(0, 2000)}, bytes(2000 - cut)))


def test_trailing_bytes(make: Make) -> None:
    with pytest.raises(
        HeaderError, match=r"some\.safetensors: its tensors end at byte \d+, but the file has \d+"
    ):
        read_header(make({"t": tensor(0, 4)}, bytes(5)))


@pytest.mark.parametrize("content", [b"", b"\1\0\0\0\0\0\0", b"<html>not found</html>"])
def test_not_a_safetensors_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "some.safetensors"
    file.write_bytes(content)
    with pytest.raises(
        HeaderError, match=r"some\.safetensors: header size .* does not fit .* the download may be incomplete"
    ):
        read_header(file)


def test_a_header_larger_than_the_file(make: Make) -> None:
    with pytest.raises(
        HeaderError, match=r"some\.safetensors: header size 3 does not fit the file's 10 bytes"
    ):
        read_header(make(b"{}", size=3))


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    with file.open("wb") as f:
        f.write(struct.pack("<Q", 100_000_001))
        f.truncate(200_000_000)  # sparse: it takes no disk space
    with pytest.raises(
        HeaderError,
        match=r"some\.safetensors: header size is 100,000,001; expected at most 100,000,000 bytes",
    ):
        read_header(file)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match=r"gone\.safetensors: cannot be read \(No such file or directory\)"):
        read_header(tmp_path / "gone.safetensors")


GOOD = (
    b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
    b'"b":{"dtype":"F16","shape":[1,2],"data_offsets":[4,8]}}'
)
PIECES = [
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b"0",
    b"9",
    b"-",
    b"1e9",
    b"null",
    b"\xff",
    b",",
    b'"U8"',
    b"1" * 5000,
]


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), edits=st.integers(1, 4))
def test_no_damage_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, seed: int, edits: int
) -> None:
    rng, text = random.Random(seed), bytearray(GOOD)
    for _ in range(edits):
        at = rng.randrange(len(text))
        text[at : at + rng.randrange(3)] = rng.choice(PIECES)
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    try:
        tensors, _ = read_header(file)
    except NemoquantError:
        return
    end = 8 + len(text)
    assert sum(t.nbytes for t in tensors.values()) == 8
    assert all(end <= t.start <= t.end <= end + 8 for t in tensors.values())


# --- encode_header


@pytest.mark.parametrize(
    "longest", [1, 3_850, *range(3_870, 3_960), 9_000]
)  # crosses the 4096 step byte by byte
def test_data_begin_at_a_multiple_of_4096(longest: int) -> None:
    header = encode_header([("n" * longest, "F32", (2, 3))], {"format": "pt"})
    (size,) = struct.unpack("<Q", header[:8])
    text = header[8:].decode("ascii").rstrip(" ")
    assert len(header) == 8 + size
    assert len(header) % 4096 == 0
    assert len(header) - 4096 < 8 + len(text) <= len(header)  # at most one page
    assert json.loads(text) == {
        "__metadata__": {"format": "pt"},
        "n" * longest: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    }


def test_offsets_follow_the_given_order() -> None:
    tensors = [("z", "U8", (3,)), ("a", "F32", ()), ("m", "BF16", (2, 0)), ("b", "F8_E4M3", (2, 2))]
    entries = json.loads(encode_header(tensors, {})[8:])
    assert list(entries) == ["__metadata__", "z", "a", "m", "b"]
    assert [entries[n]["data_offsets"] for n in "zamb"] == [[0, 3], [3, 7], [7, 7], [7, 11]]


def test_safetensors_reads_it_back(tmp_path: Path) -> None:
    header = encode_header(
        [("one", "F32", (2, 2)), ("zwei é", "U8", (3,)), ("scalar", "F32", ())], {"format": "pt"}
    )
    data = np.array([1, 2, 3, 4], "<f4").tobytes() + b"\x07\x08\x09" + np.array(-0.5, "<f4").tobytes()
    file = tmp_path / "x.safetensors"
    file.write_bytes(header + data)
    with safe_open(file, "np") as f:
        assert set(f.keys()) == {"one", "zwei é", "scalar"}
        assert f.metadata() == {"format": "pt"}
        assert f.get_tensor("one").tolist() == [[1, 2], [3, 4]]
        assert f.get_tensor("zwei é").tolist() == [7, 8, 9]
        assert f.get_tensor("scalar").shape == ()
        assert f.get_tensor("scalar") == -0.5
    ours, metadata = read_header(file)
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {
        "one": ("F32", (2, 2)),
        "zwei é": ("U8", (3,)),
        "scalar": ("F32", ()),
    }
    assert ours["one"].start == len(header)
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize("inner", [False, True])
def test_a_key_that_stands_twice_among_many_is_found_at_once(make: Make, inner: bool) -> None:
    keys = ",".join(f'"k{i}":1' for i in range(20_000))
    twice = "{" + keys + "," + keys + "}"
    began = time.process_time()
    with pytest.raises(HeaderError, match=r"duplicate key 'k0'"):
        read_header(make((f'{{"t":{twice}}}' if inner else twice).encode()))
    assert time.process_time() - began < 1


def test_more_tensors_than_any_model_has(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_TENSORS", 2)
    assert len(read_header(make({"a": tensor(0, 1), "b": tensor(1, 1)}, b"0"))[0]) == 2
    with pytest.raises(HeaderError, match="header has 3 tensors; expected at most 2"):
        read_header(make({"a": tensor(0, 1), "b": tensor(1, 1), "c": tensor(1, 1)}, b"0"))


@pytest.mark.parametrize("entry", [1, ONE | {"dtype": "x" * 90_000}, ONE | {"shape": ["x" * 90_000] * 90}])
def test_a_message_cuts_long_names_and_values(make: Make, entry: Any) -> None:
    with pytest.raises(HeaderError) as error:
        read_header(make({"n" * 100_000: entry}, b"0000"))
    assert len(str(error.value)) < 600


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(HeaderError, match="cannot be read"):
        read_header(tmp_path / "pipe.safetensors")

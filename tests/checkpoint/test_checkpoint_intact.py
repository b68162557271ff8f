"""Whether shards are what a manifest lists: hashed once, in the background, remembered, and given up soon."""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemoquant.checkpoint import intact
from nemoquant.checkpoint.intact import Hashing, Intact, Reading, check_settings, hash_once
from nemoquant.errors import CheckpointError

FILES = {
    "config.json": b"{}",
    "model.safetensors.index.json": b"index",
    "tokenizer.json": b"words",
    "README.md": b"card",
    "model.onnx": b"graph",
    "a.safetensors": b"a" * 3_000_000,
    "b.safetensors": b"b" * 5,
}


@pytest.fixture
def stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test alone keeps stamps."""
    monkeypatch.setattr(intact, "stamp_folder", lambda: tmp_path / "stamps")
    return tmp_path / "stamps"


@pytest.fixture
def folder(tmp_path: Path, stamps: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: ARG001
    """A folder with these files, whose times are taken to be old enough for a stamp."""
    monkeypatch.setattr(intact, "SETTLED", 0.0)
    made = tmp_path / "made"
    made.mkdir()
    for name, content in FILES.items():
        (made / name).write_bytes(content)
    return made


DATA = {"files": {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}}


def said(folder: Path, data: Any = DATA) -> list[str]:
    """What ``hash_once`` says before it reads; nothing where a stamp spared that."""
    texts: list[str] = []
    hash_once(folder, data, texts.append)
    return texts


def test_shards_are_hashed_once(folder: Path, stamps: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert said(folder) == [f"{folder}: reading its shards, 3.00 MB, to hold them against nemoquant.json"]
    assert said(folder) == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "no stamp in the checkpoint"
    assert any(stamps.iterdir())


def test_of_progress(folder: Path) -> None:
    seen: list[tuple[str, int, int, str]] = []
    hash_once(folder, DATA, progress=lambda *given: seen.append(given))
    assert all(stage == "hash" and 0 <= done <= total == 3_000_005 for stage, done, total, _ in seen)


def rewritten(path: Path, content: bytes) -> None:
    """The same time of modification: only the system's own time of change tells."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path, content: bytes) -> None:
    status = path.stat()
    new = path.with_name("new")
    rewritten(path, content)
    new.write_bytes(content)
    new.rename(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("write", [Path.write_bytes, rewritten, replaced])
def test_a_change_is_found_whatever_was_remembered(folder: Path, write: Callable[..., Any]) -> None:
    said(folder)
    write(folder / "b.safetensors", b"bbbbc")
    with pytest.raises(CheckpointError) as caught:
        said(folder)
    assert str(caught.value) == (
        f"{folder} is damaged: b.safetensors was changed: its sha256 is not the manifest's; expected what "
        f"its nemoquant.json lists: copy it there again, or quantize again (`nemoquant verify {folder}` "
        f"checks everything)"
    )
    write(folder / "b.safetensors", FILES["b.safetensors"])
    assert said(folder) != [], "the same content in a file of another time is read again"
    assert said(folder) == []


def test_another_manifest_is_another_question(folder: Path) -> None:
    said(folder)
    other = {"files": DATA["files"] | {"a.safetensors": "0" * 64}}
    with pytest.raises(CheckpointError, match=r"a\.safetensors was changed"):
        said(folder, other)
    assert said(folder) == [], "what other files are listed does not matter"
    assert said(folder, {"files": DATA["files"] | {"model.onnx": "0" * 64}}) == []


def test_a_missing_shard(folder: Path) -> None:
    said(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing; the manifest lists it"):
        said(folder)


def test_files_that_were_written_just_now_are_not_remembered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the resolution of the file system's clock a second write would not show."""
    monkeypatch.setattr(intact, "SETTLED", 60.0)
    assert said(folder) != []
    assert said(folder) != []


def test_a_folder_that_is_renamed_holds_the_same_files(folder: Path) -> None:
    assert said(folder) != []
    assert said(folder.rename(folder.with_name("renamed"))) == []


def test_stamps_that_were_not_used_for_long_are_dropped(
    folder: Path, stamps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intact, "KEPT", 2)
    said(folder)
    (first,) = stamps.iterdir()
    others = [stamps / f"{number:032x}{end}" for number, end in ((1, ".json"), (2, ".json.partial"))]
    theirs = stamps / "notes.json"
    for path in (theirs, *others, first):
        path.touch()
        os.utime(path, (1000, 1000))
    assert said(folder) == [], "which counts as used"
    (folder / "b.safetensors").touch()
    assert said(folder) != []
    left = set(stamps.iterdir())
    assert {first, theirs} < left and len(left) == 3, "the two that were used last"
    assert said(folder) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"a.safetensors": []}'])
def test_stamps_that_cannot_be_used(folder: Path, stamps: Path, content: bytes) -> None:
    said(folder)
    (stamp,) = stamps.iterdir()
    stamp.write_bytes(content)
    assert said(folder) != []
    assert said(folder) == []


def test_without_a_place_for_stamps(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(intact, "stamp_folder", lambda: tmp_path / "file/stamps")
    assert said(folder) != []
    assert said(folder) != []

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(intact, "stamp_folder", homeless)
    assert said(folder) != []


# --- what is checked before something is signed


def test_still_intact(folder: Path) -> None:
    found = hash_once(folder, DATA)
    found.check(DATA)
    (folder / "README.md").write_text("my own words")
    (folder / "model.onnx").write_text("another graph")
    found.check(DATA)


@pytest.mark.parametrize(
    "name", ["a.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"]
)
def test_no_longer_intact(folder: Path, name: str) -> None:
    found = hash_once(folder, DATA)
    rewritten(folder / name, FILES[name][:-1] + b"?")
    with pytest.raises(CheckpointError, match=name):
        found.check(DATA)


def test_a_manifest_that_was_changed_meanwhile(folder: Path) -> None:
    found = hash_once(folder, DATA)
    for files in (DATA["files"] | {"a.safetensors": "0" * 64}, DATA["files"] | {"c.safetensors": "0" * 64}):
        with pytest.raises(CheckpointError, match=r"nemoquant\.json changed since the checkpoint was read"):
            found.check({"files": files})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_manifest_without_what_every_checkpoint_has(folder: Path, name: str) -> None:
    files = {other: digest for other, digest in DATA["files"].items() if other != name}
    with pytest.raises(CheckpointError, match=rf"nemoquant\.json does not list {name}; quantize again"):
        check_settings(folder, {"files": files})


# --- in the background


def test_damage_is_seen_before_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file is known to be damaged while another is still being read."""
    (folder / "a.safetensors").write_bytes(b"damaged")
    held = threading.Event()
    whole = intact.file_sha256

    def slow(path: Path, count: Any) -> str:
        if path.name == "b.safetensors":
            held.wait(60)
        return whole(path, count)

    monkeypatch.setattr(intact, "file_sha256", slow)
    with Reading({folder: DATA}) as reading:
        with pytest.raises(CheckpointError, match=r"a\.safetensors was changed"):
            reading.finish()
        with pytest.raises(CheckpointError, match=r"a\.safetensors was changed"):
            reading.check()
        held.set()


def test_a_file_that_changes_after_it_was_hashed(folder: Path) -> None:
    with Reading({folder: DATA}) as reading:
        while reading._hashing.unfinished(1):
            pass
        (folder / "b.safetensors").write_bytes(b"later")
        with pytest.raises(CheckpointError, match=r"b\.safetensors was changed meanwhile"):
            reading.finish()


def test_several_folders(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.safetensors").write_bytes(b"x")
    data = {"files": {"a.safetensors": hashlib.sha256(b"x").hexdigest()}}
    with Reading({folder: DATA, other: data}) as reading:
        found = reading.finish()
    assert {path: sorted(one.shards) for path, one in found.items()} == {
        folder: ["a.safetensors", "b.safetensors"],
        other: ["a.safetensors"],
    }
    with (
        Reading({folder: DATA, other: DATA}) as reading,
        pytest.raises(CheckpointError, match="other is dam"),
    ):
        reading.finish()


def test_what_was_hashed_just_now(folder: Path) -> None:
    """It is not read again, only looked at; what a stamp says was read another time."""
    for again in (False, True):
        loaded = hash_once(folder, DATA)
        with Reading({folder: DATA}, known=[loaded]) as reading:
            assert reading._total == (3_000_005 if again else 0)
            assert reading.finish()[folder].seen == loaded.seen
    loaded = Intact(folder, loaded.shards, loaded.seen)
    (folder / "b.safetensors").write_bytes(b"later")
    with (
        Reading({folder: DATA}, known=[loaded]) as reading,
        pytest.raises(CheckpointError, match=r"b\.safetensors was changed meanwhile"),
    ):
        reading.finish()


def test_nothing_to_read() -> None:
    with Reading({}) as reading:
        reading.check()
        assert reading.finish() == {}


def test_leaving_ends_the_threads_soon(tmp_path: Path) -> None:
    """A file that would take minutes, and more of them in the queue."""
    with (tmp_path / "long").open("wb") as f:
        f.truncate(1 << 40)
    files = {tmp_path / "long": ["0" * 64], tmp_path / "." / "x" / ".." / "long": ["0" * 64]}
    began, pieces, before = time.monotonic(), [], set(threading.enumerate())

    def count(nbytes: int) -> None:
        pieces.append(nbytes)
        if len(pieces) == 3:
            started.set()

    started = threading.Event()
    with pytest.raises(KeyboardInterrupt), Hashing(files, 2, count):
        assert started.wait(60)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 60
    assert set(threading.enumerate()) <= before

"""What a power cut would leave: every name and every state only once what it stands for is on the disk.

The calls are recorded that wait for the disk or change a name; what was not waited for counts as lost.
"""

import json
import os
import stat
from pathlib import Path

import pytest

from nemoquant.api import RunOptions, export_onnx, quantize
from nemoquant.checkpoint.folder import FOLDER, HIDDEN, STATE

RECORDED = ("fsync", "fdatasync", "rename", "replace", "unlink", "remove", "rmdir", "pwrite")


class Disk:
    """What is on the disk: content of files by inode, with their sizes, and names of folders."""

    def __init__(self) -> None:
        self.synced: dict[int, int] = {}
        self.renames: list[tuple[str, str]] = []
        self.problems: list[str] = []
        self._unsynced_names: set[str] = set()

    def fsync(self, handle) -> None:
        status, path = os.fstat(handle), str(Path(f"/proc/self/fd/{handle}").readlink())
        self.synced[status.st_ino] = status.st_size
        self._unsynced_names.discard(path)

    fdatasync = fsync

    def pwrite(self, handle, data, offset) -> None:  # noqa: ARG002
        self.synced.pop(os.fstat(handle).st_ino, None)

    def rename(self, source, target) -> None:
        source, target = Path(source), Path(target)
        if self._unsynced_names:
            self.problems.append(f"{target}: names in {self._unsynced_names} were not waited for")
        for path in [source, *(sorted(source.rglob("*")) if source.is_dir() else [])]:
            status = path.stat()
            if self.synced.get(status.st_ino) != status.st_size and path.name != FOLDER:
                self.problems.append(f"{source.name} -> {target.name}: {path.name} is not on the disk")
        if target.name == STATE:
            self.check_state(json.loads(source.read_text())["state"], target.parent)
        self._unsynced_names.add(str(target.parent))
        self.renames.append((source.name, target.name))

    replace = rename

    def check_state(self, state, folder) -> None:
        """Everything that a state names must be there already."""
        named = [folder.parent / name for name in state.get("shards", ())]
        calibration = state.get("calibration") or {}
        if "hidden" in calibration:
            named.append(folder / HIDDEN[calibration["hidden"]])
        if state.get("calibrated"):
            named.append(folder.parent / "nemoquant_scales.json")
        for path in named:
            status = path.stat()
            if self.synced.get(status.st_ino) != status.st_size:
                self.problems.append(f"the state names {path.name}, which is not on the disk")

    def unlink(self, path, **_) -> None:
        if self._unsynced_names and str(path).endswith(STATE):
            self.problems.append(f"{path} is removed before OUT has its name on the disk")

    remove = rmdir = unlink


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    for name in RECORDED:
        real, record = getattr(os, name), getattr(disk, name)
        late = name in ("rename", "replace", "unlink", "remove", "rmdir")

        def call(*arguments, real=real, record=record, late=late, **named):
            if late:
                record(*arguments, **named)
                return real(*arguments, **named)
            result = real(*arguments, **named)
            record(*arguments, **named)
            return result

        monkeypatch.setattr(os, name, call)
    return disk


def test_a_run(disk, source, token_rows, tmp_path):
    (source / "LICENSE").write_text("licence\n")
    options = RunOptions(method="max", data=token_rows, dtype="float32", threads=1, shard_bytes=30_000)
    quantize(source, tmp_path / "new/out", "nvfp4", options)
    assert disk.problems == []
    targets = [target for _, target in disk.renames]
    assert targets.count(STATE) == 1 + 6 + 1 + len(list((tmp_path / "new/out").glob("*.safetensors")))
    assert {"nemoquant.json", "nemoquant_scales.json", "out"} <= set(targets)
    for path in (tmp_path / "new/out").iterdir():
        assert disk.synced[path.stat().st_ino] == path.stat().st_size, path.name


def test_a_copy_with_its_graph(disk, source, token_rows, tmp_path):
    out = quantize(source, tmp_path / "out", "fp8", RunOptions(method="max", data=token_rows, threads=1)).out
    export_onnx(out, tmp_path / "copy")
    assert disk.problems == []
    assert ("copy.partial", "copy") in disk.renames


def test_the_test_finds_what_is_missing(disk, source, token_rows, tmp_path, monkeypatch):
    """Without any of the waits there are problems."""
    options = RunOptions(method="max", data=token_rows, dtype="float32", threads=1, shard_bytes=30_000)
    for number, place in enumerate(
        ("files.close_synced", "checkpoint.writer.close_synced", "files.sync_folder", "calibrate.hidden.os")
    ):
        with monkeypatch.context() as patch:
            stand_in = Unsynced() if place.endswith(".os") else leave
            patch.setattr(f"nemoquant.{place}", stand_in)
            if place == "files.sync_folder":
                patch.setattr("nemoquant.checkpoint.making.sync_folder", leave)
            disk.problems.clear()
            quantize(source, tmp_path / str(number), "nvfp4", options)
        assert disk.problems, place


def leave(place) -> None:
    """Stands in for a wait: a file is closed, a folder left alone."""
    if not isinstance(place, Path):
        place.close()


class Unsynced:
    """The module os, with an fsync that does nothing."""

    def __getattr__(self, name):
        return getattr(os, name)

    def fsync(self, handle) -> None:
        pass


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(mask, source, token_rows, tmp_path):
    (source / "LICENSE").write_text("licence\n")
    (source / "LICENSE").chmod(0o600)
    before = os.umask(mask)
    try:
        options = RunOptions(method="max", data=token_rows, dtype="float32", threads=1)
        out = quantize(source, tmp_path / "out", "fp8", options).out
        export_onnx(out)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    assert modes == {0o666 & ~mask}
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask

"""The manifest: its own hash, its schema, its lock, and files that are replaced together with their hash."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.processes import run_python

from nemoquant.checkpoint import manifest
from nemoquant.checkpoint.manifest import (
    canonical,
    file_sha256,
    listed,
    put_file,
    read_manifest,
    write_manifest,
)
from nemoquant.errors import CheckpointError

A, B = "1a" * 32, "2b" * 32
DATA: dict[str, Any] = {
    "schema": 2,
    "nemoquant": "0.1.0",
    "calibration": None,
    "files": {"b": B, "a": A},
    "notes": ["é", 0.5, None],
    "plan": {"sha256": A, "recipe": {"name": "fp8"}, "scale_groups": True},
    "shard_bytes": 5,
    "source": {
        "config_sha256": A,
        "tensor_table_sha256": B,
        "dtypes": {"usual": "BF16", "others": {"x": "F32"}},
        "units": {"x": "3c" * 16},
    },
    "warnings": [],
}
CANONICAL = f"""{{
 "calibration": null,
 "files": {{
  "a": "{A}",
  "b": "{B}"
 }},
 "nemoquant": "0.1.0",
 "notes": [
  "\\u00e9",
  0.5,
  null
 ],
 "plan": {{
  "recipe": {{
   "name": "fp8"
  }},
  "scale_groups": true,
  "sha256": "{A}"
 }},
 "schema": 2,
 "shard_bytes": 5,
 "source": {{
  "config_sha256": "{A}",
  "dtypes": {{
   "others": {{
    "x": "F32"
   }},
   "usual": "BF16"
  }},
  "tensor_table_sha256": "{B}",
  "units": {{
   "x": "{"3c" * 16}"
  }}
 }},
 "warnings": []
}}""".encode()


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
        (f'"a": "{A}"', f'"a": "{B}"'),
        (f'"a": "{A}",', ""),
        ('"schema": 2', '"schema": 2, "more": 0'),
        ("0.5", "0.50000001"),
        (' "sha256": "', ' "sha256": "0'),
        (' "sha256"', ' "sha257"'),
    ],
    ids=["a value", "a file less", "a key more", "a number", "the hash", "no hash"],
)
def test_tampering_is_refused(tmp_path: Path, old: str, new: str) -> None:
    write_manifest(tmp_path, DATA)
    file = tmp_path / "nemoquant.json"
    text = file.read_text()
    assert text.count("\n" + old if old.startswith(" ") else old) == 1
    file.write_text(text.replace("\n" + old, "\n" + new) if old.startswith(" ") else text.replace(old, new))
    with pytest.raises(
        CheckpointError, match=r"nemoquant\.json was changed after it was written: its sha256 does not fit"
    ):
        read_manifest(tmp_path)


def test_white_space_is_not_content(tmp_path: Path) -> None:
    write_manifest(tmp_path, DATA)
    file = tmp_path / "nemoquant.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=8))
    assert read_manifest(tmp_path)["files"] == {"a": A, "b": B}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"nemoquant\.json does not exist; expected a checkpoint that nemoquant wrote"),
        ("{", r"nemoquant\.json cannot be read \(.*\); expected JSON"),
        ("[]", r"nemoquant\.json: schema 'list', expected 2; use the version of nemoquant that wrote it"),
        ("{}", r"nemoquant\.json: schema None, expected 2"),
        ('{"schema": 1}', r"nemoquant\.json: schema 1, expected 2"),
        ('{"schema": true}', r"nemoquant\.json: schema True, expected 2"),
        ('{"schema": 2}', r"nemoquant\.json was changed after it was written"),
        ('{"schema": 2, "schema": 2}', r"nemoquant\.json cannot be read \(duplicate key 'schema'\)"),
        ('{"schema": "\\ud800"}', r"nemoquant\.json cannot be read \(.*surrogate pair"),
        ("[" * 100_000, r"nemoquant\.json cannot be read \(it is nested too deeply; "),
    ],
)
def test_no_manifest(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "nemoquant.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


# --- its schema


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(files=[]), "`files` is []: input should be a valid dictionary"),
        (lambda d: d["files"].update(a=1), "`files.a` is 1: input should be a valid string"),
        (
            lambda d: d["files"].update(a="11"),
            "`files.a` is '11': string should match pattern '^[0-9a-f]{64}$'",
        ),
        (lambda d: d["files"].update(a=B.upper()), "`files.a` is '2B2B"),
        *(
            (lambda d, name=name: d["files"].update({name: A}), "expected the name of a file in the folder")
            for name in ("/dev/zero", "../x", "sub/x", "..", ".", "", "x\ny", "a" * 300)
        ),
        (lambda d: d.pop("plan"), "`plan`: field required; quantize again"),
        (
            lambda d: d["plan"].update(recipe="fp8"),
            "`plan.recipe` is 'fp8': input should be a valid dictionary",
        ),
        (
            lambda d: d["plan"]["recipe"].update(name="# fp8"),
            "`plan.recipe.name` is '# fp8': string should match pattern",
        ),
        (
            lambda d: d["plan"].update(scale_groups=1),
            "`plan.scale_groups` is 1: input should be a valid boolean",
        ),
        (
            lambda d: d.update(shard_bytes=0),
            "`shard_bytes` is 0: input should be greater than or equal to 1",
        ),
        (lambda d: d.update(shard_bytes=True), "`shard_bytes` is True: input should be a valid integer"),
        (lambda d: d.update(shard_bytes=5.0), "`shard_bytes` is 5.0: input should be a valid integer"),
        (lambda d: d.update(warnings=[[]]), "`warnings.0` is []: input should be a valid string"),
        (lambda d: d.update(calibration=[]), "`calibration` is []: input should be a valid dictionary"),
        (
            lambda d: d["source"]["dtypes"].update(usual="BF17"),
            "`source.dtypes.usual` is 'BF17': expected one of BOOL, U8",
        ),
        (
            lambda d: d["source"].update(units={"x": "3c"}),
            "`source.units.x` is '3c': string should match pattern",
        ),
        (lambda d: d.update(was={"a": 1}), "`was.a` is 1: input should be a valid string"),
        (
            lambda d: d.update(files={f"{'x' * 200}{i}": "y" * 9_000 for i in range(500)}),
            "...'...",
        ),
    ],
)
def test_a_value_of_another_kind(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    data = json.loads(json.dumps(DATA))
    change(data)
    write_manifest(tmp_path, data)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/nemoquant.json is not as nemoquant writes it: `")
    assert message in text or message == "...'..."
    assert "\n" not in text and len(text) < 600


# --- files that are replaced together with their hash


def accept(data: Any) -> None:
    """A check that has nothing against any folder."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two files and their manifest."""
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "b").write_bytes(b"other")
    write_manifest(tmp_path, DATA | {"files": {name: file_sha256(tmp_path / name) for name in "ab"}})
    return tmp_path


def state(folder: Path, name: str) -> tuple[bytes | None, bool]:
    """Content of a file, and whether the manifest lists it so."""
    data, path = read_manifest(folder), folder / name
    content = path.read_bytes() if path.exists() else None
    digests = listed(data, name)
    return content, (None if content is None else hashlib.sha256(content).hexdigest()) in (digests or [None])


@pytest.mark.parametrize("name", ["a", "new"])
def test_a_file_and_its_hash_are_replaced(folder: Path, name: str) -> None:
    put_file(folder, name, b"new", accept)
    assert state(folder, name) == (b"new", True)
    data = read_manifest(folder)
    assert listed(data, name) == [hashlib.sha256(b"new").hexdigest()], "only the new one"
    assert "was" not in data
    assert state(folder, "b") == (b"other", True)


def test_a_signal_behind_the_rename_leaves_the_new_file_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one before it the file that was there."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    write = manifest.replace_bytes
    for call, content in (("close_synced", b"first"), ("sync_folder", b"new")):
        put_file(folder, "a", b"first", accept)

        def stopped(path: Path, data: bytes, call: str = call) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(f"nemoquant.files.{call}", stop)
                write(path, data)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(manifest, "replace_bytes", stopped)
            put_file(folder, "a", b"new", accept)
        assert state(folder, "a") == (content, True)


KILLED = """
import json, os, signal, sys
from pathlib import Path
import nemoquant.checkpoint.manifest_schema
from nemoquant.checkpoint.manifest import put_file

folder, name = Path(sys.argv[1]), sys.argv[2]
before = {path.name: path.read_bytes() for path in folder.iterdir()}
moment = 0

def ending(function):
    def call(*given, **options):
        global left
        for work in (lambda: None, lambda: function(*given, **options)):
            result = work()
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return result
    return call

while True:
    for path in folder.iterdir():
        path.unlink()
    for other, content in before.items():
        (folder / other).write_bytes(content)
    child = os.fork()
    if not child:
        left = moment
        for kind, calls in ((os, ("fsync", "open")), (Path, ("open", "rename", "unlink"))):
            for call in calls:
                setattr(kind, call, ending(getattr(kind, call)))
        put_file(folder, name, b"new", lambda data: None)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    files = {path.name: path.read_text() for path in folder.iterdir()}
    print(json.dumps([killed, files]))
    if not killed:
        break
    moment += 1
"""


@pytest.mark.parametrize("name", ["a", "new"])
def test_a_kill_at_any_moment_leaves_what_the_manifest_lists(folder: Path, name: str) -> None:
    """A process is killed before and after every call that opens, writes out, renames or removes."""
    moments = [json.loads(line) for line in run_python(KILLED, folder, name).stdout.splitlines()]
    assert [killed for killed, _ in moments] == [True] * (len(moments) - 1) + [False]
    assert len(moments) > 30
    seen = set()
    for moment, (_, files) in enumerate(moments):
        for path in folder.iterdir():
            path.unlink()
        for other, content in files.items():
            (folder / other).write_text(content)
        content, fits = state(folder, name)
        assert fits, (moment, files)
        seen.add(content)
        put_file(folder, name, b"newer", accept)
        assert state(folder, name) == (b"newer", True), "and what was begun does not stand in the way"
    assert seen == {b"old" if name == "a" else None, b"new"}


@pytest.mark.parametrize("last", [1, 2])
def test_a_manifest_that_cannot_be_written(last: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time nothing is written; the second time the file is, and both its hashes are listed."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls: list[Path] = []
    write = manifest.replace_text

    def full(path: Path, text: str) -> None:
        calls.append(path)
        if len(calls) == last:
            raise OSError(28, "No space left on device", str(path))
        write(path, text)

    monkeypatch.setattr(manifest, "replace_text", full)
    if last == 1:
        with pytest.raises(OSError, match="No space left"):
            put_file(folder, "a", b"new", accept)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    else:
        put_file(folder, "a", b"new", accept)
        assert state(folder, "a") == (b"new", True)
        put_file(folder, "a", b"new", accept)
        assert "was" not in read_manifest(folder), "the next write mends it"


def test_what_was_made_from_another_content_is_not_written(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="a was changed meanwhile; it is left as it is"):
        put_file(folder, "a", b"new", accept, made_from=b"what it was")
    assert state(folder, "a") == (b"old", True)
    put_file(folder, "a", b"new", accept, made_from=b"old")
    assert state(folder, "a") == (b"new", True)


def test_a_check_that_fails_leaves_everything(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refuse(data: Any) -> None:  # noqa: ARG001
        raise CheckpointError("damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        put_file(folder, "a", b"new", refuse)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_that_cannot_be_written_leaves_everything(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(path: Path, content: bytes) -> None:  # noqa: ARG001
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(manifest, "replace_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        put_file(folder, "a", b"new", accept)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


WRITES = """
import sys
from pathlib import Path
from nemoquant.checkpoint.manifest import put_file

folder, key = Path(sys.argv[1]), sys.argv[2]
for i in range(25):
    put_file(folder, f"{key}{i}", key.encode(), lambda data: None)
"""


def test_processes_at_once_lose_nothing(folder: Path) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda key: run_python(WRITES, folder, key), "xyz"))
    names = [f"{key}{i}" for key in "xyz" for i in range(25)]
    assert {name: state(folder, name)[1] for name in names} == dict.fromkeys(names, True)
    assert sorted(read_manifest(folder)["files"]) == sorted(["a", "b", *names])

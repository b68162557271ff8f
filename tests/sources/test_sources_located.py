"""Where a model is: paths, and names that the hub's cache has. The hub's own library is the oracle."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download
from support.fake_hub import commit_of
from support.hub_cache import put
from support.hub_settings import use_cache

from nemoquant.errors import HubError
from nemoquant.sources.hub import ALL, SETTINGS
from nemoquant.sources.located import located

NAME = "maker/Model-1"
OLD, NEW = commit_of(1), commit_of(2)
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, which is this machine's."""
    folder = tmp_path / "hub"
    folder.mkdir()
    use_cache(monkeypatch, folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def files() -> dict[str, bytes]:
    """Of a checkpoint; nothing here looks into its weights."""
    index = {"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    return {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        **dict.fromkeys(SHARDS, b"weights"),
    }


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def find(said) -> Callable[..., Path]:
    return lambda given, wanted=ALL, **options: located("model", given, wanted, say=said.append, **options)


def refused(find: Callable[..., Path], given: object, *parts: str) -> None:
    with pytest.raises(HubError) as caught:
        find(given)
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, (missing, str(caught.value))


@pytest.mark.parametrize("revision", [None, "main", "v1", "refs/pr/7", OLD, NEW])
def test_a_name_is_the_snapshot_that_the_hubs_library_finds(revision, cache, files, find, said):
    put(cache, NAME, files, OLD, "v1", "refs/pr/7")
    put(cache, NAME, files, NEW, "main")
    theirs = snapshot_download(NAME, revision=revision, local_files_only=True)
    for prefix in ("", "hf://"):
        name = f"{prefix}{NAME}" + (f"@{revision}" if revision else "")
        assert find(name) == Path(theirs)
    told = NAME + (f"@{revision}" if revision else "")
    assert said == [f"{told} is {theirs}"] * 2


def test_a_models_folder_in_a_cache_is_its_main_snapshot(cache, files, find, monkeypatch):
    put(cache, NAME, files, OLD, "v1")
    snapshot = put(cache, NAME, files, NEW, "main")
    root = cache / "models--maker--Model-1"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nowhere")  # any cache will do
    assert find(root) == snapshot
    monkeypatch.chdir(root)
    assert find(".") == snapshot


def test_the_only_snapshot_needs_no_name(cache, files, find):
    snapshot = put(cache, NAME, files, OLD, "v1")
    assert find(NAME) == find(cache / "models--maker--Model-1") == snapshot


def test_several_snapshots_and_none_is_main(cache, files, find):
    put(cache, NAME, files, OLD, "v1")
    put(cache, NAME, files, NEW)
    for given in (NAME, cache / "models--maker--Model-1"):
        refused(find, given, "has 2 snapshots and no refs/main", OLD, NEW, f"name one, as {NAME}@")


def test_a_model_that_the_cache_has_not(cache, find):
    refused(
        find,
        f"{NAME}@v3",
        f"{NAME}@v3: there is no file or folder of that name",
        f"the hub's cache {cache} has nothing of it",
        f"`hf download {NAME} --revision v3` or the option --download fetches it",
    )


def test_a_revision_that_the_cache_has_not(cache, files, find):
    put(cache, NAME, files, OLD, "v1")
    put(cache, NAME, files, NEW)
    refused(find, f"{NAME}@v3", f"has only v1 ({OLD[:8]}), {NEW} of it")


def test_offline_is_said(find, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(find, NAME, "once HF_HUB_OFFLINE is unset")


def test_an_existing_path_is_that_path(cache, files, find, said, tmp_path):
    put(cache, NAME, files, NEW, "main")
    here = tmp_path / NAME
    here.mkdir(parents=True)
    assert find(NAME) == Path(NAME)
    assert said == []
    assert find(NAME, download=True) == Path(NAME)
    assert said == [f"{NAME} is here, --download fetches nothing; hf://{NAME} is the model on the hub"]
    assert find(f"hf://{NAME}") == cache / "models--maker--Model-1" / "snapshots" / NEW


def test_paths_that_are_no_names_are_left_to_who_reads_them(find, said):
    for path in ("nowhere", "./maker/Model-1", "/nowhere/at/all"):
        assert find(path) == Path(path)
    assert said == []


def test_a_folder_that_only_has_such_a_name(find, tmp_path):
    folder = tmp_path / "models--maker--Model-1"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert find(folder) == folder


def test_a_whole_cache(cache, files, find):
    put(cache, "maker/B", files, OLD, "main")
    put(cache, "maker/A", files, OLD, "main")
    refused(find, cache, "is a cache with 2 models (maker/A, maker/B)", f"as {cache}/models--maker--A")


def test_missing_shards_are_named(cache, files, find, said):
    snapshot = put(cache, NAME, {k: v for k, v in files.items() if k != SHARDS[1]}, NEW, "main")
    refused(find, NAME, f"{snapshot} lacks 1 of 2 files with weights ({SHARDS[1]})", f"hf download {NAME}")
    assert find(NAME, SETTINGS) == snapshot / "config.json"
    assert "lacks 1 of 2 files with weights" in said[0]
    assert "its config alone is used" in said[0]


def test_a_blob_that_is_gone_is_a_missing_shard(cache, files, find):
    snapshot = put(cache, NAME, files, NEW, "main")
    (snapshot / SHARDS[0]).resolve().unlink()  # both have one content
    refused(find, NAME, "lacks 2 of 2", f"({SHARDS[0]}, {SHARDS[1]})")
    root = cache / "models--maker--Model-1"
    refused(find, root, f"hf download {NAME} --cache-dir {cache}`")


def test_an_older_snapshot_that_is_whole_is_named(cache, files, find):
    put(cache, NAME, files, OLD)
    put(cache, NAME, {k: v for k, v in files.items() if k not in SHARDS}, NEW, "main")
    refused(find, NAME, "lacks 2 of 2 files", f"{NAME}@{OLD} is there whole")
    assert find(f"{NAME}@{OLD}").name == OLD


@pytest.mark.parametrize(
    ("left", "part"),
    [
        (["model.safetensors.index.json"], "has no config.json"),
        (["config.json"], "lacks 1 of 1 files with weights (model.safetensors)"),
    ],
)
def test_other_files_that_are_missing(left, part, cache, files, find):
    put(cache, NAME, {name: files[name] for name in left}, NEW, "main")
    refused(find, NAME, part)


def test_an_index_whose_blob_is_gone(cache, files, find):
    snapshot = put(cache, NAME, files, NEW, "main")
    (snapshot / "model.safetensors.index.json").resolve().unlink()
    refused(find, NAME, "lacks 1 of 1 files with weights (model.safetensors.index.json)")


@pytest.mark.parametrize("text", ["../../..", "a/b", "", "\x00", "x" * 5000, "\x07"])
def test_a_ref_leads_nowhere_else(text, cache, files, find):
    put(cache, NAME, files, NEW)
    put(cache, NAME, files, OLD)
    refs = cache / "models--maker--Model-1" / "refs"
    refs.mkdir()
    (refs / "main").write_text(text)
    refused(find, NAME, "has 2 snapshots and no refs/main")

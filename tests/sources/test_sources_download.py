"""Models fetched from a hub on this machine, by the hub's own library."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, snapshot_download
from support.fake_hub import Hub, content, serving
from support.hub_cache import put
from support.hub_settings import use_cache, use_hub

from nemoquant.errors import ConfigError, HubError, Interrupted, UsageError
from nemoquant.sources import download
from nemoquant.sources.hub import ALL, SETTINGS, Wanted
from nemoquant.sources.located import located

NAME = "maker/Model-1"
USED = {
    "README.md": b"---\nlicense: mit\n---\n",
    "LICENSE": b"text of a licence",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{ }",
    "special_tokens_map.json": b"{  }",
    "chat_template.jinja": b"text",
    "generation_config.json": b"{   }",
    "modeling_nemotron_h.py": b"code",
    "super_v3_reasoning_parser.py": b"more code",
}
NOT_USED = {
    "pytorch_model.bin": b"x",
    "consolidated.safetensors": b"x" * 9,
    "model.safetensors": b"both sets, and an index",
    "model.gguf": b"x",
    "model.onnx": b"x",
    "plot.png": b"x",
    ".gitattributes": b"x",
    "setup.py": b"code",
    "original/consolidated.safetensors": b"x",
    "bias.md": b"x",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "hub"
    use_cache(monkeypatch, folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    with serving() as hub:
        use_hub(monkeypatch, hub.url)
        yield hub


@pytest.fixture
def weights(make_checkpoint) -> dict[str, bytes]:
    """The files of a checkpoint that the code in its ``auto_map`` belongs to."""
    auto_map = {"AutoModelForCausalLM": "modeling_nemotron_h.Model"}
    return content(make_checkpoint("upstream", auto_map=auto_map))


@pytest.fixture
def find() -> Callable[..., Path]:
    return lambda given=NAME, wanted=ALL, **options: located(
        "model", given, wanted, **({"download": True} | options)
    )


def refused(find: Callable[[], Path], *parts: str, error: type[Exception] = HubError) -> str:
    """Expects an error of one line with these parts."""
    with pytest.raises(error) as caught:
        find()
    text = str(caught.value)
    missing = [part for part in parts if part not in text]
    assert not missing and "\n" not in text, (missing, text)
    return text


def test_the_files_that_are_used_are_fetched_and_no_others(hub, cache, weights, find):
    commit = hub.add(NAME, weights | USED | NOT_USED)
    seen: list[tuple[str, int, int, str]] = []
    snapshot = find(progress=lambda *report: seen.append(report))
    assert snapshot == cache / "models--maker--Model-1" / "snapshots" / commit
    assert content(snapshot) == weights | USED
    assert sorted(hub.fetched()) == sorted(weights | USED)
    assert hub.fetched()[:2] == ["config.json", "model.safetensors.index.json"]
    assert snapshot == Path(snapshot_download(NAME, local_files_only=True))
    total = sum(len(data) for name, data in (weights | USED).items() if name not in hub.fetched()[:2])
    assert seen[-1] == ("download", total, total, "")
    assert all(0 <= done <= of for _, done, of, _ in seen)
    hub.asked.clear()
    assert find(download=False) == find() == snapshot
    assert hub.fetched() == [], "what is there is not fetched again"


def test_code_that_named_code_imports_is_fetched_too(hub, weights, find):
    """As Puzzle's: its modeling file imports another one, which no config names."""
    code = {
        "modeling_nemotron_h.py": b"from .base import Model",
        "base.py": b"from . import sizes",
        "sizes.py": b"",
        "unrelated.py": b"",
    }
    hub.add(NAME, weights | code)
    assert {path.name for path in find().glob("*.py")} == code.keys() - {"unrelated.py"}


def test_the_settings_alone(hub, weights, find):
    hub.add(NAME, weights | USED | {"hf_quant_config.json": b"{}"})
    config = find(wanted=SETTINGS)
    assert config.name == "config.json" and config.read_bytes() == weights["config.json"]
    settings = ["config.json", "hf_quant_config.json", "model.safetensors.index.json"]
    assert hub.fetched() == settings
    lacking = refused(lambda: find(download=False), "lacks 2 of 2 files with weights", "--download")
    assert find().is_dir(), lacking
    assert not set(settings) & set(hub.fetched()[3:])


def test_a_model_in_one_file(hub, weights, find):
    config = {"config.json": weights["config.json"]}
    hub.add(NAME, config | {"model.safetensors": b"weights", "consolidated.safetensors": b"x"})
    assert content(find()) == config | {"model.safetensors": b"weights"}


def test_what_a_record_lists_is_fetched(hub, weights, find):
    record = {"nemoquant.json": json.dumps({"files": {"nemoquant_scales.json": "0" * 64}}).encode()}
    hub.add(NAME, weights | record | {"nemoquant_scales.json": b"{}", "other.json": b"{}"})
    assert set(content(find())) == {*weights, *record, "nemoquant_scales.json"}


def test_files_that_were_asked_for(hub, weights, find):
    hub.add(NAME, weights | NOT_USED)
    assert "bias.md" in content(find(wanted=Wanted(also=("bias.md",))))
    refused(lambda: find(wanted=Wanted(also=("no.md",))), "has no file no.md on the hub; expected one of")


def test_a_connection_that_breaks_is_taken_up_again(hub, weights, find, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    shard = "model-00001-of-00002.safetensors"
    hub.add(NAME, weights)
    hub.cut_at[shard] = [1000, 2000]
    assert content(find()) == weights
    assert hub.fetched().count(shard) == 3


def test_a_download_that_ended_goes_on_with_the_files_that_lack(hub, weights, find, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add(NAME, weights)
    hub.cut_at["model-00002-of-00002.safetensors"] = [100, *[0] * 20]
    refused(find, f"{NAME} can't be fetched from {hub.url}: ", "run it again to go on")
    refused(
        lambda: find(download=False), "lacks 1 of 2 files with weights (model-00002-of-00002.safetensors)"
    )
    hub.cut_at.clear()
    hub.asked.clear()
    assert content(find()) == weights
    assert hub.fetched() == ["model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("revision", ["v1", "refs/pr/7", None])
def test_revisions(revision, hub, weights, find):
    old = hub.add(NAME, weights | {"LICENSE": b"old"}, 1, tag="v1", pull="refs/pr/7")
    hub.add(NAME, weights | {"LICENSE": b"new"}, 2)
    snapshot = find(NAME + (f"@{revision}" if revision else ""))
    assert (snapshot / "LICENSE").read_bytes() == (b"old" if revision else b"new")
    assert (snapshot.name == old) == bool(revision)
    assert find(f"{NAME}@{snapshot.name}") == find(f"{NAME}@{revision or 'main'}", download=False) == snapshot


def test_a_newer_main_is_fetched_only_where_a_download_is_asked_for(hub, weights, find):
    hub.add(NAME, weights, 1)
    first = find()
    hub.add(NAME, weights | {"LICENSE": b"new"}, 2)
    assert find(download=False) == first
    assert (find() / "LICENSE").read_bytes() == b"new"
    assert hub.fetched().count("model-00001-of-00002.safetensors") == 1, "blobs are shared"


def test_what_another_commit_has_too_needs_no_room(hub, weights, find, monkeypatch):
    hub.add(NAME, weights, 1)
    find()
    hub.add(NAME, weights | {"LICENSE": b"new"}, 2)
    needed = download.MARGIN + 10
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(needed, 0, needed))  # type: ignore[attr-defined]
    assert (find() / "LICENSE").read_bytes() == b"new"


def test_a_models_folder_in_another_cache_is_completed(hub, weights, find, tmp_path):
    commit = hub.add(NAME, weights)
    other = tmp_path / "other"
    put(other, NAME, {"config.json": weights["config.json"]}, commit, "main")
    snapshot = find(other / "models--maker--Model-1")
    assert snapshot.is_relative_to(other) and content(snapshot) == weights


def test_a_model_that_changes_meanwhile(hub, weights, find, monkeypatch):
    hub.add(NAME, weights, 1)
    fetch = huggingface_hub.hf_hub_download

    def changed(*arguments: object, **options: object) -> str:
        hub.add(NAME, weights, 2)
        return fetch(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", changed)
    refused(find, "changed on the hub while it was fetched; run it again")


# What the hub refuses.


def test_a_gated_model(hub, weights, find):
    hub.add(NAME, weights)
    hub.models[NAME].gated = True
    refused(find, f"{NAME} is gated: accept its terms at {hub.url}/{NAME}", "HF_TOKEN", "`hf auth login`")


def test_a_token_from_the_environment(hub, weights, find, monkeypatch):
    hub.add(NAME, weights)
    hub.models[NAME].token = "hf_secret"
    told = refused(find, f"{hub.url} has no such model, or does not show it to you", "set HF_TOKEN")
    assert "hf_secret" not in told
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert content(find()) == weights


def test_no_such_model(hub, find):
    refused(find, f"{NAME}: {hub.url} has no such model", "no file or folder of that name here")


def test_no_such_revision(hub, weights, find):
    hub.add(NAME, weights)
    refused(lambda: find(f"{NAME}@v9"), f"{NAME} has no revision v9 on the hub", f"{hub.url}/{NAME}/commits")


@pytest.mark.parametrize("status", [400, 403, 500])
def test_a_hub_that_is_broken(status, hub, find, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.broken = status
    refused(
        find, f"{NAME} can't be fetched from {hub.url}: ", str(status) if status != 400 else "Bad request"
    )


def test_no_hub_at_all(find, monkeypatch):
    with serving() as gone:
        url = gone.url
    use_hub(monkeypatch, url)
    refused(find, f"{NAME} can't be fetched from {url}: ", "without --download to use what the cache has")


def test_an_answer_that_is_no_answer(hub, weights, find):
    commit = hub.add(NAME, weights)
    hub.models[NAME].commits["../../x"] = hub.models[NAME].commits.pop(commit)
    hub.models[NAME].refs["main"] = "../../x"
    refused(find, "the hub names no commit of it")


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"{}",
        b'{"id": "x", "siblings": [{}]}',
        b'{"id": "x", "siblings": 7}',
        b"null",
        b"<html>",
        b"\xff",
    ],
)
def test_a_server_that_is_no_hub(body, hub, weights, find):
    hub.add(NAME, weights)
    hub.body = body
    refused(find, NAME, "check HF_ENDPOINT")


def test_sizes_and_names_that_are_none(hub, weights, find):
    commit = hub.add(NAME, weights)
    files = [{"rfilename": name, "size": -5, "blobId": "../../x"} for name in weights]
    files += [{"rfilename": name} for name in ("../../x.py", "/etc/LICENSE", "a\x00b", "LICENSE\x1b")]
    hub.body = json.dumps({"id": NAME, "sha": commit, "siblings": files}).encode()
    assert content(find()) == weights


def test_a_token_that_is_none(hub, weights, find, monkeypatch):
    hub.add(NAME, weights)
    hub.bad_token = "hf_old"
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    refused(find, f"{hub.url} does not take the token; set HF_TOKEN or run `hf auth login`")


def test_bytes_are_counted_once_where_chunks_come_another_way():
    """As hf_xet reports them: on their way, and on the disk."""
    from huggingface_hub.utils import _xet_progress_reporting as xet

    counted: list[int] = []
    reporter = xet.XetDownloadProgressReporter(
        reconstruction_desc="x", total=10, log_level=30, tqdm_class=download._counting(counted.append)
    )
    assert reporter.transfer_bar is reporter.reconstruction_bar
    reporter.reconstruction_bar.update(10)
    assert counted == [10]


# What ends a download before there are weights.


def test_a_model_of_another_kind(hub, weights, find):
    hub.add(NAME, weights | {"config.json": b'{"model_type": "llama"}'})
    refused(find, "llama", error=ConfigError)
    assert set(hub.fetched()) <= {"config.json", "model.safetensors.index.json"}


def test_what_the_caller_refuses(hub, weights, find):
    def admit(config: Path) -> None:
        assert config.read_bytes() == weights["config.json"]
        raise UsageError("no")

    hub.add(NAME, weights)
    refused(lambda: find(wanted=Wanted(admit=admit)), "no", error=UsageError)
    assert set(hub.fetched()) <= {"config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({"config.json": None, "model.gguf": b"x"}, "has no config.json on the hub, but"),
        ({"model.safetensors.index.json": None}, "has no model.safetensors on the hub"),
        ({"model-00002-of-00002.safetensors": None}, "has no model-00002-of-00002.safetensors on the hub"),
        ({"model.safetensors.index.json": b"{}"}, "has no file that its model.safetensors.index.json names"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "../../x.safetensors"}}'},
            "has no file that its model.safetensors.index.json names",
        ),
    ],
)
def test_a_model_without_its_weights(files, part, hub, weights, find):
    hub.add(NAME, {name: data for name, data in (weights | files).items() if data is not None})
    refused(find, part)
    assert set(hub.fetched()) <= {"config.json", "model.safetensors.index.json"}


def test_no_room_on_the_disk(hub, cache, weights, find, monkeypatch):
    hub.add(NAME, weights)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))  # type: ignore[attr-defined]
    refused(find, "to fetch, 1.00 MB free on the disk of", str(cache), "set HF_HUB_CACHE to a folder")
    assert set(hub.fetched()) <= {"config.json", "model.safetensors.index.json"}


def test_a_disk_that_is_full_after_all(hub, cache, weights, find):
    """The system refuses to write on, as it does on a full disk."""
    hub.add(NAME, weights | {"LICENSE": b"x" * 3_000_000})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        refused(find, NAME, "make room, or set HF_HUB_CACHE to a folder of another disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(cache.rglob("*.incomplete"))
    assert content(find())["LICENSE"] == b"x" * 3_000_000


def test_an_interrupt_says_what_is_kept(hub, weights, find):
    def stop(*report: object) -> None:
        if report[-1] == "model-00002-of-00002.safetensors":
            raise KeyboardInterrupt

    hub.add(NAME, weights)
    with pytest.raises(Interrupted, match=r"files that are whole are kept in .*: the same command goes on"):
        find(progress=stop)
    assert content(find()) == weights
    assert hub.fetched().count("model-00001-of-00002.safetensors") == 1


def test_offline(hub, weights, find, monkeypatch):
    hub.add(NAME, weights)
    snapshot = find()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    said: list[str] = []
    assert find(say=said.append) == snapshot
    assert said[0] == "HF_HUB_OFFLINE is set: --download fetches nothing, the cache alone is used"
    refused(lambda: find("maker/Other"), "or the option --download fetches it once HF_HUB_OFFLINE is unset")
    assert hub.asked == []

"""Names of models on the hub."""

from pathlib import Path

import pytest
from huggingface_hub.utils import HFValidationError, validate_repo_id

from nemoquant.errors import UsageError
from nemoquant.sources.hub import called, hub_name, is_hub_id, origin

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("maker/Model-1", ("maker/Model-1", None)),
        ("maker/Model-1@main", ("maker/Model-1", "main")),
        (f"maker/Model-1@{COMMIT}", ("maker/Model-1", COMMIT)),
        ("maker/Model-1@refs/pr/7", ("maker/Model-1", "refs/pr/7")),
        ("hf://maker/Model-1", ("maker/Model-1", None)),
        ("hf://maker/Model-1/", ("maker/Model-1", None)),
        ("hf://maker/Model-1@refs%2Fpr%2F7", ("maker/Model-1", "refs/pr/7")),
        ("hf:/maker/Model-1@v2", ("maker/Model-1", "v2")),  # as a Path has it
        ("https://huggingface.co/maker/Model-1", ("maker/Model-1", None)),
        ("https://huggingface.co/maker/Model-1/", ("maker/Model-1", None)),
        ("https:/huggingface.co/maker/Model-1", ("maker/Model-1", None)),
        ("https://hf.co/maker/Model-1?library=x", ("maker/Model-1", None)),
        ("https://huggingface.co/maker/Model-1/tree/main", ("maker/Model-1", "main")),
        ("https://huggingface.co/maker/Model-1/tree/refs%2Fpr%2F7", ("maker/Model-1", "refs/pr/7")),
        (f"https://huggingface.co/maker/Model-1/commit/{COMMIT}", ("maker/Model-1", COMMIT)),
        ("https://mirror.example/maker/Model-1", ("maker/Model-1", None)),
    ],
)
def test_a_name(text, expected, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert hub_name("model", text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "folder",
        "./maker/Model-1",
        "../Model-1",
        "/maker/Model-1",
        "a/b/c",
        "maker/",
        "maker/Model--1",
        "maker/Model..1",
        "maker/Model-1.git",
        "maker/Model-1@",
        "maker/Model-1@../../x",
        "maker/Model-1@a//b",
        "maker/Model 1",
        "",
    ],
)
def test_what_can_only_be_a_path(text):
    assert hub_name("model", text) is None


@pytest.mark.parametrize(
    "text",
    [
        "hf://Model-1",
        "hf://datasets/maker/Set",
        "hf://maker/Model-1/config.json",
        "https://huggingface.co/maker",
        "https://huggingface.co/datasets/maker/Set",
        "https://huggingface.co/maker/Model-1/blob/main/config.json",
        "https://huggingface.co/maker/Model-1/tree",
        "https://elsewhere.example/maker/Model-1",
        "https://[elsewhere/maker/Model-1",
        "https://",
    ],
)
def test_an_address_of_no_model(text):
    with pytest.raises(UsageError, match="expected a model of the hub such as nvidia/NAME"):
        hub_name("model", text)


@pytest.mark.parametrize(
    "text",
    ["a/b", "A.b/C_d-e", "a--b/c", "a/b..c", "a/-b", "a/b-", "a/b.", "a/b.git", "a/" + "b" * 97, ".a/b"],
)
def test_what_is_a_name_is_one_for_the_hubs_own_library(text):
    try:
        validate_repo_id(text)
    except HFValidationError:
        theirs = False
    else:
        theirs = True
    assert is_hub_id(text) <= theirs
    assert is_hub_id(text) or text not in ("a/b", "A.b/C_d-e")


def test_where_a_folder_comes_from(tmp_path):
    snapshot = tmp_path / "models--maker--Model-1" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    assert origin(snapshot) == ("maker/Model-1", COMMIT)
    assert called(snapshot) == "maker/Model-1"
    for other in (tmp_path, snapshot.parent, snapshot.parent.parent, Path("/")):
        assert origin(other) is None
    assert called(tmp_path) == tmp_path.name

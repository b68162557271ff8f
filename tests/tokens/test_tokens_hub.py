"""Data sets of the hub by name: from the caches of this machine, and never from elsewhere."""

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from support.processes import run_python

from nemoquant.errors import CalibrationError, MissingExtraError
from nemoquant.model.parse import load_config
from nemoquant.tokens.hub import CUSTOMARY, DataSet, data_set
from nemoquant.tokens.rows import load_rows

pytestmark = pytest.mark.filterwarnings("ignore")  # of datasets, when it is loaded
pytest.importorskip("datasets")


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches, of the hub and of `datasets`, as their variables would place them."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    return tmp_path


def downloaded(caches, repo, files, card=""):
    """A data set as ``hf download`` leaves it: names that lead to blobs."""
    root = caches / "hub" / f"datasets--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs/main").write_text("a" * 40)
    for i, (name, content) in enumerate({"README.md": card, **files}.items()):
        path = root / "snapshots" / ("a" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            (root / f"blobs/{i}").write_text(content)
        else:
            parquet.write_table(pa.Table.from_pylist(content), root / f"blobs/{i}")
        path.symlink_to(os.path.relpath(root / f"blobs/{i}", path.parent))
    return root


def tokens(word, model):
    found = load_rows(Path(word), model, load_config(model)[0], 10**6, 1)
    return found.ids.ravel().tolist(), found


def chat(text):
    return {"messages": [{"role": "user", "content": text}], "category": "x"}


def test_news_by_their_short_name(caches, model):
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {version}\n  data_files:\n  - split: train\n    path: {version}/train-*\n"
        f"  - split: test\n    path: {version}/test-*\n"
        for version in ("1.0.0", "3.0.0")
    )
    texts = {"train-00000-of-00002": "a b", "train-00001-of-00002": "c", "test-00000-of-00001": "e"}
    files = {f"3.0.0/{name}.parquet": [{"article": text, "highlights": "e"}] for name, text in texts.items()}
    files["1.0.0/train-00000-of-00001.parquet"] = [{"article": "d", "highlights": "e"}]
    downloaded(caches, "abisee/cnn_dailymail", files, card + "---\n")
    ids, found = tokens("cnn_dailymail", model)
    assert ids == [3, 4, 2, 5, 2]
    assert found.source == "cnn_dailymail: article"
    assert tokens("abisee/cnn_dailymail:3.0.0", model)[0] == ids
    assert tokens("abisee/cnn_dailymail:3.0.0:test", model)[0] == [7, 2]
    assert tokens("abisee/cnn_dailymail:1.0.0", model)[0] == [6, 2]
    with pytest.raises(
        CalibrationError, match=r"has no split dev on this machine; it has test, train: name one"
    ):
        tokens("abisee/cnn_dailymail:3.0.0:dev", model)
    with pytest.raises(
        CalibrationError, match=r"has the configurations 1\.0\.0, 3\.0\.0; name one as abisee/"
    ):
        tokens("abisee/cnn_dailymail", model)


def test_splits_in_turn(caches, model):
    """A data set of several domains gives rows of each, however few are taken."""
    files = {
        f"data/{split}-00000-of-00001.parquet": [chat(word)] * 3
        for split, word in (
            ("stem", "a"),
            ("chat", "b"),
            ("math", "c"),
            ("code", "d"),
            ("multilingual_de", "e"),
        )
    }
    downloaded(caches, "nvidia/Nemotron-Post-Training-Dataset-v2", files)
    ids, found = tokens("nemotron-post-training", model)
    assert ids == [8, 3, 2, 8, 4, 2, 8, 5, 2, 8, 6, 2] * 3
    assert found.source == "nemotron-post-training: messages"


def test_files_of_other_kinds(caches, model):
    downloaded(caches, "someone/poems", {"train.jsonl": json.dumps({"text": "a"}), "test.jsonl": "{}"})
    assert tokens("someone/poems", model)[0] == [3, 2]
    assert tokens("someone/poems::train", model)[0] == [3, 2]
    downloaded(caches, "someone/pictures", {"train.png": "PNG"})
    with pytest.raises(CalibrationError, match=r"train\.png: unknown kind '\.png'; expected"):
        tokens("someone/pictures", model)


def test_what_datasets_has_prepared(caches, model):
    """By its own builder, in its own cache."""
    from datasets.packaged_modules.json.json import Json

    for split, word in (("train", "a"), ("test", "e")):
        (caches / f"{split}.jsonl").write_text(json.dumps({"question": word, "answer": "b"}) + "\n")
    for config in ("main", "socratic"):
        Json(
            cache_dir=str(caches / "home/datasets"),
            dataset_name="gsm8k",
            hash="5" * 16,
            config_name=config,
            data_files={split: str(caches / f"{split}.jsonl") for split in ("train", "test")},
        ).download_and_prepare()
    for made in list((caches / "home/datasets/gsm8k").iterdir()):  # the names for files of the hub
        if made.is_dir():
            made.rename(made.with_name(made.name.split("-")[0]))
    (caches / "home/datasets/gsm8k").rename(caches / "home/datasets/openai___gsm8k")
    ids, found = tokens("openai/gsm8k:main", model)
    assert ids == [8, 3, 9, 4, 2]
    assert found.source == "openai/gsm8k:main: question + answer"
    assert tokens("openai/gsm8k:socratic:test", model)[0] == [8, 7, 9, 4, 2]
    with pytest.raises(
        CalibrationError, match=r"has main\S*, socratic\S* in .*; name one as openai/gsm8k:CONFIG"
    ):
        tokens("openai/gsm8k", model)


@pytest.mark.parametrize(
    ("word", "repo"),
    [("cnn_dailymail", "abisee/cnn_dailymail"), ("someone/poems:x:train", "someone/poems")],
)
@pytest.mark.usefixtures("caches")
def test_one_that_is_not_here(word, repo, model):
    with pytest.raises(CalibrationError) as error:
        tokens(word, model)
    assert str(error.value) == (
        f"{repo} is neither a file nor a data set in the hub's cache on this machine, and nothing is "
        f"downloaded by itself; run: hf download --repo-type dataset {repo}"
    )


WORDS = {
    "cnn_dailymail": DataSet("abisee/cnn_dailymail", "3.0.0", ("train",), ("article",)),
    "owner/name": DataSet("owner/name"),
    "owner/na.me:1.0": DataSet("owner/na.me", "1.0"),
    "owner/name:c:test": DataSet("owner/name", "c", ("test",)),
    "owner/name::test": DataSet("owner/name", None, ("test",)),
    "name": None,
    "./owner/name": None,
    "../name": None,
    "owner/name/more": None,
    "owner/name:c:s:t": None,
    "/owner/name": None,
}


@pytest.mark.parametrize(("word", "expected"), WORDS.items())
def test_words(word, expected):
    assert data_set(word) == expected


@pytest.mark.usefixtures("caches")
def test_a_file_comes_before_a_name(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cnn_dailymail").mkdir()
    (tmp_path / "cnn_dailymail/x.jsonl").write_text(json.dumps({"text": "a"}))
    assert tokens("cnn_dailymail", model)[0] == [3, 2]


def test_the_customary_ones_are_those_of_model_optimizer():
    utils = pytest.importorskip("modelopt.torch.utils.dataset_utils")
    theirs, compared = utils.SUPPORTED_DATASET_CONFIG, 0
    for name, ours in CUSTOMARY.items():
        if name in theirs:
            config = theirs[name]["config"]
            assert (ours.repo, ours.config, list(ours.splits)) == (
                config["path"],
                config.get("name"),
                config["split"],
            )
            compared += 1
    assert compared == len(CUSTOMARY) - 1
    assert CUSTOMARY["nemotron-post-training"] == CUSTOMARY["nemotron-post-training-dataset-v2"]


CARDS = {
    "another folder": "- config_name: a\n  data_files: ../../../x.jsonl",
    "another place": "- config_name: a\n  data_dir: a/../../..",
    "an address": "- config_name: a\n  data_files: https://localhost/x.jsonl",
    "a path": "- config_name: a\n  data_files: /proc/version",
    "no list": "5",
    "no name": "- data_files: x.jsonl",
    "no YAML": "- [",
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())
def test_cards_of_strangers(card, caches, model):
    (caches / "x.jsonl").write_text(json.dumps({"text": "a"}))
    downloaded(caches, "someone/poems", {"y.jsonl": "{}"}, f"---\nconfigs:\n{card}\n---\n")
    with pytest.raises(CalibrationError, match=r"someone/poems.* (read|no split)|card names ") as error:
        tokens("someone/poems", model)
    assert "\n" not in str(error.value)


def test_without_its_extra(caches, model, monkeypatch):
    downloaded(caches, "someone/poems", {"train.jsonl": json.dumps({"text": "a"})})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"someone/poems needs the extra `datasets`.*pip install"):
        tokens("someone/poems", model)


def test_nothing_reaches_the_network(caches, model):
    """Whether the data set is here or not: no connection is tried, and no name looked up."""
    downloaded(caches, "someone/poems", {"train.jsonl": json.dumps({"text": "a b"})})
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, _: seen.append(event) if event.startswith('socket.') else None)\n"
        "from nemoquant.errors import CalibrationError\n"
        "from nemoquant.model.parse import load_config\n"
        "from nemoquant.tokens.rows import load_rows\n"
        f"model = Path({str(model)!r})\n"
        "print(load_rows(Path('someone/poems'), model, load_config(model)[0], 1, 3).ids.tolist())\n"
        "try:\n    load_rows(Path('someone/other'), model, load_config(model)[0], 1, 3)\n"
        "except CalibrationError as error:\n    print('hf download' in str(error))\n"
        "print([event for event in seen if event not in ('socket.gethostname', 'socket.__new__')])\n"
    )
    done = run_python(code, HF_HUB_CACHE=str(caches / "hub"))
    assert done.stdout.splitlines() == ["[[3, 4, 2]]", "True", "[]"]


@pytest.mark.usefixtures("caches")
def test_the_path_of_a_missing_file_is_no_data_set(model):
    with pytest.raises(CalibrationError, match=r"data/x\.jsonl does not exist; expected \.txt, \.jsonl"):
        tokens("data/x.jsonl", model)

"""``mix`` in place of a path: which file it is, what is in it, and how pieces were taken from packages."""

import importlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.commands import nemoquant
from support.places import DEMO, ROOT
from tokenizers import Tokenizer

from nemoquant.api import diff
from nemoquant.checkpoint.manifest import file_sha256, read_manifest
from nemoquant.errors import CalibrationError
from nemoquant.model.parse import load_config
from nemoquant.shipped import calibration_data, evaluation_data
from nemoquant.tokens.rows import load_rows

DATA = ROOT / "calib/data"
DOMAINS = {"prose", "code", "math", "chat"}
FILES = ("mix.jsonl", "mix_evaluation.jsonl")


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


def words(document: dict[str, Any]) -> str:
    return document.get("text") or "\n\n".join(m["content"] for m in document["messages"])


def opening(document: dict[str, Any]) -> str:
    """The beginning of a text, or of the first answer."""
    return str(document.get("text") or document["messages"][1]["content"])[:200]


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of calib/mix, which import one another as scripts do; none of them reaches the network."""
    monkeypatch.syspath_prepend(str(ROOT / "calib/mix"))
    names = ("packages", "clean", "extract", "chat", "make")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        importlib.sys.modules.pop(name)


# The word.


def test_the_word_is_the_shipped_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert calibration_data(Path("mix")).read_bytes() == (DATA / "mix.jsonl").read_bytes()
    assert evaluation_data(Path("mix")).read_bytes() == (DATA / "mix_evaluation.jsonl").read_bytes()
    assert calibration_data().name == "calibration.jsonl" and evaluation_data().name == "evaluation.jsonl"
    assert calibration_data(Path("elsewhere/mix")) == Path("elsewhere/mix")
    (tmp_path / "mix").write_text("mine")
    assert calibration_data(Path("./mix")).read_text() == "mine"


def test_records_name_it(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """In the manifest, the scales file and the card; and the diff's report names the text it compares on."""
    source = make_checkpoint(vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, source / name)
    line = ["quantize", source, tmp_path / "out", "--fmt", "fp8", "--method", "max", "--rows", "2"]
    result = nemoquant(*line, "--seq-len", "64", "--calib", "mix")
    assert "calibrated on 2 rows of 64 tokens (mix.jsonl, " in result.stdout
    assert read_manifest(tmp_path / "out")["calibration"]["data"] == "mix.jsonl"
    scales = json.loads((tmp_path / "out/nemoquant_scales.json").read_text())
    assert scales["settings"]["data"] == "mix.jsonl"
    assert "2 rows of 64 tokens of `mix.jsonl`" in (tmp_path / "out/README.md").read_text()
    report = diff(source, tmp_path / "out", data="mix", rows=2, seq_len=64, card=False)
    assert report.data.source == "mix_evaluation.jsonl"


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    """It is told so, and can have the three other domains: conversations are left out and counted."""
    config = load_config(DEMO)[0]
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    with pytest.raises(CalibrationError, match="has no chat template"):
        load_rows(DATA / "mix.jsonl", tmp_path, config, 32, 512)
    rows = load_rows(DATA / "mix.jsonl", tmp_path, config, 32, 512, columns=("text",))
    assert rows.ids.shape == (32, 512) and len(rows.warnings) == 1
    assert "were left out" in rows.warnings[0]


# What is in the files.


@pytest.mark.parametrize("name", FILES)
def test_the_manifest_tells_of_it(name: str) -> None:
    entry = json.loads((DATA / "MANIFEST.json").read_text("utf-8"))[name]
    found = read(name)
    assert file_sha256(DATA / name) == entry["sha256"]
    assert Counter(document["domain"] for document in found) == entry["documents"]
    assert entry["documents"].keys() == entry["tokens"].keys() == DOMAINS
    notices = (DATA / "mix_notices.txt").read_text("utf-8")
    assert all(f"{package}: {licence}\n" in notices for package, licence in entry["sources"].items())
    packages = {title.split("`")[1] for title in entry["sources"]}
    assert {d["work"].split(":")[0] for d in found if d["label"] != "old"} == packages
    works = {json.loads(line)["work"] for line in (DATA / entry["prose"]).read_text("utf-8").splitlines()}
    assert {d["work"] for d in found if d["label"] == "old"} < works


def test_about_half_a_million_tokens_in_equal_parts() -> None:
    tokens = json.loads((DATA / "MANIFEST.json").read_text("utf-8"))["mix.jsonl"]["tokens"]
    assert all(124_000 < sum(labels.values()) < 128_000 for labels in tokens.values())
    assert tokens["code"].keys() == {"python", "javascript", "typescript", "c", "c++", "rust", "go", "java"}
    assert sum((DATA / name).stat().st_size for name in FILES) < 2_000_000


def test_nothing_of_the_evaluation_is_in_it(maker: SimpleNamespace) -> None:
    """No package and no work is in both, and no piece shares more than 2% of its 8-word runs."""
    mix, evaluation = read("mix.jsonl"), read("mix_evaluation.jsonl")
    plays = {"shakespeare"}  # its works are apart
    sources = [{d["work"].split(":")[0] for d in found} - plays for found in (mix, evaluation)]
    assert not sources[0] & sources[1]
    assert not {d["work"] for d in mix} & {d["work"] for d in evaluation}
    held_out = {shingle for d in evaluation for shingle in maker.clean.shingles(words(d))}
    for document in mix:
        own = maker.clean.shingles(words(document))
        assert len(own & held_out) <= 0.02 * max(1, len(own)), document["work"]


@pytest.mark.parametrize("name", FILES)
def test_no_addresses_no_licences_no_repetition(name: str, maker: SimpleNamespace) -> None:
    found = read(name)
    assert not [d["work"] for d in found if re.search(r"[\w.+-]+@[\w-]+\.[a-z]{2,}", words(d))]
    assert not [d["work"] for d in found if d["label"] != "old" and not maker.clean.wanted(words(d))]
    seen: set[Any] = set()
    for document in found:
        own = maker.clean.shingles(words(document))
        assert len(own & seen) <= 0.15 * max(1, len(own)), document["work"]
        seen |= own


@pytest.mark.parametrize("name", FILES)
def test_few_rows_hold_every_domain(name: str) -> None:
    """32 rows of 512 tokens of the demo's small vocabulary: three documents or more of each.

    Code is in several languages.
    """
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    rows = load_rows(DATA / name, DEMO, load_config(DEMO)[0], 32, 512).ids
    text = tokenizer.decode(rows.flatten().tolist(), skip_special_tokens=False)
    found = [document for document in read(name) if opening(document) in text]
    counts = Counter(document["domain"] for document in found)
    assert counts.keys() == DOMAINS and min(counts.values()) >= 3
    assert len({d["label"] for d in found if d["domain"] == "code"}) >= 3
    assert text.count("<|im_start|>assistant\n") >= 3  # through the model's own template


@pytest.mark.parametrize("name", FILES)
def test_conversations_are_a_user_and_an_assistant_in_turns(name: str) -> None:
    for document in read(name):
        if document["domain"] == "chat":
            roles = [message["role"] for message in document["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and roles, document["work"]
            assert all(message["content"].strip() for message in document["messages"])
        else:
            assert document["text"].strip()


# How it is made.


def test_headings_ask_and_paragraphs_answer(maker: SimpleNamespace) -> None:
    filler = "So that it reads as people write it, in sentences of some length. " * 8
    page = (
        "Title\n=====\n\nWhy is it :class:`~a.B`?\n------------------------\n\nBecause ``x`` is.\n\n"
        f"{filler}\n\n.. index:: no\n   pair: no\n\nHow so?\n-------\n\n{filler}\n\n"
        f"No question\n-----------\n\n{filler}\n"
    )
    (found,) = maker.chat.faq(page)
    assert [m["role"] for m in found] == ["user", "assistant"] * 2
    assert found[0]["content"] == "Why is it `a.B`?" and found[2]["content"] == "How so?"
    assert found[1]["content"].startswith("Because ``x`` is.\n\nSo that")
    assert "index" not in str(found)


def test_two_people_take_turns(maker: SimpleNamespace) -> None:
    long = "and so on, and on, and on again " * 5
    play = (
        f"SCENE I.\n\n[Enter both.]\n\nANNA.\nWhat is it?\n{long}\n\nBEN.\n[Aside.] Nothing. {long}\n\n"
        f"ANNA.\nNothing?\n\nANNA.\nAt all? {long}\n\nBEN.\nNone. {long}\n\nCY.\nLeave.\n"
    )
    (found,) = maker.chat.dialogues(play)
    assert [m["content"].split(".")[0].split("\n")[0] for m in found] == [
        "What is it?", "Nothing", "Nothing?", "None",
    ]  # fmt: skip
    assert found[2]["content"].startswith("Nothing?\nAt all?")


def test_functions_are_explained_and_written(maker: SimpleNamespace) -> None:
    doc = "Adds what it gets, as many as there are. " * 5
    text = "\n\n".join(
        f'def f{i}(*values):\n    """{doc.strip()}"""\n    total = 0\n    for value in values:\n'
        f"        total += value  # a comment stays\n    return total"
        for i in range(2)
    )
    explained, written = maker.chat.about_code(text)
    assert explained[0]["content"].startswith(
        "What does this function do?\n\n```python\ndef f0(*values):\n    total"
    )
    assert explained[1]["content"] == doc.strip()
    assert written[0]["content"].startswith("Write a Python function `f1` that does this:\n\nAdds")
    assert "# a comment stays" in written[1]["content"] and '"""' not in written[1]["content"]


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("a matrix product is a @ b", True),
        ("write to somebody@somewhere.org", False),
        ("under the MIT License", False),
        ("Copyright 2020", False),
        ("postgres://scott:tiger@localhost/test", False),
        ("token = ghp_0123456789abcdefghij0123", False),
        ("-----BEGIN RSA PRIVATE KEY-----", False),
        ("-" * 100, True),
        ("x" * 200, False),
        ("half a character \ufffd", False),
        ("sha1 da39a3ee5e6b4b0d3255bfef95601890afd80709", False),
    ],
)
def test_what_is_wanted(text: str, fits: bool, maker: SimpleNamespace) -> None:
    assert maker.clean.wanted(text) == fits


def test_code_is_cut_between_blocks(maker: SimpleNamespace) -> None:
    block = "def f():\n    return 1\n\n    # inside\n" + "    x = 1\n" * 120
    found = list(maker.extract.code("\n\n".join([block] * 3)))
    assert len(found) == 2 + 1 and all(piece.startswith("def f") for piece in found)


def test_a_changed_package_ends_the_script(maker: SimpleNamespace, tmp_path: Path) -> None:
    package = maker.packages.PACKAGES["bottle"]
    (tmp_path / package.file).write_bytes(b"other")
    with pytest.raises(SystemExit, match=r"expected 0456\w+ of PyPI package `bottle` 0\.13\.4"):
        maker.packages.fetch(package, tmp_path)

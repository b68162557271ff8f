"""The files next to the tensors: which are copied; the others are named in the output."""

import json
import os

import pytest
from support.files import tree

from nemoquant.api import RunOptions, export_onnx, quantize, verify
from nemoquant.errors import OutputError, UsageError

SIDE_FILES = {  # name -> whether it is copied
    "generation_config.json": True,
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "tokenizer.model": True,
    "chat_template.jinja": True,
    "special_tokens_map.json": True,
    "LICENSE": True,
    "NOTICE.txt": True,
    "modeling_made_up.py": True,
    "other.py": False,
    "evil.sh": False,
    "README.md": False,
    "training_args.bin": False,
    ".gitattributes": False,
    "vocab.txt": False,
    "tokenizer.txt": True,
    "chat_template.json": True,
    "LICENSE.pdf": True,
    "tokenizer_evil.py": False,
    "tokenizer.pkl": False,
    "tokenizer.json.gz": False,
    "tokenizer": False,
    "chat_template.py": False,
    "special_tokens_map.pt": False,
    "LICENSE.sh": False,
    "NOTICE.so": False,
    "generation_config.py": False,
}


def test_side_files_by_allow_list(make_checkpoint, tmp_path):
    auto_map = {"AutoModelForCausalLM": "made/up--modeling_made_up.Model", "X": ["a.B", None]}
    source = make_checkpoint("source", auto_map=auto_map)
    for name in SIDE_FILES:
        (source / name).write_text("raise SystemExit('imported')\n" if name.endswith(".py") else f"{name}\n")
    (source / "tokenizer_parts").mkdir()
    result = quantize(source, tmp_path / "out", "nvfp4-w4a16", RunOptions(method="max", threads=1))
    for name, copied in SIDE_FILES.items():
        if name != "README.md":
            assert (result.out / name).exists() == copied, name
        if copied:
            assert (result.out / name).read_bytes() == (source / name).read_bytes()
    assert (result.out / "README.md").read_text() != "README.md\n", "the card is ours"
    skipped = sorted([name for name, copied in SIDE_FILES.items() if not copied] + ["tokenizer_parts/"])
    assert sorted(result.skipped_files) == skipped
    manifest = json.loads((result.out / "nemoquant.json").read_text())
    assert sorted(manifest["skipped_side_files"]) == skipped
    assert set(manifest["files"]) == {p.name for p in result.out.iterdir()} - {"nemoquant.json"}


def test_files_that_are_asked_for(make_checkpoint, tmp_path):
    source = make_checkpoint("source")
    for name in ("made_reasoning_parser.py", "other.py", "evil.sh"):
        (source / name).write_text(name)
    options = RunOptions(method="max", threads=1, also=["made_reasoning_parser.py", "evil.sh"])
    result = quantize(source, tmp_path / "out", "nvfp4-w4a16", options)
    assert (result.out / "made_reasoning_parser.py").read_text() == "made_reasoning_parser.py"
    assert (result.out / "evil.sh").exists() and not (result.out / "other.py").exists()
    assert verify(result.out)["ok"]
    manifest = json.loads((result.out / "nemoquant.json").read_text())
    assert {"made_reasoning_parser.py", "evil.sh"} <= set(manifest["files"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.py", "--also nowhere.py: expected the name of a file in"),
        ("config.json", "--also config.json: nemoquant writes a file of that name"),
        ("README.md", "--also README.md: nemoquant writes a file of that name; leave it out"),
        ("parts", "--also parts: expected the name of a file in"),
    ],
)
def test_files_that_can_not_be_asked_for(name, words, make_checkpoint, tmp_path):
    source = make_checkpoint("source")
    (source / "parts").mkdir()
    (source / "README.md").write_text("theirs")
    with pytest.raises(OutputError, match=words):
        quantize(source, tmp_path / "out", "nvfp4-w4a16", RunOptions(method="max", also=name))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_path_is_no_name():
    for wrong in ("../x", "a/b", "", 3, [None]):
        with pytest.raises(UsageError, match="also is "):
            RunOptions(also=wrong)


def linked(source, name, target):
    """Put a link in the place of a file of the source."""
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(target)


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "modeling_made_up.py"])
@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../secret", "../made/../secret", "up/secret", "/", "nowhere"]
)
def test_links_that_lead_elsewhere(target, name, make_checkpoint, tmp_path):
    source = make_checkpoint("made", auto_map={"X": "modeling_made_up.X"})
    (tmp_path / "secret").write_text("mine")
    (source / "up").symlink_to(tmp_path)
    linked(source, name, target)
    before = tree(tmp_path)
    says = "that leads nowhere; download" if target == "nowhere" else "to /.*; expected a file in the source"
    with pytest.raises(OutputError, match=rf"made/{name} is a link {says}.*, or remove it"):
        quantize(source, tmp_path / "out", "nvfp4-w4a16", RunOptions(method="max", threads=1))
    assert tree(tmp_path) == before


def test_links_under_other_names_are_left(make_checkpoint, tmp_path):
    source = make_checkpoint("source")
    linked(source, "tokenizer.shadow", "/etc/shadow")
    result = quantize(source, tmp_path / "out", "nvfp4-w4a16", RunOptions(method="max", threads=1))
    assert result.skipped_files == ["tokenizer.shadow"]


def hub_cache(source, tmp_path):
    """The source as a hub cache has it: each file a link into the blobs of its repository."""
    repository = tmp_path / "hub/models--made--up"
    snapshot, blobs = repository / "snapshots/0a1b2c", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_hub_cache(make_checkpoint, tmp_path):
    made = make_checkpoint("made")
    for name in ("tokenizer.json", "LICENSE"):
        (made / name).write_text(name)
    source = hub_cache(made, tmp_path)
    (tmp_path / "short").symlink_to(source)
    out = quantize(
        tmp_path / "short", tmp_path / "out", "nvfp4-w4a16", RunOptions(method="max", threads=1)
    ).out
    assert [(out / name).read_text() for name in ("tokenizer.json", "LICENSE")] == [
        "tokenizer.json",
        "LICENSE",
    ]
    assert not any(path.is_symlink() for path in out.iterdir())
    exported = export_onnx(source, tmp_path / "exported")
    assert (exported.folder / "tokenizer.json").read_text() == "tokenizer.json"

    (source.parents[2] / "models--other").mkdir()
    (source.parents[2] / "models--other/secret").write_text("mine")
    linked(source, "LICENSE", "../../../models--other/secret")
    with pytest.raises(OutputError, match="expected a file in the source"):
        quantize(source, tmp_path / "again", "nvfp4-w4a16", RunOptions(method="max", threads=1))


def test_links_within_the_source(make_checkpoint, tmp_path):
    source = make_checkpoint("source")
    (source / "texts").mkdir()
    (source / "texts/licence").write_text("licence")
    linked(source, "LICENSE", "texts/licence")
    out = quantize(source, tmp_path / "out", "nvfp4-w4a16", RunOptions(method="max", threads=1)).out
    assert (out / "LICENSE").read_text() == "licence"


def test_pipes_and_folders_are_left(make_checkpoint, tmp_path):
    source = make_checkpoint("source")
    os.mkfifo(source / "tokenizer.json")
    (source / "LICENSE").mkdir()
    result = quantize(source, tmp_path / "out", "nvfp4-w4a16", RunOptions(method="max", threads=1))
    assert result.skipped_files == ["LICENSE/", "tokenizer.json"]


def test_a_link_that_changes_during_the_run(make_checkpoint, tmp_path, monkeypatch):
    from nemoquant.run import write as run

    source = make_checkpoint("source")
    (source / "LICENSE").write_text("licence")
    (tmp_path / "secret").write_text("mine")
    config_files = run.config_files
    monkeypatch.setattr(
        run,
        "config_files",
        lambda *a: (linked(source, "LICENSE", tmp_path / "secret"), config_files(*a))[1],
    )
    with pytest.raises(OutputError, match="expected a file in the source"):
        quantize(source, tmp_path / "out", "nvfp4-w4a16", RunOptions(method="max", threads=1))
    assert not (tmp_path / "out").exists()

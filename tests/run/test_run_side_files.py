"""The files next to the tensors: which are copied; the others are named in the output."""

import json

from nemoquant.api import RunOptions, quantize

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
}


def test_side_files_by_allow_list(make_checkpoint, tmp_path):
    auto_map = {"AutoModelForCausalLM": "made/up--modeling_made_up.Model", "X": ["a.B", None]}
    source = make_checkpoint("source", auto_map=auto_map)
    for name in SIDE_FILES:
        (source / name).write_text("raise SystemExit('imported')\n" if name.endswith(".py") else f"{name}\n")
    (source / "tokenizer_parts").mkdir()
    result = quantize(source, tmp_path / "out", "nvfp4-w4a16", RunOptions(threads=1))
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

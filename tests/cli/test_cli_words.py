"""Text from files and names reaches terminal, messages, card and report as text alone."""

import ast
import io
import json
import re
import struct
import sys
import unicodedata
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from support.commands import nemoquant, refusal
from support.places import PACKAGE

from nemoquant import bars
from nemoquant.cli.shared import show, table
from nemoquant.errors import Interrupted, NemoquantError, listing
from nemoquant.notebook import html_table
from nemoquant.words import MOST_MESSAGE, in_markdown, markdown_code, message, passage, plain

HOSTILE = (
    "\x1b[31mred\x1b[0m",
    "\x1b]8;;http://a.example\x07link\x1b]8;;\x07",
    "\x9b2J",
    "two\nlines",
    "over\rwritten",
    "a\u202eb\u2066c",
    "half \ud800",
    "line\u2028end",
    "\x00\x7f\b",
    "tag \U000e0041",
)
MARKUP = (
    "# heading",
    "- list",
    "+ list",
    "1. list",
    "2) list",
    "---",
    "===",
    "> quote",
    "*loud* **very**",
    "_soft_ __very__",
    "~~gone~~",
    "~~~",
    "```",
    "`code`",
    "[link](http://a.example)",
    "![image](http://a.example)",
    "<b>bold</b>",
    "<!-- gone",
    "a | b",
    "a \\| b",
    "&lt;b&gt; &#60; &",
    "$x$",
    "back\\slash\\",
    "|---|---|",
    "[x]: http://a.example",
)


def harmless(text: str, allowed: str = "") -> bool:
    return all(c in allowed or c == " " or unicodedata.category(c)[0] not in "CZ" for c in text)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_one_line_of_printable_text(text):
    for made in (plain(text), message(text), str(NemoquantError(text)), listing([text]), in_markdown(text)):
        assert harmless(made), ascii(made)
        made.encode("utf-8")
    kept = Interrupted()
    kept.kept = text
    assert harmless(str(kept))
    assert harmless(html_table(text, ("a",), [(text,)])), "a cell of a notebook"


def test_what_is_escaped_can_be_read():
    assert plain("a\nb\t\x1b[1m\x9b\u202e\ud800 \U000e0041") == r"a\nb\t\x1b[1m\x9b\u202e\ud800 \U000e0041"
    assert plain("K\u00f6ln, \u4e2d\u6587, \U0001f600 a\\b") == "K\u00f6ln, \u4e2d\u6587, \U0001f600 a\\b"


def test_long_texts_lose_their_middle():
    name = "x" * 90_000_000
    error = str(NemoquantError(f"{name} does not exist; expected a folder"))
    assert len(error) < 1000
    assert error.endswith("xxx does not exist; expected a folder")
    assert "... [89,999,750 characters left out] ..." in error
    assert len(str(NemoquantError("x " * 10_000_000))) <= MOST_MESSAGE
    assert len(listing([name] * 9)) < 5 * 400
    assert len(str(NemoquantError("\x00" * 90_000_000))) <= MOST_MESSAGE
    path = "/" + "/".join(["a" * 90] * 10)
    assert str(NemoquantError(f"{path} does not exist")) == f"{path} does not exist", "a path is no long word"


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_passage_keeps_its_lines_and_nothing_that_is_obeyed(text):
    assert harmless(passage(text), allowed="\n\U000e0041")


@pytest.mark.parametrize(
    "text",
    [
        "two\nlines\n\ttab\n",
        "dos\r\nlines\r\n",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u200f",
        "5\u00a0km",
        "\U0001f469\u200d\U0001f4bb",
    ],
    ids=ascii,
)
def test_an_honest_passage_is_as_it_was(text):
    assert passage(text) == text


@pytest.mark.parametrize("frame", ["{}", "- {}", "# {}", "a {} b", "| {} | b |\n|---|---|\n| {} | b |"])
@pytest.mark.parametrize("text", [*HOSTILE, *MARKUP], ids=ascii)
def test_nothing_in_markdown_is_markup(text, frame):
    """An independent parser finds the blocks of the frame, and the text in them as it was."""

    def parsed(source: str) -> tuple[list[str], list[str]]:
        tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(source)
        inline = [child for token in tokens for child in token.children or []]
        assert {child.type for child in inline} <= {"text", "text_special"}
        merged = ["".join(c.content for c in token.children) for token in tokens if token.children]
        return [token.type for token in tokens], merged

    words = plain(" ".join(text.split()))
    blocks, texts = parsed(frame.replace("{}", in_markdown(text)))
    expected, _ = parsed(frame.replace("{}", "word"))
    assert blocks == expected
    assert texts == [part.replace("{}", words).strip() for part in _parts(frame)]


def _parts(frame: str) -> list[str]:
    """The texts of a frame, in order."""
    if frame.startswith("|"):
        return ["{}", "b"] * 2
    return [re.sub("^[-#] ", "", frame)]


@pytest.mark.parametrize("text", [*HOSTILE, *MARKUP], ids=ascii)
def test_code_in_markdown_is_one_piece(text):
    made = markdown_code(text)
    (paragraph,) = [
        token for token in MarkdownIt("commonmark").parse(f"a {made} b") if token.type == "inline"
    ]
    assert [child.type for child in paragraph.children or []] == ["text", "code_inline", "text"]
    assert "|" not in made
    assert harmless(made)


def test_honest_names_are_as_they_were_in_markdown():
    text = (
        "backbone.layers.1.mixer.in_proj, x.jsonl: its last 3 tokens (of 5) do not fill a row; 12.5% & more"
    )
    assert in_markdown(text) == text


def test_tables_and_bars(capsys, monkeypatch):
    table([("\x1b[31m[bold]:smile:", 3)], ("name\n", "count"))
    out = capsys.readouterr().out
    assert harmless(out, allowed="\n")
    assert r"\x1b[31m[bold]:smile:" in out

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for terminal in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(bars, "SHOW_AFTER", -1.0)
        monkeypatch.setattr(bars, "PLAIN_EVERY", -1.0)
        with bars.progress_bars(False) as report:
            report("pack", 1, 2, "\x1b]0;title\x07[red]two\nlines")
            report("pack", 2, 2, "")
        assert "\x1b]0" not in terminal.getvalue()
        assert r"\x1b]0;title\x07[red]two\nlines" in re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())


def test_what_generate_prints(capsys):
    for piece in ("so\n\tit ", "\x1b", "[2J", "\u202e", "\x9b1m goes"):
        show(piece)
    assert capsys.readouterr().out == "so\n\tit \\x1b[2J\\u202e\\x9b1m goes"


NAME = "\x1b[31m# a*b*\u202e\n<i>.jsonl"


@pytest.fixture
def hostile(source: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A source, data and a recipe with names that are not what they seem."""
    renamed = source.rename(source.with_name("\x1b[1msource\n"))
    data = tmp_path / NAME
    data.write_text(json.dumps({"input_ids": [5] * 140}) + "\n")
    recipe = tmp_path / "r\x1b.yaml"
    text = (PACKAGE.parent / "calib/recipes/fp8.yaml").read_text()
    summary = r'summary: "# \e[2J<b>sum</b> mary"'
    recipe.write_text(re.sub("(?m)^summary: .*", lambda _: summary, text))
    return renamed, data, recipe


def test_a_whole_run(hostile, tmp_path):
    source, data, recipe = hostile
    out = tmp_path / "out\x1b\n"
    options = ("--recipe", recipe, "--calib", data, "--rows", 5, "--seq-len", 32)
    runs = [
        nemoquant("plan", source, "--recipe", recipe),
        nemoquant("inspect", source),
        nemoquant("quantize", source, out, *options),
        nemoquant("verify", out),
        nemoquant("diff", source, out, "--data", data, "--rows", 1, "--seq-len", 8),
        nemoquant("plan", source, "--recipe", recipe, "--json"),
    ]
    for run in runs:
        assert harmless(run.stdout + run.stderr, allowed="\n"), ascii(run.stdout + run.stderr)
    assert runs[0].stdout.startswith("fp8: Routed experts, ")
    assert r"\x1b[31m# a*b*\u202e\n<i>.jsonl holds 4 rows of 32 tokens, 5 were asked for" in runs[2].stderr
    card = (out / "README.md").read_text(encoding="utf-8")
    assert harmless(card, allowed="\n")
    assert "sum</b>" not in card + runs[0].stdout and "sum\\<" not in card, (
        "what is said of a plan comes from its rows, not from a summary"
    )
    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert [h.split(":")[0] for h in headings] == [
        r"\\x1b\[1msource, quantized to FP8",
        "Map",
        "What loads it",
        "Serve it",
        "Warnings",
        "Provenance",
    ]
    assert not [t for token in tokens for t in (token, *(token.children or [])) if t.type.startswith("html")]
    refusal("quantize", source, out, "--recipe", recipe, "--calib", data, parts=["exists"])
    refusal("plan", source / "no\x1b", "--fmt", "fp8", parts=[r"no\x1b does not exist"])


def test_a_tensor_with_a_long_name(source):
    file = source / "model-00001-of-00002.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header["x" * 5_000_000] = header.pop(next(name for name in header if name != "__metadata__"))
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    (source / "model.safetensors.index.json").unlink()
    file.rename(source / "model.safetensors")
    assert len(refusal("plan", source, "--fmt", "fp8")) < MOST_MESSAGE


def test_every_line_of_the_command_line_goes_through_one_place():
    """``say``, ``show`` and ``print_json``; what is printed elsewhere is made plain there."""
    found = {
        (str(path.relative_to(PACKAGE)), ast.unparse(node.func))
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("click.echo", "click.secho", "print")
    }
    assert found == {
        ("bars.py", "print"),
        ("cli/ending.py", "click.echo"),
        ("cli/shared.py", "click.echo"),
        ("ops/library.py", "print"),
    }

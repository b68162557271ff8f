"""``nemoquant diff``: exit codes, which output goes where, escaped Markdown, the model card, the schema."""

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.commands import nemoquant
from support.files import parse_strictly, tree
from support.places import ROOT
from support.processes import run_python

from nemoquant.api import verify
from nemoquant.checkpoint import manifest
from nemoquant.checkpoint.manifest import FILE, file_sha256, read_manifest, write_manifest
from nemoquant.evaluate.conditions import METRICS
from nemoquant.evaluate.schema import VERSION, Report

SCHEMA = ROOT / "docs/diff.schema.json"
COST = "- Cost in accuracy: "


@pytest.fixture
def run(source, token_rows):
    """Runs ``nemoquant diff`` on the base checkpoint."""

    def check(*arguments, code=0, of=source, data=token_rows):
        return nemoquant("diff", of, *arguments, "--data", data, "--threads", 1, code=code)

    return check


# Which output goes where.


def test_output_for_people(run, source, quantized):
    result = run(quantized("fp8"), quantized("nvfp4-w4a16"))
    lines = result.stdout.splitlines()
    assert lines[0] == "# Accuracy of source, quantized"
    assert lines[2].startswith(
        "8 rows of 32 tokens of `rows.npy`, 248 predicted positions; bf16 source 422.29 kB, perplexity 1"
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    header, bf16, fp8, w4a16 = rows[0], rows[2], rows[3], rows[4]
    assert {len(row) for row in rows[:5]} == {12}
    assert (bf16[0], fp8[0], w4a16[0]) == ("bf16", "fp8", "nvfp4-w4a16")
    report = Report.model_validate_json(run("--json", "-", source).stdout)
    assert bf16[header.index("perplexity")] == f"{report.reference.perplexity:.3f}"
    assert float(fp8[header.index("KL mean")]) > float(w4a16[header.index("KL mean")]) > 0
    assert [line for line in lines if line.startswith("## ")] == [
        "## fp8: what hurts",
        "## nvfp4-w4a16: what hurts",
    ]
    worst = [
        next(line for line in lines[lines.index(f"## {name}: what hurts") :] if "backbone" in line)
        for name in ("fp8", "nvfp4-w4a16")
    ]
    assert worst[0].startswith("| `backbone.layers.0.mixer.in_proj` | fp8 | fp8 | ")
    assert re.match(
        r"\| `backbone.layers.\d.mixer.experts.up_proj` \(lowest SQNR: expert \d\) \| nvfp4 \| - \| ",
        worst[1],
    )
    assert re.fullmatch(r"diff: done in \d+\.\d s\n", result.stderr)


def test_the_source_against_itself_says_so(run, source):
    text = run(source).stdout
    assert "## source: what hurts\n\nNothing: it computes what the source computes.\n" in text
    assert "| source | 0.00000 | 0.00000 | 0.00000 |" in text
    assert "Warnings" not in text


def test_json_is_alone_on_stdout(run, source, quantized):
    result = run(source, quantized("nvfp4"), "--json", "-", "--no-card")
    assert result.stderr == ""
    data = parse_strictly(result.stdout)
    assert [c["name"] for c in data["candidates"]] == ["source", "nvfp4"]
    report = Report.model_validate_json(result.stdout)
    assert report.dump() == result.stdout
    assert report.schema_version == VERSION


def test_files(run, quantized, tmp_path):
    out, files = quantized("nvfp4"), {kind: tmp_path / f"report.{kind}" for kind in ("json", "markdown")}
    files["markdown"].write_text("of an earlier run")
    plain = run(out, "--no-card").stdout
    result = run(out, "--no-card", *(x for kind, path in files.items() for x in (f"--{kind}", path)))
    assert result.stdout == plain == files["markdown"].read_text()
    assert [line for line in result.stderr.splitlines() if not line.startswith("diff: ")] == [
        f"{k}: {p}" for k, p in files.items()
    ]
    assert files["json"].read_text() == run(out, "--no-card", "--json", "-").stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "nvfp4",
        "report.json",
        "report.markdown",
        "rows.npy",
        "source",
    ]


def test_streams_are_written_to_and_stay_what_they_are(run, source, tmp_path):
    """As root, a rename would put a file in the place of a device; here in that of a link to one."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(os.devnull)
    with ThreadPoolExecutor(1) as reader:
        piped = reader.submit(pipe.read_text)
        run(source, "--no-card", "--markdown", pipe, "--html", link)
        assert piped.result().startswith("# Accuracy of source")
    assert pipe.is_fifo() and link.is_symlink()


def test_a_file_of_the_user_beside_a_report_stays(run, source, tmp_path):
    beside = tmp_path / "report.html.partial"
    beside.write_text("of the user")
    run(source, "--no-card", "--html", tmp_path / "report.html")
    assert beside.read_text() == "of the user"


def test_html(run, quantized, tmp_path):
    """The page's content has its own tests."""
    page = tmp_path / "report.html"
    result = run(quantized("nvfp4"), "--html", page, "--json", "-")
    assert Report.model_validate_json(result.stdout).candidates[0].name == "nvfp4"
    assert page.read_text().lower().startswith("<!doctype html>")


def test_files_are_written_beside_json_on_stdout(run, source, tmp_path):
    result = run(source, "--json", "-", "--markdown", tmp_path / "report.md")
    assert json.loads(result.stdout)
    assert (tmp_path / "report.md").read_text().startswith("# Accuracy of source")
    assert not Path("-").exists()


def test_warnings_are_shown(run, source, changed):
    other = changed(source, lambda t: t["lm_head.weight"].mul_(2))
    text = run(other).stdout
    assert text.endswith(
        "## Warnings\n\n- changed: 1 tensors are not quantized and yet differ from the source's: lm_head\n"
    )


def test_fewer_rows_than_asked_for_are_told(run, source, tmp_path):
    data = tmp_path / "ids.jsonl"
    data.write_text(json.dumps({"input_ids": list(range(3, 60))}) + "\n")
    result = run(source, "--rows", 9, "--seq-len", 16, data=data)
    assert "- ids.jsonl holds 3 rows of 16 tokens, 9 were asked for; all of them were used\n" in result.stdout
    report = json.loads(run(source, "--rows", 9, "--seq-len", 16, "--json", "-", data=data).stdout)
    assert report["data"]["rows"] == 3
    assert len(report["warnings"]) == 2


# Conditions.


def test_a_condition_that_is_met_fails(run, quantized, tmp_path):
    out = quantized("nvfp4")
    result = run(
        out,
        "--fail-if",
        "kl > 0.001",
        "--fail-if",
        "top1 >= 0",
        "--fail-if",
        "kl>100",
        "--json",
        tmp_path / "r.json",
        code=1,
    )
    kl = json.loads((tmp_path / "r.json").read_text())["candidates"][0]["logits"]["kl"]["mean"]
    failed = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert failed[0] == f"failed: nvfp4: kl is {kl:.6g}, --fail-if 'kl > 0.001'"
    assert failed[1].startswith("failed: nvfp4: top1 is 0.") and failed[1].endswith(", --fail-if 'top1 >= 0'")
    assert len(failed) == 2
    assert result.stdout.startswith("# Accuracy of source"), "the report is given all the same"


def test_only_those_that_meet_it_are_named(run, source, quantized):
    result = run(source, quantized("nvfp4"), "--fail-if", "kl > 0", code=1)
    assert [line.split(": ")[1] for line in result.stderr.splitlines() if line.startswith("failed: ")] == [
        "nvfp4"
    ]


def test_conditions_that_are_not_met(run, source):
    conditions = (
        "kl > 0",
        "kl_max>0",
        "top1 < 1",
        "  flipped   >= 0.5 ",
        "bits_per_weight > 17",
        "perplexity_ratio > 1",
    )
    result = run(source, *(x for c in conditions for x in ("--fail-if", c)))
    assert "failed" not in result.stderr


def test_json_on_stdout_stays_alone_when_a_condition_fails(run, quantized):
    result = run(quantized("nvfp4"), "--fail-if", "kl > 0", "--json", "-", code=1)
    assert json.loads(result.stdout)
    assert result.stderr.startswith("failed: nvfp4: kl is ")


def test_a_figure_that_is_not_known_fails(run, source, changed):
    def drop(tensors):
        for name in [n for n in tensors if n.startswith("mtp.")]:
            del tensors[name]

    result = run(changed(source, drop), "--fail-if", "mtp_acceptance < 0.1", code=1)
    assert (
        "failed: changed: mtp_acceptance is not known, so it can't be said to pass --fail-if "
        "'mtp_acceptance < 0.1'\n" in result.stderr
    )


def test_help_names_every_figure():
    text = " ".join(nemoquant("diff", "--help").stdout.split())
    assert f"Figures for --fail-if: {' '.join(METRICS)}; comparisons > >= < <=." in text


@pytest.mark.parametrize("metric", METRICS)
def test_every_figure_can_be_held(metric, run, quantized):
    result = run(quantized("nvfp4"), "--fail-if", f"{metric} >= 0", code=1)
    assert re.search(
        rf"^failed: nvfp4: {metric} is [\d.e-]+, --fail-if '{metric} >= 0'$", result.stderr, re.MULTILINE
    )


# Text from outside in Markdown.


@pytest.mark.parametrize(
    "name",
    [
        "a|b",
        "a`b`c",
        "<script>alert(1)<script>",
        "[click](x)",
        "*loud*",
        "back\\slash",
        "two\nlines",
        "a|`<b>",
    ],
)
def test_names_are_no_markup(name, run, quantized):
    out = quantized("nvfp4", name=name.replace("/", ""))
    result = run(out, "--no-card")
    lines = result.stdout.splitlines()
    plain = re.sub(r"\\[\\`*\[\]<>|_]", "", result.stdout)  # without the escapes it is plain text
    code = re.sub(r"`[^`]*`", "", plain)
    assert not set("<>[]*") & set(code), "nothing that begins markup is left"
    table = [line for line in lines if line.startswith("|")]
    columns = [len(re.findall(r"(?<!\\)\|", line.replace("\\\\", ""))) for line in table[:4]]
    assert len(set(columns)) == 1, "no cell was split"
    assert code.count("`") == 0, "backticks come in pairs"
    report = json.loads(run(out, "--no-card", "--json", "-").stdout)
    assert report["candidates"][0]["name"] == name, "the data has the name as it is"


def test_names_that_are_no_utf8(run, source, quantized, tmp_path):
    """Linux takes any bytes; a report is UTF-8, and is not lost after all the work."""
    out, reference = (
        folder.rename(tmp_path / os.fsdecode(name))
        for folder, name in ((quantized("nvfp4"), b"out\xff"), (source, b"src\xfe"))
    )
    (out / "README.md").write_text("edited: a warning names it")
    files = {kind: tmp_path / kind for kind in ("html", "json", "markdown")}
    run(out, *(x for kind, path in files.items() for x in (f"--{kind}", path)), of=reference)
    report = json.loads(files["json"].read_text())
    assert (report["candidates"][0]["name"], report["reference"]["name"]) == ("out\\udcff", "src\\udcfe")
    assert "out\\udcff/README.md was edited" in report["warnings"][0]
    assert r"out\\udcff" in files["markdown"].read_text() and "udcff" in files["html"].read_text()


def test_a_data_file_is_no_markup(run, quantized, token_rows):
    data = token_rows.rename(token_rows.with_name("a`b|c<i>.npy"))
    out = quantized("nvfp4-w4a16")
    text = run(out, data=data).stdout
    assert "of `a'b/c<i>.npy`, " in text
    (line,) = [line for line in (out / "README.md").read_text().splitlines() if line.startswith(COST)]
    assert line.count("`") == 2


# The model card.


def cost(out):
    """The card's statement of the cost in accuracy."""
    (line,) = [line for line in (out / "README.md").read_text().splitlines() if line.startswith(COST)]
    return line.removeprefix(COST)


def parts_of(card):
    """The head of a card as data, and the lines below it."""
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body.split("\n")


def verified(out, source):
    report = verify(out, source)
    return report["ok"], report["problems"], report["warnings"]


@pytest.mark.parametrize("preset", ["fp8", "nvfp4-w4a16"])
def test_the_card_gets_the_figures(preset, run, source, quantized):
    out = quantized(preset)
    before, card = tree(out), (out / "README.md").read_text()
    result = run(out, "--json", "-")
    report = Report.model_validate_json(result.stdout)
    logits = report.candidates[0].logits
    sentence = cost(out)
    for figure in (
        f"KL {logits.kl.mean:.5f} nats",
        f"median {logits.kl.median:.5f}",
        f"99% {logits.kl.p99:.5f}",
        f"perplexity {logits.perplexity:.3f} instead of {report.reference.perplexity:.3f} "
        f"({logits.perplexity_ratio - 1:+.2%})",
        f"{logits.top1_agreement:.2%} of 248 positions (8 rows of 32 tokens of `rows.npy`)",
    ):
        assert figure in sentence
    changed = {name for name, content in tree(out).items() if content != before[name]}
    assert changed == {"README.md", FILE}
    head, body = parts_of((out / "README.md").read_text())
    old_head, old_body = parts_of(card)
    assert [a for a, b in zip(old_body, body, strict=True) if a != b] == [
        line for line in old_body if line.startswith(COST)
    ]
    ((result,),) = (model["results"] for model in head.pop("model-index"))
    assert head == old_head
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {
        "kl_divergence": logits.kl.mean,
        "perplexity": logits.perplexity,
        "top1_agreement": logits.top1_agreement,
    }
    assert result["dataset"]["name"] == "rows.npy"
    assert verified(out, source) == (True, [], [])
    assert report.warnings == []


def test_a_second_run_changes_nothing(run, source, quantized, tmp_path):
    out = quantized("fp8")
    run(out)
    once = tree(out)
    run(out)
    assert tree(out) == once
    few = tmp_path / "few.npy"
    np.save(few, np.load(tmp_path / "rows.npy")[:2])
    run(out, data=few)
    assert "(2 rows of 32 tokens of `few.npy`)" in cost(out), "other figures take the place of the first"
    assert verified(out, source) == (True, [], [])


def test_no_card(run, quantized):
    out = quantized("fp8")
    before = tree(out)
    run(out, "--no-card")
    assert tree(out) == before


def test_an_edited_card_is_left_alone(run, quantized):
    out, sound = quantized("fp8"), quantized("nvfp4")
    (out / "README.md").write_text((out / "README.md").read_text() + "\nMy own words.\n")
    before = tree(out)
    result = run(out, sound)
    assert (
        f"- {out}/README.md was edited after it was written; it is left as it is\n"
        in result.stdout.replace("\\", "")
    )
    assert tree(out) == before
    assert cost(sound).startswith("KL "), "the other one's is written"


def test_a_card_without_the_line(run, quantized):
    out = quantized("fp8")
    card = out / "README.md"
    card.write_text(card.read_text().replace(COST, "- Cost: "))
    data = read_manifest(out)
    data["files"]["README.md"] = file_sha256(card)
    write_manifest(out, data)
    before = tree(out)
    report = json.loads(run(out, "--json", "-").stdout)
    assert report["warnings"] == [
        f"{card} has no head, or no line for the cost in accuracy; it is left as it is"
    ]
    assert tree(out) == before


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_card_that_cannot_be_read(content, run, quantized):
    out = quantized("fp8")
    card = out / "README.md"
    card.unlink() if content is None else card.write_bytes(content)
    before = tree(out)
    (warning,) = json.loads(run(out, "--json", "-").stdout)["warnings"]
    what = "can't be given the figures (" if content is None else "was edited after it was written"
    assert warning.startswith(f"{card} {what}") and warning.endswith("; it is left as it is")
    assert tree(out) == before


@pytest.mark.parametrize("name", ["README.md", FILE])
def test_a_folder_that_cannot_be_written(name, run, quantized, source, monkeypatch):
    """Files are written under another name and renamed: if the second fails, the first must not have changed.

    Root may write anywhere.
    """
    call = "replace_bytes" if name == "README.md" else "replace_text"

    def denied(path, content):  # noqa: ARG001
        raise PermissionError(13, "Permission denied", str(path))

    out = quantized("fp8")
    before = tree(out)
    monkeypatch.setattr(manifest, call, denied)
    (warning,) = json.loads(run(out, "--json", "-").stdout)["warnings"]
    assert f"{out}/README.md can't be given the figures (" in warning and "Permission denied" in warning
    monkeypatch.undo()
    assert tree(out) == before
    assert verified(out, source) == (True, [], [])
    run(out)
    assert cost(out).startswith("KL "), "the next run can write it"


def test_a_foreign_checkpoint_is_not_touched(run, source, quantized):
    out = quantized("fp8")
    (out / FILE).unlink()
    before = tree(out), tree(source)
    report = json.loads(run(out, source, "--json", "-").stdout)
    assert (tree(out), tree(source)) == before
    assert [c["recipe"] for c in report["candidates"]] == [None, None]
    assert report["warnings"] == []


# The schema.


def test_the_schema_is_that_of_the_classes():
    made = json.dumps(Report.model_json_schema(mode="serialization"), indent=1, sort_keys=True) + "\n"
    assert SCHEMA.read_text() == made, (
        "write docs/diff.schema.json again, and count up schema_version if a field changed its meaning"
    )


def test_the_schema_says_what_everything_is():
    schema = json.loads(SCHEMA.read_text())
    for name, part in schema["$defs"].items():
        assert part["additionalProperties"] is False
        assert sorted(part["properties"]) == sorted(part["required"]), f"{name}: every field is always there"
        assert part["description"]


# Which modules it loads.

LIGHT = """
import sys
from click.testing import CliRunner
from nemoquant.cli import main
for verb in ("diff", "demo"):
    assert CliRunner().invoke(main, [verb, "--help"]).exit_code == 0
heavy = "torch numpy numba pydantic safetensors jinja2 tokenizers rich plotly".split()
print([m for m in heavy if m in sys.modules])
"""


def test_help_loads_nothing_heavy():
    began = time.monotonic()
    assert run_python(LIGHT).stdout == "[]\n"
    assert time.monotonic() - began < 5  # measured 0.1 s; torch alone takes seconds


def test_bad_usage_is_found_before_torch_is_loaded(tmp_path):
    code = (
        "import sys\nfrom nemoquant.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    print('torch' in sys.modules)"
    )
    done = run_python(code, "diff", tmp_path, tmp_path, "--fail-if", "nope > 1", code=2)
    assert done.stdout == "False\n"
    assert done.stderr.startswith("error: --fail-if 'nope > 1'")

"""What results look like: a line as ``repr``, a table with everything escaped in a notebook."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.places import SUPER
from support.report_data import report

import nemoquant
from nemoquant.calibrate.scales import Scales
from nemoquant.notebook import html_table

EVIL = "<script>alert('x')</script>&\"<b>"


class Cells(HTMLParser):
    """The texts of a table's cells and its caption, and the tags that occur."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: object) -> None:  # noqa: ARG002
        self.tags.add(tag)
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        self.texts[-1] += data


def cells(text: str) -> list[str]:
    """The texts of a page that has the tags of one table, and no others."""
    found = Cells(text)
    assert found.tags <= {"p", "table", "thead", "tbody", "tr", "th", "td"}
    return found.texts


def line(thing: object, most: int = 300) -> str:
    shown = repr(thing)
    assert len(shown) <= most and "\n" not in shown
    return shown


@pytest.fixture(scope="module")
def plan():
    return nemoquant.plan(SUPER, "nvfp4")


def test_a_table():
    text = html_table(EVIL, ("a", EVIL), [(EVIL, 1234567), (True, 1.5)], right=(1,))
    assert cells(text) == [EVIL, "", "", "", "a", EVIL, "", "", EVIL, "1,234,567", "", "True", "1.5"]
    assert '<td style="text-align: right">1,234,567</td>' in text
    assert "<thead>" not in html_table("x", (), [("a",)])


def test_a_plan(plan):
    assert line(plan) == (
        "Plan(nvfp4: 41,152 of 42,683 tensors quantized, 247.22 GB -> 78.72 GB, 5.09 bits a weight)"
    )
    shown = cells(plan._repr_html_())
    assert {"role", "experts.up_proj", "nvfp4", "embedding", "tensors"} <= set(shown)
    assert len(plan._repr_html_()) < 8000
    evil = replace(plan, recipe=plan.recipe.model_copy(update={"name": EVIL}))
    assert EVIL not in evil._repr_html_()
    assert cells(evil._repr_html_())[0].startswith(EVIL)


def test_a_result(plan):
    result = nemoquant.Result(Path("OUT"), plan, [EVIL, "two"], {"tensors": 561}, [EVIL])
    assert line(result) == (
        "Result('OUT': nvfp4, 41,152 of 42,683 tensors quantized, 247.22 GB -> 78.72 GB, 5.09 bits a weight, "
        "561 tensors verified, 2 warnings)"
    )
    shown = cells(result._repr_html_())
    assert shown[0].startswith("OUT: nvfp4, ")
    assert [text for text in shown[1:] if text] == ["warning", EVIL, "warning", "two", "not copied", EVIL]
    assert "nothing written)" in line(nemoquant.Result(Path("OUT"), plan, [], {}))


def test_an_estimate(source):
    found = nemoquant.estimate(source, "fp8", rows=4, seq_len=16, threads=1)
    assert line(found).startswith("Estimate(")
    assert " of memory, " in line(found)
    shown = cells(found._repr_html_())
    assert {"calibrate", "pack", "verify", "memory", "disk", "rows at once"} <= set(shown)
    calibrated = replace(found, calibrate=0.0, row_batch=None)
    assert not {"calibrate", "rows at once"} & set(cells(calibrated._repr_html_()))


def test_a_report():
    found = report()
    assert line(found) == str(found)
    assert line(found).startswith("Report('")
    assert f"; {found.data.predicted_positions:,} positions of '{found.reference.name}')" in line(found)
    assert f"KL {found.candidates[1].logits.kl.mean:.5f}" in line(found)
    assert line(found.candidates[0], 120).startswith(f"Candidate('{found.candidates[0].name}': KL ")
    evil = found.model_copy(
        update={
            "candidates": [
                c.model_copy(update={"name": f"{EVIL}{i}"}) for i, c in enumerate(found.candidates)
            ],
            "reference": found.reference.model_copy(update={"name": EVIL}),
        }
    )
    text = evil._repr_html_()
    shown = cells(text)
    assert EVIL not in text
    assert {"bf16", "KL mean", "top-1", *(f"{EVIL}{i}" for i in range(3))} <= set(shown)
    assert f"{found.candidates[1].logits.kl.mean:.5f}" in shown
    assert len(text) < 8000
    many = found.model_copy(update={"candidates": found.candidates * 20})
    assert " and 57 more; " in line(many, 500)


def test_what_was_exported():
    found = nemoquant.Exported(Path("OUT"), [Path("OUT/model.onnx"), Path("OUT/mtp.onnx")], 0, ["a"] * 6, 382)
    assert line(found) == "Exported('OUT': model.onnx and mtp.onnx, 382 nodes, 6 functions, no tensor copied)"
    assert line(replace(found, copied_bytes=5_000_000)).endswith("6 functions, 5.00 MB copied)")


def test_scales():
    found = Scales(input_amax={"a": 1.0, "b": 2.0}, kv_amax={"k": 1.0}, tokens_per_expert={1: [5, 0, 3]})
    assert line(found) == "Scales(2 inputs, 1 keys and values, 2 of 3 experts reached)"


def test_generated_text():
    found = nemoquant.Generated("word " * 30, (5,) * 30, 4, 2.0, 0, 0, "torch")
    assert str(found) == "word " * 30
    assert line(found) == (
        f"Generated({'word ' * 12 + '...'!r}; torch: 4 tokens in, 30 out, 2.0 s (15.0 tokens/s))"
    )
    drafted = replace(found, drafted=10, accepted=4)
    assert drafted.summary().endswith("; 4 of 10 drafts accepted (40.0%)")

"""The HTML report as text: its content, escaping of markup, its size, and that it is reproducible."""

import base64
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support import report_data
from support.processes import run_python
from support.report_data import ENTITY, IMAGE, SCRIPT, SHAPES, hostile, report

from nemoquant.evaluate.report import html
from nemoquant.evaluate.report.markdown import markdown
from nemoquant.evaluate.schema import Report


class Page(HTMLParser):
    """Elements, visible text and scripts of a page, by Python's own parser."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words = ""
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002 - HTMLParser's signature
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.words += data

    @property
    def text(self) -> str:
        return " ".join(self.words.split())

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


def page(made: html.Report) -> Page:
    return Page(html.render(made))


def test_header_and_summary_are_in_plain_words() -> None:
    text = page(report()).text
    for words in (
        "Difference from source",
        "Measured on 4 rows x 64 tokens of text.jsonl: 252 predicted positions",
        "nemoquant 0.1.0, report 1",
        "candidate-0 NVFP4 0 as source 9 Identical to the reference Every weight is the same, and so is "
        "every prediction.",
        "0.05 nats from bf16 on average Agrees on the next token 95.0% of the time; perplexity 20.05 "
        "instead of 20.00 (+0.25%); "
        "8.05 bits a weight, 2 times smaller; MTP acceptance 65.0% instead of 70.0%. "
        "The largest error comes from shared experts' down projection in layer 3.",
    ):
        assert words in text


def test_warnings_name_their_checkpoint() -> None:
    made = report(warnings=["about all"])
    changed = made.candidates[1].model_copy(update={"warnings": ["about one"]})
    text = page(made.model_copy(update={"candidates": [made.candidates[0], changed]})).text
    assert "2 warnings about all candidate-1: about one" in text
    assert "warning" not in page(report()).text


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_report(shape: str) -> None:
    made = SHAPES[shape]()
    found = page(made)
    assert len([tag for tag, attributes in found.tags if tag == "article"]) == len(made.candidates)
    assert not {"None", "nan", "inf"} & set(found.text.replace(",", " ").split())
    assert ("MTP acceptance" in found.text.split("How to read this")[1]) == (
        shape != "no MTP"
    )  # between its link and its section
    assert ("figure-bits" in [attributes.get("id") for _, attributes in found.tags]) == (
        len(made.candidates) > 1
    )


def test_a_huge_model_stays_below_six_megabytes() -> None:
    assert len(html.render(report_data.huge()).encode()) < 6e6


def test_data_is_reduced_but_right() -> None:
    made = report(experts=4)
    data = page(made).data
    candidate = data["candidates"][2]
    layers, modules = (
        [dict(zip(part["keys"], row, strict=True)) for row in part["rows"]]
        for part in (candidate["layers"], candidate["modules"])
    )
    assert data["loads"][2] == [1000, 1037, 1074, 1111]
    assert layers[2]["load_change"] == [-10, 10, -10, 10]  # 100 x its relative error of 0.1
    assert (layers[2]["alone"], layers[2]["stream"], layers[2]["state"]) == (0.1, 0.05, None)
    assert layers[1]["state"] == 0.0166667  # 0.05 / 3 in six digits
    assert layers[1]["of_plain"] == 0.5 and layers[0]["of_plain"] is None
    up = next(m for m in modules if m["role"] == "experts.up_proj")
    assert (up["expert"], up["expert_db"], up["expert_median_db"]) == (0, 20.0, 20.1852)
    cache = next(m for m in modules if m["role"] == "kv_cache")
    assert (cache["weight_db"], cache["input_db"], cache["expert"]) == (None, 21.95, None)


def test_what_solving_won_by_layer_is_told_in_text() -> None:
    data = report().model_dump()
    layers = data["candidates"][1]["layers"]
    layers[2]["solved"]["error_of_plain"], layers[3]["solved"]["error_of_plain"] = 0.25, 0.9
    told = "Of plain rounding's error in outputs solving left 25% (layer 1) to 90% (layer 2)."
    assert told in markdown(Report.model_validate(data))
    for layer in layers:
        layer["solved"] = None
    assert "solving left" not in markdown(Report.model_validate(data)).split("## ")[2]


def test_nothing_in_a_report_becomes_markup() -> None:
    found = page(hostile())
    assert not [tag for tag, _ in found.tags if tag in ("img", "i")]
    assert len(found.scripts) == 3  # data, plotly, ours
    assert ENTITY in found.text and IMAGE in found.text and SCRIPT in found.text
    assert found.data["candidates"][0]["name"] == IMAGE
    assert SCRIPT in [row[0] for row in found.data["candidates"][0]["modules"]["rows"]]


def test_json_in_a_script_element() -> None:
    value = ["</script><!--", "a & b", "\u2028\u2029", "\U0001f600"]
    text = html.script_json(value)
    assert text.isascii() and not set("<>&") & set(text)
    assert json.loads(text) == value


def test_only_scripts_whose_hash_the_policy_names_run() -> None:
    found = page(report())
    policy = next(
        a["content"]
        for tag, a in found.tags
        if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    for script in found.scripts[1:]:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy


def test_no_address_outside_the_page() -> None:
    for tag, attributes in page(report()).tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith(("#", "data:")), tag


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "report.json"
    source.write_text(report().dump())
    code = (
        "import hashlib, pathlib, sys\nfrom nemoquant.evaluate import schema\nfrom "
        "nemoquant.evaluate.report.html import render\n"
        "report = schema.Report.model_validate_json(pathlib.Path(sys.argv[1]).read_text())\n"
        "print(hashlib.sha256(render(report).encode()).hexdigest())"
    )
    expected = hashlib.sha256(html.render(report()).encode()).hexdigest()
    assert run_python(code, source, PYTHONHASHSEED="7").stdout.strip() == expected


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0%"),
        (1e-6, "under 0.001%"),
        (0.00012345, "0.0123%"),
        (0.0169, "1.69%"),
        (0.95, "95.0%"),
        (0.9238, "92.4%"),
        (0.9997, "99.97%"),
        (0.99999, "over 99.99%"),
        (1, "100%"),
    ],
)
def test_percent(share: float, text: str) -> None:
    assert html.percent(share) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.013373, "0.0134"), (1.23e-7, "1.23e-7"), (2.5, "2.5")]
)
def test_figure(value: float, text: str) -> None:
    assert html.figure(value) == text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compression": 0.5}, "8.05 bits a weight, 2 times larger"),
        ({"compression": 1.001}, "8.05 bits a weight, as large as the reference"),
        ({"worst_modules": []}, "MTP acceptance 65.0% instead of 70.0%."),
        ({"mtp_acceptance": None}, "2 times smaller. The largest"),
    ],
)
def test_summary(changes: dict[str, Any], words: str) -> None:
    made = report()
    rest = html.summary(made.candidates[2].model_copy(update=changes), made.reference)[1]
    assert words in rest


def test_summary_without_perplexity() -> None:
    made = report_data.without_perplexity()
    assert "perplexity is beyond what a float64 holds" in html.summary(made.candidates[2], made.reference)[1]


@pytest.mark.parametrize(
    ("role", "layer", "words"),
    [
        ("experts.up_proj", 1, "routed experts' up projection in layer 1"),
        ("latent.fc1", 3, "the latent fc1 in layer 3"),
        ("kv_cache", 2, "the KV cache in layer 2"),
        ("lm_head", None, "its.name"),
        ("mtp.experts.up_proj", 0, "its.name"),
    ],
)
def test_place(role: str, layer: int | None, words: str) -> None:
    module = (
        report()
        .candidates[1]
        .modules[0]
        .model_copy(update={"role": role, "layer": layer, "name": "its.name"})
    )
    assert html.place(module) == words

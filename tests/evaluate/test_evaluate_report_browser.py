"""The HTML report in a headless browser: it draws, sorts, selects and follows the theme.

It runs no code from a report's data and requests no other file.
"""

import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
from support.report_data import ENTITY, IMAGE, SCRIPT, SHAPES, hostile, huge, report

from nemoquant.evaluate.report.html import render
from nemoquant.evaluate.schema import Report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PLOTS = ["alone", "stream", "histogram", "positions", "flips", "bits", "worst", "load"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or importlib.util.find_spec("playwright") is None,
        reason="needs Chromium and playwright",
    ),
]

Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Watched:
    """A page opened from a file, with all its console messages and requests."""

    page: "Page"
    file: Path
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, made: Report) -> "Page":
        self.file.write_text(render(made), encoding="utf-8")
        self.page.set_default_timeout(30_000)  # other workers run at the same time
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(self.file.as_uri())
        return self.page

    def check(self) -> None:
        assert self.complaints == []
        assert {url for url in self.requests if not url.startswith("data:")} == {self.file.as_uri()}


@pytest.fixture
def show(browser: "Browser", tmp_path: Path) -> Iterator[Open]:
    """Opens a report. The page may write nothing to the console and request no other file in any test."""
    opened: list[Watched] = []

    def open_(made: Report, width: int = 1280, scheme: Literal["light", "dark"] = "light") -> "Page":
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        opened.append(Watched(page, tmp_path / f"{len(opened)}.html"))
        return opened[-1].open(made)

    yield open_
    for watched in opened:
        watched.page.close()
        watched.check()


@pytest.fixture(scope="module")
def shared(browser: "Browser", tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """One page for many tests: loading plotly.js takes a second."""
    watched = Watched(
        browser.new_page(viewport={"width": 1280, "height": 900}),
        tmp_path_factory.mktemp("report") / "report.html",
    )
    watched.open(report())
    return watched


@pytest.fixture
def page(shared: Watched) -> "Iterator[Page]":
    """The page of ``report()``, with its initial selection."""
    shared.page.locator("#pick label").nth(1).click()
    shared.page.locator("#colour label").first.click()
    select_layer(shared.page, 5)
    yield shared.page
    shared.check()


def drawn(page: "Page", plot: str) -> int:
    """Traces in a plot's SVG."""
    return page.locator(f"#figure-{plot} .plot svg .trace").count()


def column(page: "Page", table: str, head: str) -> list[str]:
    heads = page.locator(f"#{table} thead th").all_inner_texts()
    return page.locator(f"#{table} tbody tr td:nth-child({heads.index(head) + 1})").all_inner_texts()


def head(page: "Page", table: str, text: str) -> "Locator":
    return page.locator(f"#{table} th", has_text=text).first


def cell(page: "Page", label: str) -> "Locator":
    return page.locator(".cell", has_text=label)


def select_layer(page: "Page", number: int) -> None:
    page.locator(f".cell[data-layer='{number + 1}']").click()  # the embedding is the first


def test_every_plot_has_its_traces(page: "Page") -> None:
    select_layer(page, 1)
    # candidate-0 is identical to the reference: it has no place on a log axis, and the notes say so
    assert {plot: drawn(page, plot) for plot in PLOTS} == {
        "alone": 2,
        "stream": 2,
        "histogram": 2,
        "positions": 2,
        "flips": 2,
        "bits": 2,
        "worst": 2,
        "load": 2,
    }
    note = "candidate-0: no error in any layer. A layer without an error is left out of the log axis."
    assert page.locator("#figure-alone .note").inner_text() == note
    assert (
        page.locator("#figure-bits .note").inner_text()
        == "candidate-0: KL is 0, which a log axis cannot show."
    )


@pytest.mark.parametrize(
    "shape", sorted(SHAPES.keys() - {"one candidate", "five candidates", "only an identical one"})
)  # tested separately
def test_every_shape_of_report(show: Open, shape: str) -> None:
    made = SHAPES[shape]()
    page = show(made)
    moved = sum(candidate.logits.kl.mean > 0 for candidate in made.candidates)
    assert drawn(page, "alone") == drawn(page, "histogram") == moved
    assert drawn(page, "flips") == (moved if "E" in made.reference.pattern else 0)
    for plot in page.locator("figure:has(.plot[hidden]) .note").all():
        assert plot.inner_text() != ""
    assert page.locator("#comparison tbody tr").count() == len(made.candidates)
    assert ("MTP" in page.locator("#comparison thead").inner_text()) == (shape != "no MTP")


def test_only_identical_candidates_say_so_in_the_figures_place(show: Open) -> None:
    page = show(report(scales=(0.0,)))
    assert page.locator("#figure-alone .note").inner_text() == "candidate-0: no error in any layer."
    assert page.locator("#figure-worst .note").inner_text() == "candidate-0: no module has an effect."
    assert page.locator("#legend").inner_text() == "No layer has an error."
    assert page.locator("#modules").inner_text() == "Nothing here differs from the source."


def test_numbers_sort_both_ways_and_nulls_stay_last(page: "Page") -> None:
    title = head(page, "modules", "Weight SQNR dB")
    unsorted = column(page, "modules", "Module")
    assert title.get_attribute("aria-sort") == "none"
    for order, reverse in (("descending", True), ("ascending", False)):
        title.locator("button").click()
        assert title.get_attribute("aria-sort") == order
        values = column(page, "modules", "Weight SQNR dB")
        numbers = [float(value) for value in values[:-1]]
        assert values[-1] == "\u2013"  # the KV cache has no weight
        assert numbers == sorted(numbers, reverse=reverse) and len(set(numbers)) > 2
    assert sorted(column(page, "modules", "Module")) == sorted(unsorted)


def test_text_sorts_and_only_one_column_at_a_time(page: "Page") -> None:
    head(page, "layers", "Own error").locator("button").click()
    head(page, "layers", "Kind").locator("button").click()
    kinds = column(page, "layers", "Kind")
    assert kinds == sorted(kinds, key=str.lower)
    assert page.locator("#layers th[aria-sort=none]").count() == page.locator("#layers th").count() - 1


def test_layers_sort_by_their_place_not_by_their_name(show: Open) -> None:
    page = show(report(pattern="M" * 12))
    for expected in (
        ["embedding", *map(str, range(12)), "head"],
        ["head", *map(str, reversed(range(12))), "embedding"],
    ):
        head(page, "layers", "Layer").locator("button").click()
        assert column(page, "layers", "Layer") == expected


def test_modules_are_filtered(page: "Page") -> None:
    page.locator("#filter").fill("KV_cache")
    assert column(page, "modules", "Role") == ["kv_cache"]
    assert page.locator("#modules .more").inner_text() == "1 of 19 rows match."
    page.locator("#filter").fill("nothing like it")
    assert page.locator("#modules .more").inner_text() == "Nothing matches the filter."
    page.locator("#filter").fill("")
    assert page.locator("#modules tbody tr").count() == 19


def test_a_cell_shows_its_layer(page: "Page") -> None:
    select_layer(page, 3)
    assert page.locator("#detail-title").inner_text() == "Layer 3, mixture of experts, in candidate-1"
    assert "4.00% (28.0 dB)" in page.locator("#detail-figures").inner_text()  # 0.01 x (1 + 3)
    assert [name.split(".")[2] for name in column(page, "detail-modules", "Module")] == ["3"] * 4
    select_layer(page, 0)
    assert not page.locator("#figure-load").is_visible()
    cell(page, "embedding").click()
    assert page.locator("#detail-modules").inner_text() == "No module of this layer differs from the source."


def test_the_chosen_candidate_is_the_one_shown(page: "Page") -> None:
    page.locator("#pick label").nth(2).click()
    select_layer(page, 1)
    assert page.locator("#detail-title").inner_text().endswith("in candidate-2")
    assert page.locator("#figure-worst .note").inner_text() == "Of candidate-2."
    assert "10.0% (20.0 dB)" in page.locator("#detail-figures").inner_text()


def test_cells_are_coloured_by_error_or_by_format(page: "Page") -> None:
    background = "getComputedStyle(document.querySelectorAll('.cell')[{}]).backgroundColor"
    assert page.evaluate(background.format(1)) != page.evaluate(
        background.format(6)
    )  # errors of layers 0 and 5
    page.locator("#colour label", has_text="Format").click()
    assert page.locator(".cell.format").count() == 8 and page.locator(".cell.heat").count() == 0
    assert page.locator("#legend").inner_text().split("\n")[:3] == ["bf16", "NVFP4", "FP8"]


def test_the_keyboard_reaches_and_selects_cells(page: "Page") -> None:
    page.locator("#colour input:checked").focus()
    page.keyboard.press("Tab")
    focused = "document.activeElement.dataset.layer"
    start = int(page.evaluate(focused))
    assert page.locator("#tooltip").is_visible()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert (start, page.evaluate(focused)) == (6, "1")  # it starts at the selected layer
    page.keyboard.press("Enter")
    assert page.locator("#detail-title").inner_text().startswith("Layer 0, Mamba-2")
    assert page.locator(".cell[aria-pressed=true]").get_attribute("data-layer") == "1"
    page.keyboard.press("Escape")
    assert not page.locator("#tooltip").is_visible()


def test_hover_tells_the_figures(page: "Page") -> None:
    page.locator(".cell").nth(2).hover()
    text = page.locator("#tooltip").inner_text()
    assert text.startswith("Layer 1, mixture of experts\ncandidate-1\nOwn error\n2.00% (34.0 dB)")
    assert "2.00% of choices, 4.00% of tokens" in text


def test_page_and_plots_follow_the_theme(page: "Page", show: Open) -> None:
    colours = """[getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.querySelector('#figure-alone .ytick text')).fill,
        getComputedStyle(document.querySelector('#figure-alone .trace .js-line')).stroke]"""
    light = page.evaluate(colours)
    page.locator("#theme").click()
    dark = page.evaluate(colours)
    assert all(a != b for a, b in zip(light, dark, strict=True))
    page.locator("#theme").click()
    assert page.evaluate(colours) == light
    other = show(report(), scheme="dark")
    assert other.evaluate(colours) == dark
    other.emulate_media(color_scheme="light")
    other.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert other.evaluate(colours) == light


@pytest.mark.parametrize("made", [hostile, huge])
def test_a_narrow_page_does_not_scroll_sideways(show: Open, made: Callable[[], Report]) -> None:
    page = show(made(), width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    select_layer(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_names_that_are_markup_show_literally(show: Open) -> None:
    page = show(hostile())
    assert page.locator("h1").inner_text() == f"Difference from {ENTITY}"
    assert page.locator(".card h3").first.inner_text() == IMAGE
    assert IMAGE in column(page, "comparison", "Checkpoint")
    assert page.locator("#pick label").first.inner_text() == IMAGE
    assert page.locator(".warnings li").all_inner_texts() == [IMAGE, f"{IMAGE}: {SCRIPT}"]
    select_layer(page, 0)
    assert IMAGE in page.locator("#detail-title").inner_text()
    assert SCRIPT in column(page, "detail-modules", "Module") and ENTITY in column(page, "modules", "Role")
    page.locator(".cell").nth(1).hover()
    assert IMAGE in page.locator("#tooltip").inner_text()
    assert page.locator("#figure-alone .legendtext").first.text_content() == IMAGE[:27] + "\u2026"
    assert page.locator("#figure-worst .plot .textpoint text").text_content() == SCRIPT
    assert page.locator("#figure-bits .plot .textpoint text").first.text_content() == IMAGE[:27] + "\u2026"
    page.locator("#figure-worst .plot .point path").first.hover(force=True)
    hover = page.locator("#figure-worst .hoverlayer .hovertext").text_content() or ""
    assert SCRIPT in hover and ENTITY in hover
    assert page.evaluate("window.pwned") is None
    assert page.locator("body img, h1 b, td b").count() == 0


def test_a_point_in_a_plot_selects_its_layer(show: Open) -> None:
    page = show(report(scales=(0.01,)))
    assert drawn(page, "alone") == 1 and page.locator("#figure-bits").count() == 0
    page.locator("#figure-alone .plot").scroll_into_view_if_needed()
    page.locator("#figure-alone .points path").nth(2).hover(force=True)
    page.mouse.down()
    page.mouse.up()
    assert page.locator("#detail-title").inner_text().startswith("Layer 2, attention")


def test_a_huge_model_renders_in_seconds_and_says_what_it_leaves_out(show: Open) -> None:
    made = huge()
    begin = time.monotonic()
    page = show(made)
    assert drawn(page, "alone") == 4
    assert time.monotonic() - begin < 15  # about 2 s on an idle core
    assert page.locator("#modules tbody tr").count() == 200
    assert (
        page.locator("#modules .more").inner_text().startswith("The first 200 rows; 80 more are not shown.")
    )
    assert page.locator(".cell").count() == 90

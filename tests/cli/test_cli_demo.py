"""``nemoquant demo``: the whole toolchain on the trained model in one command; killed, it goes on."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
from support.commands import error_line, invoke, nemoquant
from support.files import tree

from nemoquant.api import verify
from nemoquant.checkpoint.folder import FOLDER, STATE
from nemoquant.demo import PRESETS, REPORTS, demo
from nemoquant.errors import OutputError, VerificationError
from nemoquant.evaluate.report.markdown import markdown, table
from nemoquant.evaluate.schema import Report
from nemoquant.shipped import demo_model

ROWS = 2
WITH_GRAPHS = all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnx_ir"))
WITH_ENGINE = WITH_GRAPHS and importlib.util.find_spec("tensorrt_rtx") is not None


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(folder, result of the command), run once.

    One thread: where other work uses a core, waiting threads would use CPU time too.
    """
    out = tmp_path_factory.mktemp("demo") / "shown"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sched_getaffinity", lambda pid: {0})
        return out, invoke("demo", "--out", out, "--rows", ROWS)


@pytest.fixture(scope="module")
def report(shown):
    return Report.model_validate_json((shown[0] / "report.json").read_text())


@pytest.mark.slow
def test_it_runs(shown):
    out, result = shown
    assert result.exit_code == 0, (result.output, result.exception)
    engine = ["nvfp4-sm120.engine", "nvfp4-sm120.engine.json"] if WITH_ENGINE else []
    assert sorted(p.name for p in out.iterdir()) == sorted([*PRESETS, *REPORTS.values(), *engine])
    assert [p.name for p in out.parent.iterdir()] == ["shown"]
    told = [
        line
        for line in result.stderr.splitlines()
        if not line.startswith(("calibrate: ", "pack: ", "verify: ", "hash: ", "diff: "))
    ]
    assert told[0] == f"source: {demo_model()}"
    assert [line.split(": ")[0] for line in told[1:]] == [
        *PRESETS,
        "graphs",
        *(["engine"] if WITH_GRAPHS else []),
    ]
    assert all(
        line.endswith(" bits a weight; verified against the source.") for line in told[1 : 1 + len(PRESETS)]
    )
    last = result.stdout.splitlines()[-1]
    assert last.startswith(f"{out / 'report.html'}: open it in a browser. All of it took ")


@pytest.mark.slow
@pytest.mark.skipif(not WITH_GRAPHS, reason="needs onnx and onnxruntime (extra: ort)")
def test_each_was_run_through_its_graph(shown, report):
    """Weights only: no code can flip, and the runtimes agree to rounding.

    Rounded inputs: codes flip, which costs far less than the format itself.
    """
    for candidate in report.candidates:
        run = candidate.engine
        assert run is not None
        assert (run.engine, run.compute, run.device) == ("onnxruntime", "float32", "cpu")
        limit = (
            1e-9 if candidate.name == "nvfp4-w4a16" else 0.25 * candidate.logits.kl.mean
        )  # a tenth was measured on 32 rows
        assert 0 <= run.kl_from_torch < limit, candidate.name
        assert all((shown[0] / candidate.name / name).exists() for name in ("model.onnx", "mtp.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_each_checkpoint_verifies(preset, shown):
    """The figures of the diff are in its card."""
    found = verify(shown[0] / preset, demo_model())
    assert (found["ok"], found["problems"], found["warnings"]) == (True, [], [])
    card = (shown[0] / preset / "README.md").read_text()
    assert f"({ROWS} rows of 512 tokens of `evaluation.jsonl`)" in card


@pytest.mark.slow
def test_the_reports_are_of_one_run(shown, report):
    out, result = shown
    assert (out / "report.md").read_text() == markdown(report)
    assert "\n".join(table(report)) in result.stdout
    page = (out / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert all(preset in page for preset in PRESETS)
    assert report.warnings == []
    assert [c.warnings for c in report.candidates] == [[]] * len(PRESETS)


@pytest.mark.slow
def test_it_shows_what_it_should(report):
    assert tuple(c.name for c in report.candidates) == PRESETS
    assert (report.data.source, report.data.rows, report.data.seq_len) == ("evaluation.jsonl", ROWS, 512)
    assert report.reference.pattern == "MEM*EMEM*E"
    kl = {c.name: c.logits.kl.mean for c in report.candidates}
    assert 0 < kl["fp8"] < kl["nvfp4"] < kl["nvfp4-full"]
    bits = {c.name: c.bits_per_weight for c in report.candidates}
    assert bits["nvfp4-full"] < bits["nvfp4"] < bits["fp8"] < report.reference.bits_per_weight


@pytest.mark.slow
def test_a_second_run_is_refused(shown):
    out, _ = shown
    before = tree(out.parent)
    result = invoke("demo", "--out", out, "--rows", ROWS)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"error: {out} exists; expected a new folder, nothing is overwritten: remove it or choose another "
        f"name"
    )
    assert result.stdout == ""
    assert tree(out.parent) == before


def interrupt(*_, **__):
    raise KeyboardInterrupt


def an_output(_, out, *__, **___):
    """Stands in for ``quantize`` where the output is not read."""
    out.mkdir()
    (out / "nemoquant_scales.json").write_text("{}")


def test_an_interrupt_before_anything_is_finished_leaves_nothing(tmp_path):
    out, seen = tmp_path / "new/deeper/out", []

    def stop(*_):
        seen.append(out.with_name("out.partial").is_dir())
        interrupt()

    with pytest.raises(KeyboardInterrupt, match=r"^nothing was kept$"):
        demo(out, rows=1, progress=stop)
    assert seen == [True]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_it_goes_on_after_an_interrupt(shown, tmp_path, monkeypatch):
    """Presets that are done are not made again; the end is the same as without it."""
    from nemoquant import api

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    out, made, quantize, verify_one = tmp_path / "out", [], api.quantize, api.verify

    def counted(source, folder, preset, *rest, **options):
        result = quantize(source, folder, preset, *rest, **options)
        made.append((preset, bool(result.verified)))
        return result

    def stopped(*arguments, **options):
        return interrupt() if len(made) == 2 else verify_one(*arguments, **options)

    monkeypatch.setattr("nemoquant.api.quantize", counted)
    with monkeypatch.context() as patch:
        patch.setattr("nemoquant.api.verify", stopped)
        result = nemoquant("demo", "--out", out, "--rows", ROWS, code=130)
    kept = f"error: interrupted; {out}.partial is kept: the same command goes on from there"
    assert result.stderr.splitlines()[-1] == kept
    assert made == [("fp8", True), ("fp8-published", True)]

    before = tree(tmp_path)
    refused = nemoquant("demo", "--out", out, "--rows", ROWS + 1, code=2)
    says = (
        rf"error: \S+out\.partial was begun with --rows {ROWS} by version \S+, this is --rows {ROWS + 1} by"
    )
    assert re.match(says, refused.stderr.splitlines()[-1])
    assert tree(tmp_path) == before

    for name in ("nvfp4-sm120.engine", "nvfp4-sm120.engine.json"):
        (tmp_path / "out.partial" / name).write_text("of the demo that was killed")
    made.clear()
    compare = api.diff
    monkeypatch.setattr(
        "nemoquant.api.diff", lambda *a, **o: compare(*a, **o).model_copy(update={"warnings": ["a card"]})
    )
    again = nemoquant("demo", "--out", out, "--rows", ROWS)
    told = [line for line in again.stderr.splitlines() if line.startswith("going on with ")]
    assert told == [f"going on with {out}.partial: fp8, fp8-published finished"]
    assert "warning: a card" in again.stderr.splitlines()
    assert made[:2] == [("fp8", False), ("fp8-published", False)]
    assert all(verified for _, verified in made[2:])
    expected, found = tree(shown[0]), tree(out)
    assert found.keys() == expected.keys()
    other = [name for name in found if found[name] != expected[name]]
    assert [name for name in other if ".engine" not in name and not name.startswith("report.")] == []


def test_no_message_names_an_option_that_it_lacks(tmp_path):
    """Not even where what lies there is of ``quantize``, which has it."""
    for name, content in (("mine", "mine"), ("report.md", "mine"), (f"{FOLDER}/{STATE}", "{")):
        file = tmp_path / "out.partial" / name
        file.parent.mkdir(parents=True)
        file.write_text(content)
        before = tree(tmp_path)
        result = nemoquant("demo", "--out", tmp_path / "out", code=2)
        assert "--" not in error_line(result.stderr.splitlines()[-1])
        assert tree(tmp_path) == before
        shutil.rmtree(tmp_path / "out.partial")


def test_an_output_that_does_not_verify_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("nemoquant.api.quantize", an_output)
    monkeypatch.setattr(
        "nemoquant.api.verify", lambda *a, **k: {"ok": False, "problems": ["config.json is missing"]}
    )
    says = r"fp8: config\.json is missing; \S+out\.partial is kept as it is; remove it to begin again"
    with pytest.raises(VerificationError, match=says):
        demo(tmp_path / "out", rows=1)
    assert (tmp_path / "out.partial/fp8/nemoquant_scales.json").exists()


def test_a_demo_that_was_killed_at_its_very_end(tmp_path):
    out = tmp_path / "out"
    (out / FOLDER).mkdir(parents=True)
    (out / FOLDER / STATE).write_text("{}")
    (out / "report.html").write_text("html")
    nemoquant("demo", "--out", out, code=2)
    assert tree(out) == {"report.html": b"html"}


def test_places_where_it_cannot_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="file is not a folder; choose another output"):
        demo(tmp_path / "file/out")
    with pytest.raises(OutputError, match="overlaps the source"):
        demo(demo_model() / "out")
    assert tree(tmp_path) == {"file": b"mine"}
    assert not Path(demo_model() / "out").exists()


def test_no_rows(tmp_path):
    result = nemoquant("demo", "--out", tmp_path / "out", "--rows", 0, code=2)
    assert "'--rows': 0 is not in the range 1<=x<=" in result.stderr
    assert list(tmp_path.iterdir()) == []

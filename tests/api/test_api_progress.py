"""Progress of a call: bars in a terminal or a notebook, nothing elsewhere, and a function if one is given."""

import io
import re
import sys
import time
import types
from importlib.machinery import ModuleSpec

import pytest

import nemoquant
from nemoquant.bars import progress_bars, shown
from nemoquant.notebook import in_notebook
from nemoquant.progress import no_progress


class Terminal(io.StringIO):
    """A standard error that claims to be a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Puts a terminal in the place of standard error; pytest's own is put back before a test begins."""

    def put():
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr("nemoquant.bars.SHOW_AFTER", -1.0)
        return sys.stderr

    return put


@pytest.fixture
def notebook(monkeypatch):
    """Modules as a kernel has them; returns what was shown in the cell."""
    cell = []

    class Output:
        """The widget that rich draws in."""

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def clear_output(self, **_):
            pass

        def close(self):
            cell.append("closed")

    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    ipython.display = display
    display.display = lambda thing, **named: cell.append(thing)
    widgets = types.ModuleType("ipywidgets")
    widgets.Output = Output
    widgets.__spec__ = ModuleSpec("ipywidgets", None)
    for name, module in (
        ("IPython", ipython),
        ("IPython.display", display),
        ("ipykernel", types.ModuleType("ipykernel")),
        ("ipywidgets", widgets),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("nemoquant.bars.SHOW_AFTER", -1.0)
    return cell


def work(progress=None):
    with shown(progress) as report:
        for i in range(5):
            report("pack", i, 4, f"layer {i}")


def test_bars_in_a_terminal(terminal):
    stream = terminal()
    work()
    assert "pack" in stream.getvalue() and "100%" in stream.getvalue()


@pytest.mark.parametrize("progress", [False, no_progress], ids=["False", "no_progress"])
def test_quiet_in_a_terminal(progress, terminal):
    stream = terminal()
    work(progress)
    assert stream.getvalue() == ""


def test_no_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    work()
    with progress_bars(quiet=False) as report:
        report("pack", 1, 1, "")


def test_work_that_is_soon_over_shows_nothing(terminal, monkeypatch):
    stream = terminal()
    monkeypatch.setattr("nemoquant.bars.SHOW_AFTER", 60.0)
    work()
    assert stream.getvalue() == ""


def test_a_function_is_called(terminal):
    calls, stream = [], terminal()
    work(lambda *call: calls.append(call))
    assert calls == [("pack", i, 4, f"layer {i}") for i in range(5)]
    assert stream.getvalue() == ""


def test_nothing_where_nobody_looks(capsys):
    work()
    assert capsys.readouterr() == ("", "")


def test_bars_in_a_notebook(notebook, capsys):
    assert in_notebook()
    with shown(None) as report:
        report("pack", 1, 4, "layer 1")
        time.sleep(0.5)  # rich draws ten times a second
    drawn = [thing.text for thing in notebook if hasattr(thing, "text")]
    assert any("pack" in text and "25%" in text and "layer 1" in text for text in drawn)
    assert "closed" in notebook
    assert capsys.readouterr() == ("", "")


def test_a_line_in_a_notebook_without_widgets(notebook, monkeypatch, capsys):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "ipywidgets" and found(name))
    work()
    out, err = capsys.readouterr()
    assert out == "" and notebook == []
    assert err.startswith("pack: done in ") and err.count("\n") == 1


def test_a_stage_that_runs_again_is_timed_anew(monkeypatch, capsys):
    """As the demo's, once for each preset; and what a resumed run finds done has taken no time."""
    clock = [0.0]
    monkeypatch.setattr("nemoquant.bars.time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    with progress_bars(quiet=False) as report:
        for clock[0], done in (
            (0, 0),
            (61, 1),
            (100, 4),
            (1000, 2),
            (1140, 3),
            (1200, 4),
            (1201, 4),
        ):
            report("pack", done, 4, f"layer {done}")
    assert capsys.readouterr().err.splitlines() == [
        "pack: 25%, layer 1, about 3 min 3 s left",
        "pack: done in 1 min 40 s",
        "pack: 50%, layer 2",
        "pack: 75%, layer 3, about 2 min 20 s left",
        "pack: done in 3 min 20 s",
    ]


def test_the_bar_of_a_stage_that_runs_again(terminal):
    stream = terminal()
    with shown(None) as report:
        for done, seconds in ((0, 1.2), (2, 0.2), (0, 0.2), (1, 0.2)):
            report("pack", done, 2, "")
            time.sleep(seconds)  # rich draws ten times a second
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    elapsed = re.findall(r"(100|50)% +(\d:\d\d:\d\d)", drawn)
    assert ("100", "0:00:01") in elapsed and elapsed[-1] == ("50", "0:00:00")


@pytest.mark.parametrize("shell", [None, types.SimpleNamespace()], ids=["no shell", "IPython in a terminal"])
@pytest.mark.usefixtures("notebook")
def test_what_is_no_notebook(shell, monkeypatch):
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: shell)
    assert not in_notebook()


def test_a_run_in_a_terminal(source, token_rows, tmp_path, terminal):
    """All stages are drawn, and its warnings are in the result alone."""
    stream = terminal()
    made = nemoquant.quantize(
        source, tmp_path / "out", "nvfp4-w4a16", method="max", data=token_rows, threads=1
    )
    assert made.warnings == ["recipe nvfp4-w4a16-max needs no calibration: --calib is not used"]
    assert "pack" in stream.getvalue() and "verify" in stream.getvalue()
    assert "--calib" not in stream.getvalue()
    quiet = terminal()
    nemoquant.verify(tmp_path / "out", progress=False)
    assert quiet.getvalue() == ""

"""How commands end: after signals, and when who reads their output has gone. Processes of their own."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support.commands import error_line, nemoquant
from support.files import tree
from support.places import DEMO
from support.processes import listening

SLOW = """
import sys, time
from nemoquant.calibrate import run
from nemoquant.cli import main
layer, at = run._Run.layer, int(sys.argv.pop(1))
def slow(self, i, *rest):
    if i == at:
        print("here", flush=True)
        time.sleep(60)
    return layer(self, i, *rest)
run._Run.layer = slow
main()
"""


@pytest.fixture
def begun(source, token_rows, tmp_path):
    """Starts ``quantize`` into new folders, and returns it once it waits in layer ``layer``."""
    started = []

    def begin(layer=0, ignored=()):
        command = [sys.executable, "-c", SLOW, str(layer), "quantize", source, tmp_path / "new/out"]
        command += ["--fmt", "fp8", "--method", "max", "--calib", token_rows, "--threads", "1"]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: listening(ignored),
        )
        started.append(process)
        assert process.stdout.readline() == "here\n", process.stderr.read()
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def last_line(process):
    """The error of a process that must end now; nothing else but the lines of a run may be told."""
    _, told = process.communicate(timeout=120)
    lines = [line for line in told.splitlines() if not line.startswith(("expected: ", "fp8-max: "))]
    return error_line("\n".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "name", "code"),
    [
        (signal.SIGINT, "interrupted", 130),
        (signal.SIGTERM, "interrupted by SIGTERM", 143),
        (signal.SIGHUP, "interrupted by SIGHUP", 129),
    ],
)
def test_signals_end_alike(number, name, code, begun, tmp_path):
    process = begun(layer=2)
    process.send_signal(number)
    kept = f"{tmp_path}/new/out.partial is kept (2 layers calibrated): --resume goes on from there"
    assert last_line(process) == f"error: {name}; {kept}"
    assert process.returncode == code


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.001, 0.1])
def test_a_second_signal_disturbs_nothing(seconds, begun, tmp_path):
    """Wherever it falls: while files are removed, while the error is told, while Python ends."""
    before = tree(tmp_path)
    process = begun()
    for _ in range(4):
        process.send_signal(signal.SIGINT)
        time.sleep(seconds)
    assert last_line(process) == "error: interrupted; nothing was kept"
    assert process.returncode == 130
    assert tree(tmp_path) == before


def test_a_signal_that_was_lost_can_be_sent_again(monkeypatch):
    """A library may swallow the first one; the next is raised again once the cleaning up should be over."""
    from nemoquant.cli import ending

    monkeypatch.setattr(ending, "GRACE", 0.05)
    before = signal.getsignal(signal.SIGINT)
    with ending.Ending(program=False) as end:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.06)
        assert end.signal is signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_nohup_is_respected(begun):
    process = begun(ignored=[signal.SIGHUP])
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert last_line(process) == "error: interrupted by SIGTERM; nothing was kept"


def test_an_interrupt_when_all_is_written(source, token_rows, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("nemoquant.cli.quantize._calibrated", interrupt)
    out = tmp_path / "out"
    result = nemoquant(
        "quantize", source, out, "--fmt", "fp8", "--method", "max", "--calib", token_rows, code=130
    )
    assert result.stderr.splitlines()[-1] == f"error: interrupted; {out} is whole"
    assert nemoquant("verify", out).exit_code == 0


@pytest.mark.parametrize(("verb", "more"), [("verify", 0), ("diff", 1)])
def test_an_interrupt_of_what_keeps_nothing(verb, more, source, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("nemoquant.api." + verb, interrupt)
    assert nemoquant(verb, source, *[source] * more, code=130).stderr == "error: interrupted\n"


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, AssertionError])
def test_an_error_that_nobody_foresaw(kind, source, monkeypatch):
    """Not 1, which a script would take for a check that failed."""

    def fails(*_, **__):
        raise kind("of a library")

    monkeypatch.setattr("nemoquant.api.verify", fails)
    result = nemoquant("verify", source, code=70)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and lines[-2] == f"{kind.__name__}: of a library"
    error_line(lines[-1], [kind.__name__, "please report it with the lines above"])


CLOSED = """
import os, sys
from nemoquant.bars import progress_bars
from nemoquant.cli import main
try:
    main()
except SystemExit as ended:
    with progress_bars(quiet=False) as report, open(os.devnull) as opened:
        report("pack", 1, 1, "")
        os._exit(ended.code if opened.fileno() > 2 else 99)
"""


@pytest.mark.parametrize(("arguments", "code"), [(["recipes", "list"], 0), (["inspect", "/nowhere"], 2)])
def test_standard_streams_that_are_closed(arguments, code):
    """The next file that is opened must not be the one that a library prints to."""
    closing = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", CLOSED, *arguments]
    assert subprocess.run(closing, check=False, timeout=60).returncode == code


def unread(*arguments, stream="stdout"):
    """Runs a command whose standard output or error nobody reads; returns its code, and the other stream."""
    read, write = os.pipe()
    os.close(read)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: write}
    command = [sys.executable, "-m", "nemoquant", *map(str, arguments)]
    with subprocess.Popen(command, text=True, **streams) as process:
        os.close(write)
        told = process.communicate(timeout=120)
    return process.returncode, told[0] or told[1] or ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["recipes", "list"],
        ["inspect", DEMO, "--json"],
        ["plan", DEMO, "--fmt", "fp8"],
        ["generate", DEMO, "--prompt", "It", "--max-tokens", "2"],
        ["doctor"],
    ],
    ids=lambda arguments: " ".join(map(str, arguments[:1] + arguments[2:])),
)
def test_output_that_nobody_reads(arguments):
    """As other tools end in ``nemoquant ... | head``: by the signal, without a word."""
    assert unread(*arguments) == (-signal.SIGPIPE, "")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["inspect", "/nowhere"], ["plan", DEMO, "--fmt", "fp9"], ["demo"]])
def test_errors_that_nobody_reads(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert unread(*arguments, stream="stderr") == (-signal.SIGPIPE, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_whose_messages_nobody_reads_leaves_nothing(source, token_rows, tmp_path):
    before = tree(tmp_path)
    arguments = [
        "quantize",
        source,
        tmp_path / "new/out",
        "--fmt",
        "fp8",
        "--method",
        "max",
        "--calib",
        token_rows,
    ]
    assert unread(*arguments, stream="stderr") == (-signal.SIGPIPE, "")
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_an_error_of_its_own_is_told_though_nobody_reads_the_output():
    code, told = unread("inspect", "/nowhere")
    assert code == 2
    assert error_line(told, ["/nowhere"])

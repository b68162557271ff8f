"""Names of the hub in every verb; without ``--download`` nothing reaches a network."""

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from huggingface_hub import constants
from support.commands import check_parts, error_line, nemoquant, refusal
from support.fake_hub import Hub, commit_of, content, serving
from support.hub_cache import put
from support.hub_settings import use_cache, use_hub
from support.processes import run_python

import nemoquant as package

NAME, OURS, COMMIT = "maker/Model-1", "maker/Model-1-FP8", commit_of(1)
NETWORK = ("connect", "getaddrinfo", "gethostbyname", "sendto", "sendmsg", "bind")
SETTINGS = {"config.json", "model.safetensors.index.json"}
watching: list[list[str]] = []  # a hook can't be taken away: it looks only while a test asks it to


def audited(event: str, details: tuple[Any, ...]) -> None:
    if watching and event.removeprefix("socket.") in NETWORK:
        watching[-1].append(f"{event} {details}")
        raise PermissionError("no network in this test")


sys.addaudithook(audited)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "home" / "hub"
    use_cache(monkeypatch, folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    with serving() as hub:
        use_hub(monkeypatch, hub.url)
        yield hub


@pytest.fixture
def no_network() -> Iterator[None]:
    """Every try to reach a network fails, and so does the test."""
    watching.append([])
    try:
        yield
        assert watching[-1] == []
    finally:
        watching.pop()


def test_the_test_sees_a_network(no_network):  # noqa: ARG001
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one, pytest.raises(PermissionError):
        one.connect(("127.0.0.1", 9))
    assert watching[-1].pop().startswith("socket.connect")


@pytest.fixture
def ours(cache, source, quantized) -> Path:
    """The source in the cache, and beside it what we made of it; returns the snapshot of that."""
    put(cache, NAME, content(source), COMMIT, "main")
    return put(cache, OURS, content(quantized("fp8", name="ours")), COMMIT, "main")


def test_looking_at_a_name(cache, ours, no_network):  # noqa: ARG001
    said = f"{NAME} is {cache}/models--maker--Model-1/snapshots/{COMMIT}\n"
    assert nemoquant("inspect", NAME).stderr == said
    done = nemoquant("plan", f"hf://{NAME}", "--fmt", "fp8", "--json")
    assert json.loads(done.stdout)["recipe"] and done.stderr == said
    done = nemoquant("plan", cache / "models--maker--Model-1", "--fmt", "fp8", "--estimate")
    assert "on this machine" in done.stdout and said in done.stderr


def test_quantizing_a_name(cache, source, no_network, tmp_path):  # noqa: ARG001
    put(cache, NAME, content(source), COMMIT, "main")
    out, link = tmp_path / "out", f"[{NAME}](https://huggingface.co/{NAME}/tree/{COMMIT})"
    nemoquant("quantize", NAME, out, "--recipe", "nvfp4-w4a16", "--method", "max")
    assert json.loads((out / "nemoquant.json").read_text())["source"]["hub"] == {
        "model": NAME,
        "commit": COMMIT,
    }
    card = (out / "README.md").read_text()
    assert f"- Source: {link}, revision `{COMMIT}`\n" in card and f"base_model: {NAME}\n" in card
    nemoquant("verify", out, "--against", f"{NAME}@{COMMIT}")


def test_comparing_names(ours, no_network, token_rows, source):  # noqa: ARG001
    card = (ours / "README.md").read_text()
    done = nemoquant("diff", NAME, OURS, "--data", token_rows, "--threads", 1, "--json", "-")
    found = json.loads(done.stdout)
    assert found["reference"]["name"] == NAME
    assert [one["name"] for one in found["candidates"]] == [OURS]
    assert f"the card of {OURS} in the hub's cache is left as it is" in found["warnings"]
    assert (ours / "README.md").is_symlink() and (ours / "README.md").read_text() == card
    nemoquant("verify", OURS, "--against", NAME)


def test_converting_and_exporting_a_name(ours, no_network, tmp_path):  # noqa: ARG001
    nemoquant("convert", OURS, tmp_path / "bf16", "--to", "bf16")
    record = json.loads((tmp_path / "bf16" / "nemoquant_converted.json").read_text())
    assert record["made_from"]["hub"] == {"model": OURS, "commit": COMMIT}
    assert f"tree/{COMMIT}), revision `{COMMIT}`" in (tmp_path / "bf16" / "README.md").read_text()
    nemoquant("export", "onnx", OURS, tmp_path / "onnx")
    assert (tmp_path / "onnx" / "model.onnx").exists()
    assert "hub" not in json.loads((tmp_path / "ours" / "nemoquant.json").read_text())["source"]


VERBS = [
    ["inspect", NAME],
    ["plan", NAME, "--fmt", "fp8"],
    ["quantize", NAME, "out", "--fmt", "fp8"],
    ["verify", NAME],
    ["diff", NAME, "out"],
    ["generate", NAME, "--prompt", "a"],
    ["convert", NAME, "out", "--to", "bf16"],
    ["export", "onnx", NAME, "out"],
    ["export", "trt", NAME, "out.engine"],
]


@pytest.mark.parametrize("arguments", VERBS, ids=lambda arguments: " ".join(arguments[:2]))
def test_a_name_that_the_cache_has_not(arguments, cache, no_network, tmp_path):  # noqa: ARG001
    parts = [f"{NAME}: there is no file or folder of that name", f"{cache} has nothing of it"]
    refusal(*arguments, parts=[*parts, f"`hf download {NAME}` or the option --download fetches it"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", VERBS, ids=lambda arguments: " ".join(arguments[:2]))
def test_every_verb_that_takes_a_model_downloads(arguments):
    verb = arguments[: arguments.index(NAME)]
    text = nemoquant(*verb, "--help").stdout
    check_parts(["--download", "name on the hub"], " ".join(text.split()))


def test_the_variables_of_the_hub_name_cache_and_server(source, tmp_path, monkeypatch):
    """In a real process, whose huggingface_hub reads them."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    main = "import sys; from nemoquant.cli import main; main(sys.argv[1:], prog_name='nemoquant')"
    arguments = (
        "quantize",
        NAME,
        tmp_path / "out",
        "--recipe",
        "nvfp4-w4a16",
        "--method",
        "max",
        "--download",
    )
    with serving() as hub:
        commit = hub.add(NAME, content(source))
        done = run_python(main, *arguments, HF_HOME=str(tmp_path / "other"), HF_ENDPOINT=hub.url)
    snapshot = tmp_path / "other" / "hub" / "models--maker--Model-1" / "snapshots" / commit
    assert f"{NAME} is {snapshot}\n" in done.stderr and "download: done in " in done.stderr


# Downloads.


def test_what_is_fetched_for_a_plan_is_the_settings(hub, source, tmp_path):
    hub.add(NAME, content(source) | {"parser.py": b"code"})
    done = nemoquant("plan", NAME, "--fmt", "fp8", "--download")
    assert "its config alone is used" in done.stderr and set(hub.fetched()) == SETTINGS
    out = tmp_path / "out"
    recipe = ("--recipe", "nvfp4-w4a16", "--method", "max", "--also", "parser.py")
    nemoquant("quantize", NAME, out, *recipe, "--download")
    assert (out / "parser.py").read_bytes() == b"code"
    nemoquant("verify", out, "--against", NAME)


REFUSED = [(["--recipe", "no-such-recipe"], "no-such-recipe"), (["--fmt", "fp8", "--also", "no.py"], "no.py")]


@pytest.mark.parametrize(("options", "part"), REFUSED)
def test_what_is_refused_before_weights_are_fetched(options, part, hub, source, tmp_path):
    hub.add(NAME, content(source))
    line = refused_late(lambda *more: nemoquant("quantize", NAME, tmp_path / "out", *options, *more, code=2))
    assert part in line
    assert set(hub.fetched()) <= SETTINGS


def test_an_output_that_exists_is_refused_before_weights_are_fetched(hub, source, tmp_path):
    hub.add(NAME, content(source))
    (tmp_path / "out").mkdir()
    arguments = ("quantize", NAME, tmp_path / "out", "--fmt", "fp8")
    assert "nothing is overwritten" in refused_late(lambda *more: nemoquant(*arguments, *more, code=2))
    assert set(hub.fetched()) <= SETTINGS


def refused_late(call: Callable[..., Result]) -> str:
    """The last line of a refusal after the settings were fetched, which was said."""
    *before, last = call("--download").stderr.splitlines(keepends=True)
    assert all(line.startswith("settings: ") for line in before)
    return error_line(last)


def test_errors_of_the_hub_are_one_line(hub, source, monkeypatch):
    hub.add(NAME, content(source))
    hub.models[NAME].gated = True
    refusal("inspect", NAME, "--download", parts=[f"{NAME} is gated", f"{hub.url}/{NAME}", "HF_TOKEN"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    first, last = nemoquant("inspect", NAME, "--download", code=2).stderr.splitlines()
    assert first.startswith("HF_HUB_OFFLINE is set")
    check_parts(["once HF_HUB_OFFLINE is unset"], error_line(last))


LIGHT = """
import sys
from click.testing import CliRunner
from nemoquant.cli import main
for arguments in ([verb, "--help"] for verb in ("inspect", "plan", "quantize", "diff")):
    assert CliRunner().invoke(main, arguments).exit_code == 0
assert CliRunner().invoke(main, ["inspect", sys.argv[1]]).exit_code == 0
print([m for m in ("huggingface_hub", "httpx") if m in sys.modules])
"""


def test_a_path_loads_nothing_of_the_hub(source):
    assert run_python(LIGHT, source).stdout == "[]\n"


def test_the_python_api(cache, source, no_network):  # noqa: ARG001
    snapshot = put(cache, NAME, content(source), COMMIT, "main")
    said: list[str] = []
    options: dict[str, Any] = {"say": said.append}
    assert package.inspect(NAME, **options)["source"] == "headers"
    assert package.plan(Path(NAME), "fp8", **options).rows
    assert package.estimate(NAME, "fp8", **options).memory
    assert said == [f"{NAME} is {snapshot}"] * 3
    with pytest.raises(package.HubError, match="there is no file or folder of that name"):
        package.generate("maker/Other", "a")
    with pytest.raises(package.UsageError, match="download is 1; expected True or False"):
        package.inspect(NAME, download=1)  # type: ignore[arg-type]

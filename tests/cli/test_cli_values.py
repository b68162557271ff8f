"""Every option of every verb that takes a number, a size or a path: impossible values, and the home."""

import click
import pytest
from support.commands import invoke

from nemoquant.cli import VERBS, main
from nemoquant.cli.shared import Bytes, Model, Place, local

IMPOSSIBLE = ("nan", "inf", "-inf", "-1", "1e400", "9" * 400, "9" * 5000, "\u00b2", "", "a")


def commands():
    """Every command with the words that call it."""
    for verb in VERBS:
        command = main.get_command(click.Context(main), verb)
        if isinstance(command, click.Group):
            yield from (((verb, name), inner) for name, inner in command.commands.items())
        else:
            yield (verb,), command


def options(kind):
    return [
        pytest.param(words, command, option, id=" ".join((*words, option.opts[0])))
        for words, command in commands()
        for option in command.params
        if isinstance(option, click.Option) and isinstance(option.type, kind)
    ]


def required(command):
    """Words for what else must be given."""
    given = ["nowhere" for p in command.params if isinstance(p, click.Argument) and p.required]
    return given + [
        w for p in command.params if isinstance(p, click.Option) and p.required for w in (p.opts[0], "x")
    ]


NUMBERS = options((click.types.IntParamType, click.types.FloatParamType, Bytes))


def test_numbers_are_found():
    assert len(NUMBERS) >= 25
    found = {option.values[2].opts[0] for option in NUMBERS}
    assert {"--rows", "--memory", "--shard-size", "--seed", "--temperature", "--threads", "--sm"} <= found


@pytest.mark.parametrize(("words", "command", "option"), NUMBERS)
def test_impossible_numbers(words, command, option):
    for value in (*IMPOSSIBLE, *(["100000"] if option.name == "threads" else [])):
        result = invoke(*words, *required(command), f"{option.opts[0]}={value}")
        assert result.exit_code == 2 and isinstance(result.exception, SystemExit), (value, result.exception)
        assert result.stderr.splitlines()[-1].startswith(f"Error: Invalid value for '{option.opts[0]}'"), (
            value
        )
        assert len(result.stderr) < 6000 and result.stdout == ""


@pytest.mark.parametrize("value", ["3:\u00b2", "nan:3", "-1:3", "1:" + "9" * 5000, ":", "3"])
def test_impossible_layers(value):
    result = invoke("export", "onnx", "nowhere", f"--layers={value}")
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: --layers ") and result.stderr.count("\n") == 1


def parameters(kind):
    return [
        pytest.param(words, parameter, id=" ".join((*words, parameter.human_readable_name)))
        for words, command in commands()
        for parameter in command.params
        if isinstance(parameter.type, kind)
    ]


PLACES, MODELS = parameters(Place), parameters(Model)


def test_no_path_is_of_another_type():
    others = [
        (words, parameter.name)
        for words, command in commands()
        for parameter in command.params
        if isinstance(parameter.type, click.Path | click.File) and not isinstance(parameter.type, Place)
    ]
    assert others == []
    assert len(PLACES) >= 20 and len(MODELS) >= 10


@pytest.mark.parametrize(("words", "parameter"), PLACES)
def test_the_home_in_every_path(words, parameter, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    several = parameter.multiple or parameter.nargs == -1
    value = parameter.type_cast_value(click.Context(main), ("~/x",) if several else "~/x")
    assert (value if several else (value,)) == (tmp_path / "x",), words


@pytest.mark.parametrize(("words", "parameter"), MODELS)
def test_the_home_of_every_model(words, parameter, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    several = parameter.nargs == -1
    value = parameter.type_cast_value(click.Context(main), ("~/x",) if several else "~/x")
    assert local(value[0] if several else value, download=False) == tmp_path / "x", words


@pytest.mark.parametrize("text", ["", "a\0b", "\ud800", "x" * 256, "x/" * 3000])
@pytest.mark.parametrize("parameter", [PLACES[0].values[1], MODELS[0].values[1]], ids=["path", "model"])
def test_what_is_no_path(parameter, text):
    with pytest.raises(click.BadParameter, match="expected a path"):
        parameter.type_cast_value(click.Context(main), text)


def test_the_home_of_nobody_is_left_alone():
    """As in a shell: such a name may exist, and a message names it."""
    parameter = PLACES[0].values[1]
    assert str(parameter.type_cast_value(click.Context(main), "~no such user/x")) == "~no such user/x"
    assert str(parameter.type_cast_value(click.Context(main), "a/~")) == "a/~"


def test_the_home_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("name: mine\nsummary: s\nrules: [{roles: ['*'], format: source}]\n")
    result = invoke("recipes", "show", "~/mine.yaml")
    assert (result.exit_code, result.stdout[:10]) == (0, "name: mine")
    result = invoke("plan", "nowhere", "--recipe", "~/mine.yaml")
    assert "nowhere" in result.stderr and "mine.yaml" not in result.stderr

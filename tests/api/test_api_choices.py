"""Words that are known are named in one place each: the command line, the checks and the code agree."""

import ast
from typing import get_args

import click
import pytest
from support.places import PACKAGE

from nemoquant.calibrate.batch import ITEM_SIZE
from nemoquant.cli import diff, export, generate, plan, quantize
from nemoquant.engine import ENGINES, TARGETS, EngineName, TargetName
from nemoquant.engine.doctor import doctor
from nemoquant.engine.load import load_engine
from nemoquant.errors import CheckpointError, NemoquantError, UsageError
from nemoquant.formats import METHODS, Device
from nemoquant.graph import COMPUTES, DIALECT_NAMES
from nemoquant.ops import functional
from nemoquant.run.options import DEVICES, DTYPES, PLACES


def choices(command: click.Command, name: str) -> list[str]:
    return list(next(p for p in command.params if p.name == name).type.choices)


@pytest.mark.parametrize(
    ("command", "name", "known"),
    [
        (diff.command, "engine", ENGINES),
        (generate.command, "engine", ENGINES),
        (diff.command, "device", DEVICES),
        (plan.command, "device", DEVICES),
        (quantize.command, "device", DEVICES),
        (quantize.command, "method", METHODS),
        (plan.command, "method", METHODS),
        (quantize.command, "dtype", ("auto", *DTYPES)),
        (quantize.command, "on", PLACES),
        (quantize.command, "renamed", PLACES),
        (export.export_onnx, "dialect", DIALECT_NAMES),
        (export.export_onnx, "compute", COMPUTES),
        (export.export_trt, "compute", COMPUTES),
        (export.export_trt, "target", tuple(TARGETS)),
    ],
    ids=lambda value: getattr(value, "name", None) or str(value),
)
def test_choices_of_the_command_line(command, name, known):
    assert choices(command, name) == list(known)


def test_no_verb_has_a_list_of_its_own():
    """A click.Choice takes a name; only ``--fmt``, in shared.py, has words: presets with a format's name."""
    written = [
        f"{path.name}:{node.lineno}"
        for path in sorted((PACKAGE / "cli").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "click.Choice"
        and isinstance(node.args[0], ast.List | ast.Tuple)
        and all(isinstance(word, ast.Constant) for word in node.args[0].elts)
    ]
    assert [place for place in written if not place.startswith("shared.py:")] == []


def test_the_light_names_are_those_of_the_heavy_tables():
    dialects = pytest.importorskip("nemoquant.graph.dialects")
    assert tuple(dialects.DIALECTS) == DIALECT_NAMES
    assert tuple(dialects.COMPUTE) == COMPUTES
    assert {word for dialect in dialects.DIALECTS.values() for word in dialect.computes} == set(COMPUTES)
    assert {target.dialect for target in TARGETS.values()} <= set(DIALECT_NAMES)
    assert set(DTYPES) == set(ITEM_SIZE)
    assert get_args(Device) == DEVICES == functional.DEVICES


def test_the_engines_are_the_targets_and_two_more():
    assert get_args(EngineName) == ENGINES == ("torch", "onnxruntime", *TARGETS)
    assert get_args(TargetName) == tuple(TARGETS) == tuple(target.name for target in TARGETS.values())


def test_the_doctor_looks_at_every_engine():
    assert {finding.name for finding in doctor()} == {"machine", "plugins", *ENGINES}


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_can_be_asked_for(name, tmp_path):
    """Its own refusal of an empty folder, or of a missing engine file, not one of its name."""
    with pytest.raises(NemoquantError) as refused:
        load_engine(name, tmp_path)
    assert "expected torch, onnxruntime" not in str(refused.value)
    assert isinstance(refused.value, UsageError if name in TARGETS else CheckpointError)

"""The options of a run: one table has flag, default and what may change on resume.

The command line and the state follow it.
"""

import pickle
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from nemoquant.cli.quantize import command
from nemoquant.errors import UsageError
from nemoquant.run.options import OPTIONS, RunOptions


def test_every_option_is_in_the_table():
    assert set(OPTIONS) == {field.name for field in fields(RunOptions)}
    assert len({option.flag for option in OPTIONS.values()}) == len(OPTIONS)


def test_the_command_line_has_each_of_them_by_its_flag_and_default():
    given = {parameter.name: parameter for parameter in command.params}
    for name, option in OPTIONS.items():
        assert given[name].opts == [option.flag]
    spelled = {
        "dtype": "auto",
        "shard_bytes": 5.0,
        "scale_groups": False,
        "resume": False,
    }  # a flag's own spelling
    for name, option in OPTIONS.items():
        assert given[name].default == spelled.get(name, option.default), name


def test_they_are_frozen_and_go_by_their_names():
    with pytest.raises(FrozenInstanceError):
        RunOptions().rows = 3
    with pytest.raises(TypeError):
        RunOptions("text.jsonl")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": 0}, "rows is 0; expected at least 1"),
        ({"seq_len": -1}, "seq_len is -1; expected at least 1"),
        ({"memory": 0}, "memory is 0; expected at least 1"),
        ({"row_batch": 0}, "row_batch is 0; expected at least 1"),
        ({"threads": 0}, "threads is 0; expected at least 1"),
        ({"shard_bytes": 0}, "shard_bytes is 0; expected at least 1"),
        ({"device": "tpu"}, "device is 'tpu'; expected cpu or cuda"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected float32 or bfloat16"),
        ({"method": "best"}, "method is 'best'; expected max, mse, four_over_six, hess or gptq"),
        ({"folds": ["heads"]}, "folds is 'heads'; expected latent, norm, gate or expert"),
        ({"descent": 17}, "descent is 17; expected at most 16"),
        ({"headroom": 0.5}, "headroom is 0.5; expected a number from 1 to 16"),
        ({"on": "spark"}, "on is 'spark'; expected local or ray"),
        ({"address": "auto"}, "an address (auto) goes with --on ray only; give both, or neither"),
        (
            {"on": "ray", "device": "cuda"},
            "--on ray computes on processors only, device is 'cuda'; expected cpu",
        ),
    ],
)
def test_what_no_run_can_be_told(options, says):
    with pytest.raises(UsageError) as error:
        RunOptions(**options)
    assert str(error.value) == says


def test_the_old_name_of_on():
    with pytest.warns(DeprecationWarning, match="engine, an option of quantize, is now on") as warned:
        options = RunOptions(engine="ray")
    assert warned[0].filename == __file__
    assert options == RunOptions(on="ray")
    assert replace(options, rows=3) == RunOptions(on="ray", rows=3)
    with pytest.warns(DeprecationWarning):
        assert RunOptions(engine="ray", on="ray") == RunOptions(on="ray")
    with pytest.raises(UsageError, match="on is 'local' and engine, its old name, 'ray'; expected on alone"):
        RunOptions(engine="ray", on="local")
    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(UsageError, match="on is 'spark'; expected local"),
    ):
        RunOptions(engine="spark")
    assert "engine" not in repr(options)
    assert pickle.loads(pickle.dumps(options)) == options


def test_values_are_shown_as_the_command_line_spells_them():
    assert OPTIONS["shard_bytes"].shown(5_000_000_000) == "5.0"
    assert OPTIONS["scale_groups"].shown(True) == "False"
    assert OPTIONS["row_batch"].shown({"mamba": 4, "moe": 2}) == "4 (mamba), 2 (moe)"
    assert {option.shown(None) for option in OPTIONS.values()} == {"not given"}

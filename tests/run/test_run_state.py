"""The file of a run's state: whatever is wrong with it is one line; nothing of it is used unchecked."""

import copy
import json
import os

import pytest
from support.files import changed_files

from nemoquant.api import RunOptions, quantize
from nemoquant.errors import NemoquantError, OutputError
from nemoquant.run.state import read_state, write_state
from nemoquant.run.unfinished import FOLDER, STATE

WRONG = [None, True, -1, 2**40, 1.5, float("nan"), "x", "../x", [], ["x"], {}, {"x": 1}, [[]]]


@pytest.fixture(params=["layers", "shards"])
def stopped(request, source, token_rows, tmp_path, monkeypatch):
    """(its file, the state, a call that goes on) of a run that was stopped in calibration or packing."""
    from nemoquant.calibrate import run
    from nemoquant.pack import write

    where = {"layers": (run._Run, "layer"), "shards": (write.Packer, "write")}[request.param]
    function, calls = getattr(*where), 0

    def stop(*arguments):
        nonlocal calls
        calls += 1
        if calls > 2:
            raise KeyboardInterrupt
        return function(*arguments)

    def make(resume=True):
        options = RunOptions(
            method="max", data=token_rows, dtype="float32", threads=1, shard_bytes=30_000, resume=resume
        )
        quantize(source, tmp_path / "out", "nvfp4", options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*where, stop)
        make(resume=False)
    monkeypatch.setattr(*where, lambda *arguments: 1 / 0)
    file = tmp_path / "out.partial" / FOLDER / STATE
    return file, read_state(file), make


def places(data, path=()):
    """Paths of everything in JSON data, of long lists and objects those of the first two."""
    yield path
    if isinstance(data, dict | list):
        items = data.items() if isinstance(data, dict) else enumerate(data)
        for key, inner in list(items)[:2] if path else items:
            yield from places(inner, (*path, key))


def at(data, path):
    for key in path:
        data = data[key]
    return data


def changed(data, path, value):
    data = copy.deepcopy(data)
    if not path:
        return value
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


def test_values_of_other_types(stopped):
    """Each is refused in one line; one of the right type is as good: the run goes on, and stops again."""
    file, state, make = stopped
    refused = 0
    for path in places(state):
        for value in WRONG:
            if (path, value) == (("calibration",), None):
                continue  # as before the first layer
            write_state(file, changed(state, path, value))
            try:
                make()
            except ZeroDivisionError:
                in_scales = "collected" in path  # which say themselves what they can be read from
                assert in_scales or type(value) is type(at(state, path)), (path, value)
            except NemoquantError as error:
                assert "\n" not in str(error), (path, value)
                refused += 1
    assert refused > 100


def test_what_is_missing_or_too_much(stopped):
    file, state, make = stopped
    for path in places(state):
        if path and isinstance(path[-1], str) and path[0] != "identity":
            data = copy.deepcopy(state)
            place = data
            for key in path[:-1]:
                place = place[key]
            del place[path[-1]]
            write_state(file, data)
            with pytest.raises((OutputError, ZeroDivisionError)):
                make()
    write_state(file, state | {"more": 1})
    with pytest.raises(
        OutputError, match=r"`more` is 1: extra inputs are not permitted\); remove .*out\.partial and"
    ):
        make()


def test_layers_and_rows_that_the_run_lacks(stopped):
    file, state, make = stopped
    if state["calibrated"]:
        return
    for key, value in (("layers", 99), ("dead_rows", [8])):
        write_state(file, changed(state, ("calibration", key), value))
        with pytest.raises(OutputError, match="more layers or rows than this run"):
            make()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ((("calibration", "dead_rows"), [0, 1, 2, 3, 4, 5, 6, 7]), "more rows came to NaN or Inf"),
        ((("calibration", "collected", "scales", "settings"), {}), "not the scales so far: `settings.rows`"),
        ((("calibration", "collected", "scales", "kv_amax"), {"x": -1.0}), "not the scales so far"),
        ((("calibration", "collected", "scales", "input_amax"), {"x": 1.0}), "modules that this model lacks"),
        ((("calibrated",), True), "calibration lacks scales_sha256, solved"),
        ((("calibration",), None), "is damaged: its sha256 is not the one in the run's state"),
    ],
)
def test_what_no_run_writes(change, says, stopped, monkeypatch):
    """Also where the types are right."""
    file, state, make = stopped
    path, value = change
    if state["calibrated"] != (path == ("calibration",)):
        return
    write_state(file, changed(state, path, value))
    monkeypatch.undo()
    with pytest.raises(NemoquantError, match=says):
        make()


def test_a_shard_whose_hashes_are_missing_is_packed_again(stopped, tmp_path, monkeypatch, source, token_rows):
    file, state, make = stopped
    if not state["calibrated"]:
        return
    for entry in state["shards"].values():
        entry["units"] = {}
    write_state(file, state)
    monkeypatch.undo()
    make()
    options = RunOptions(method="max", data=token_rows, dtype="float32", threads=1, shard_bytes=30_000)
    quantize(source, tmp_path / "whole", "nvfp4", options)
    assert changed_files(tmp_path / "out", tmp_path / "whole") == []


def test_a_flipped_bit_is_found(stopped):
    file, _, _ = stopped
    text = file.read_text()
    digits = [i for i, c in enumerate(text) if c in "012345678"]
    for i in digits[:: max(1, len(digits) // 40)]:
        file.write_text(text[:i] + chr(ord(text[i]) + 1) + text[i + 1 :])
        if json.loads(file.read_text()) == json.loads(text):
            continue  # a digit behind those that float32 has
        with pytest.raises(ValueError, match=r"sha256 does not fit|another version|not the state"):
            read_state(file)


@pytest.mark.parametrize("what", ["pipe", "folder", "link", "large"])
def test_no_file_of_ours(what, stopped, tmp_path, monkeypatch):
    file, _, make = stopped
    text = file.read_text()
    file.unlink()
    if what == "pipe":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    elif what == "link":
        (tmp_path / "elsewhere").write_text(text)
        file.symlink_to(tmp_path / "elsewhere")
    else:
        monkeypatch.setattr("nemoquant.run.state.MOST_JSON", 100)
        file.write_text(text)
    with pytest.raises(OutputError, match=rf"{STATE} can't be read .*remove .*out\.partial and begin again"):
        make()


def test_the_state_is_repeated_exactly(stopped):
    file, state, _ = stopped
    text = file.read_text()
    write_state(file, state)
    assert file.read_text() == text
    assert json.loads(text)["state"] == state

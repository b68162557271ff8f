"""A call leaves the process that it runs in as it was: torch's threads, the environment; on an error too."""

import os
import threading

import pytest
import torch

import nemoquant
from nemoquant.checkpoint import intact
from nemoquant.engine.load import load_engine
from nemoquant.engine.torch import TorchEngine
from nemoquant.machine import torch_threads

BEFORE = 3  # neither one nor what this machine has


@pytest.fixture(autouse=True)
def threads_of_the_host():
    number = torch.get_num_threads()
    torch.set_num_threads(BEFORE)
    environment = dict(os.environ)
    yield
    unchanged = torch.get_num_threads(), dict(os.environ)
    torch.set_num_threads(number)
    del environment["PYTEST_CURRENT_TEST"], unchanged[1]["PYTEST_CURRENT_TEST"]
    assert unchanged == (BEFORE, environment)


@pytest.fixture
def seen(monkeypatch):
    """The numbers that torch was given, in order."""
    numbers, set_number = [], torch.set_num_threads

    def note(number):
        numbers.append(number)
        set_number(number)

    monkeypatch.setattr(torch, "set_num_threads", note)
    return numbers


def test_the_number_is_set_back_on_an_error(seen):
    with pytest.raises(KeyError), torch_threads(2):
        assert torch.get_num_threads() == 2
        raise KeyError
    assert seen == [2, BEFORE]
    with torch_threads(None):
        assert torch.get_num_threads() == BEFORE
    assert seen == [2, BEFORE]


@pytest.fixture
def out(quantized, seen):
    folder = quantized("fp8", threads=2)
    assert seen == [2, BEFORE]
    seen.clear()
    return folder


def test_quantize_that_fails(source, token_rows, tmp_path, seen, monkeypatch):
    def fails(*_, **__):
        assert torch.get_num_threads() == 2
        raise nemoquant.CalibrationError("no")

    monkeypatch.setattr("nemoquant.calibrate.run.calibrate", fails)
    with pytest.raises(nemoquant.CalibrationError):
        nemoquant.quantize(source, tmp_path / "out", "fp8", method="max", data=token_rows, threads=2)
    assert seen == [2, BEFORE]


def test_quantize_verify_and_diff(source, out, token_rows, seen):
    assert nemoquant.verify(out, source)["ok"]
    report = nemoquant.diff(source, out, data=token_rows, threads=2, card=False)
    assert report.threads == 2
    assert seen == [2, BEFORE]


def test_a_diff_that_fails(source, out, token_rows, seen, monkeypatch):
    def fails(*_, **__):
        assert torch.get_num_threads() == 2
        raise nemoquant.CheckpointError("no")

    monkeypatch.setattr("nemoquant.evaluate.run.diff", fails)
    with pytest.raises(nemoquant.CheckpointError):
        nemoquant.diff(source, out, data=token_rows, threads=2)
    assert seen == [2, BEFORE]


def test_estimate(source, seen):
    nemoquant.estimate(source, "fp8", method="max", threads=2, rows=4, seq_len=16)
    assert seen == [2, BEFORE]
    nemoquant.estimate(source, "fp8", threads=2, rows=4, seq_len=16)
    assert seen[:5] == [2, BEFORE, 2, BEFORE, 2], "products of calibration, then solving"
    assert set(seen[5:-1]) == {1}, "each of the threads that solve"
    assert seen[-1] == BEFORE


def test_an_engine_has_its_threads_while_it_runs(source, seen, monkeypatch):
    engine = TorchEngine(source, threads=2)
    assert seen == []
    hidden = engine.model.hidden

    def noted(*arguments):
        assert torch.get_num_threads() == 2
        return hidden(*arguments)

    monkeypatch.setattr(engine.model, "hidden", noted)
    engine.forward(torch.tensor([[1, 2, 3]]).numpy())
    assert seen == [2, BEFORE]
    monkeypatch.setattr(engine.model, "hidden", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.forward(torch.tensor([[1, 2, 3]]).numpy())
    assert seen == [2, BEFORE] * 2


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_an_engine_is_hashed_with_its_threads(engine, demo, tmp_path, monkeypatch):
    folder, numbers, reading = demo("nvfp4-w4a16"), [], intact.Reading
    monkeypatch.setattr(intact, "stamp_folder", lambda: tmp_path)

    def noted(folders, threads):
        numbers.append(threads)
        return reading(folders, threads)

    monkeypatch.setattr(intact, "Reading", noted)
    load_engine(engine, folder, threads=5)
    assert numbers == [5]


def test_generate(demo, seen):
    folder = demo("nvfp4-w4a16")
    seen.clear()
    nemoquant.generate(folder, "Once", max_tokens=2, threads=2)
    assert set(zip(seen[::2], seen[1::2], strict=True)) == {(2, BEFORE)}


def test_blocks_of_several_threads_overlap() -> None:
    """Each goes back to what the process had before the first; so does a thread that starts afterwards."""
    seen: list[int] = []
    entered, leave = threading.Barrier(3), [threading.Event() for _ in range(3)]

    def block(place: int) -> None:
        if place:
            started[place - 1].wait()
        with torch_threads(place + 1):
            started[place].set()
            entered.wait()
            with torch_threads(7):
                assert torch.get_num_threads() == 7
            assert torch.get_num_threads() == place + 1
            leave[place].wait()
        seen.append(torch.get_num_threads())

    started = [threading.Event() for _ in range(3)]
    before = torch.get_num_threads()
    threads = [threading.Thread(target=block, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for place, thread in enumerate(threads):  # the first to enter is the first to leave
        leave[place].set()
        thread.join()
    late = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert seen == [before] * 4
    assert torch.get_num_threads() == before

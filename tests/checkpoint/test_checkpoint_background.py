"""Work in the background: order, the limit of the queue, errors, and a shard that is written this way."""

import threading
import time

import numpy as np
import pytest

from nemoquant.checkpoint.background import Background
from nemoquant.checkpoint.writer import ShardWriter

TENSORS = [("a", "U8", (3, 5)), ("b", "F32", ()), ("c", "BF16", (1 << 16,)), ("d", "F32", (0,))]


def test_it_runs_in_order_and_all_of_it():
    done, stage = [], Background("test")
    for i in range(100):
        stage.put(lambda i=i: done.append(i))
    stage.end()
    stage.check()
    assert done == list(range(100))


def test_no_more_than_depth_pieces_wait():
    go, put, stage = threading.Event(), [], Background("test", depth=3)

    def fill():
        for i in range(8):
            stage.put(go.wait)
            put.append(i)

    thread = threading.Thread(target=fill)
    thread.start()
    deadline = time.monotonic() + 10
    while len(put) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(put) == 4, "one in work, three that wait"
    go.set()
    thread.join()
    stage.end()
    assert len(put) == 8


def test_after_an_error_nothing_is_run_and_the_caller_is_told():
    done, stage = [], Background("test")
    stage.put(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        for i in range(1000):  # the first items may be queued before the thread reaches the error
            stage.put(lambda i=i: done.append(i))
    stage.end()
    with pytest.raises(ZeroDivisionError):
        stage.check()
    assert done == []


def test_cancelled_work_is_not_run():
    began, go, done, stage = threading.Event(), threading.Event(), [], Background("test")
    stage.put(lambda: (began.set(), go.wait()))
    began.wait()
    stage.put(lambda: done.append(1))
    threading.Timer(0.05, go.set).start()
    stage.end(cancel=True)
    assert done == []


def write(path, background):
    g, told = np.random.default_rng(0), []
    with ShardWriter(path, TENSORS, background=background) as writer:
        for i, (_, _, shape) in enumerate(TENSORS):
            dtype = {"a": np.uint8, "b": np.float32, "c": np.uint16, "d": np.float32}["abcd"[i]]
            writer.write(g.integers(0, 200, shape).astype(dtype), lambda i=i: told.append(i))
    return path.read_bytes(), writer.sha256, told


def test_a_shard_written_in_the_background_is_the_same(tmp_path):
    assert write(tmp_path / "x", False) == write(tmp_path / "y", True)


@pytest.mark.parametrize("stage", ["_digest", "_file"])
def test_an_error_of_a_stage_is_the_writers(stage, tmp_path):
    class Broken:
        def update(self, *_):
            raise OSError(5, "broken")

        write = update

        def close(self):
            pass

    with (
        pytest.raises(OSError, match="broken"),
        ShardWriter(tmp_path / "x", TENSORS, background=True) as writer,
    ):
        writer._file.close()
        setattr(writer, stage, Broken())
        for _, _, shape in TENSORS:
            writer.write(np.zeros(shape, np.uint8))
    assert writer.sha256 == ""
    assert not [t for t in threading.enumerate() if t.name in ("hash", "write")]

"""Runs that were killed and resumed: the same bytes as an uninterrupted run, and no other file.

The kills are SIGKILL in the middle of writes, of renames and between them (tests/support/killed_runs.py).
"""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
from support.files import tree
from support.places import SUPPORT

from nemoquant.run.unfinished import FOLDER, STATE


@pytest.fixture
def killed(source, token_rows, tmp_path):
    """Runs quantize in a child that may be killed: (name, preset, ...) -> the answer of killed_runs.py."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, SUPPORT / "killed_runs.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:

        def run(name, preset, *, kill_at=None, resume=False):
            request = {
                "out": str(tmp_path / name),
                "preset": preset,
                "kill_at": kill_at,
                "resume": resume,
                "source": str(source),
                "data": str(token_rows),
                "shard_bytes": 30_000,
            }
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4-w4a16"])
def test_killed_at_random_points(preset, killed, tmp_path):
    """Each run is killed, resumed, killed once more, and resumed to its end.

    ``tests.faults`` kills once, at every point.
    """
    whole = killed("whole", preset)
    assert (whole["status"], whole["error"]) == (0, None)
    expected = tree(tmp_path / "whole")
    assert sum(name.endswith(".safetensors") for name in expected) >= 5, (
        "several shards, or resuming them is not tested"
    )
    choose = random.Random(preset)
    for point in sorted(choose.sample(range(1, whole["events"] + 1), 4)):
        name = f"killed-{point}"
        assert killed(name, preset, kill_at=point)["status"] == signal.SIGKILL, point
        again = killed(name, preset, kill_at=choose.randint(1, whole["events"]), resume=True)
        assert again["status"] in (0, signal.SIGKILL), (point, again)
        if again["status"]:
            again = killed(name, preset, resume=True)
        assert (again["status"], again.get("error")) == (0, None), point
        found = tree(tmp_path / name)
        assert found.keys() == expected.keys(), point
        assert [n for n in found if found[n] != expected[n]] == [], point
        assert not (tmp_path / f"{name}.partial").exists()


@pytest.mark.slow
def test_kills_at_the_end(killed, tmp_path):
    """Around the rename and within the removal of the state from OUT: --resume ends well each time."""
    events = killed("whole", "nvfp4")["events"]
    expected, left = tree(tmp_path / "whole"), []
    for back in (0, 1, 2, 5, 8, 11):
        name = f"late-{back}"
        assert killed(name, "nvfp4", kill_at=events - back)["status"] == signal.SIGKILL
        out = tmp_path / name
        left.append((out.exists(), (out / FOLDER).exists(), (out / FOLDER / STATE).exists()))
        assert killed(name, "nvfp4", resume=True)["error"] is None, (back, left)
        assert tree(out) == expected
    assert {(False, False, False), (True, True, True), (True, True, False)} <= set(left), left

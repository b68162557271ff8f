"""A seeded sample of the faults that end a command: kills, a full disk, a power cut, a second process.

``python -m tests.faults --long`` has them all, and docs/faults.md what came out.
"""

import errno
import os
import random

import pytest
from support.places import ROOT
from support.processes import run_python

from tests.faults import watch
from tests.faults.power import Disk, File
from tests.faults.samples import check, sample
from tests.faults.seen import can_trace
from tests.faults.watch import Event, Kind

SUITES = ("kills", "disk", "power", "pairs")
needs_compiler = pytest.mark.skipif(watch.compiler() is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Every case of the samples, by suite; one process runs them all."""
    return sample(SUITES, tmp_path_factory.mktemp("faults"))


@needs_compiler
@pytest.mark.parametrize("suite", SUITES)
def test_a_fault_is_gone_on_from(suite, cases):
    check(cases[suite])


@needs_compiler
@pytest.mark.skipif(not can_trace(), reason="needs strace, and the right to use it")
def test_the_watcher_sees_what_the_kernel_does(tmp_path):
    check(sample(["seen"], tmp_path)["seen"])


CALLS = """
import os, sys
from pathlib import Path
from tests.faults import watch
root, log = Path(sys.argv[1]), os.open(sys.argv[2], os.O_CREAT | os.O_WRONLY)
action, point = map(int, sys.argv[3:])
assert watch.loaded()
watch.arm(root, watch.Aim(watch.Action(action), point), log)
(root / "folder").mkdir()
file = os.open(root / "folder/a", os.O_CREAT | os.O_RDWR)
os.write(file, b"12")
os.pwrite(file, b"345", 1)
os.writev(file, [b"6", b"7"])
os.fsync(file)
with open("/etc/hostname", "rb") as source:
    os.sendfile(file, source.fileno(), 0, 1)
os.ftruncate(file, 3)
os.chdir(root)
os.rename("folder/a", "folder/b")
os.symlink("b", "folder/link")
os.link("folder/b", "folder/second")
folder = os.open("folder", os.O_RDONLY)
os.fsync(folder)
for name in ("b", "link", "second"):
    os.unlink(name, dir_fd=folder)
os.rmdir("folder")
print(watch.count())
"""
POINTS = 19  # of that program: three writes of two bytes or more have two each


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return watch.compiled(tmp_path_factory.mktemp("watch"))


@pytest.fixture
def calls(library, tmp_path):
    """Runs that program under the watcher: (action, point) -> its process, its events and its folder."""

    def run(action=watch.Action.RECORD, point=0, code=0):
        root = tmp_path / f"root-{action}-{point}"
        root.mkdir()
        done = run_python(
            CALLS,
            root,
            tmp_path / "log",
            int(action),
            point,
            code=code,
            LD_PRELOAD=str(library),
            PYTHONPATH=f"{ROOT}:{ROOT}/tests",
        )
        return done, list(watch.events((tmp_path / "log").read_bytes())), root

    return run


@needs_compiler
def test_the_watcher_sees_every_kind_of_event(calls):
    done, events, root = calls()
    assert [event.kind.name for event in events] == [
        "MKDIR", "CREATE", "WRITE", "WRITE", "WRITE", "FSYNC", "WRITE", "TRUNCATE", "RENAME", "SYMLINK",
        "LINK", "FSYNC", "UNLINK", "UNLINK", "UNLINK", "RMDIR",
    ]  # fmt: skip
    written = [(event.offset, event.data) for event in events if event.kind is Kind.WRITE]
    assert written[:3] == [(0, b"12"), (1, b"345"), (2, b"67")] and written[3][0] == 4
    assert events[8].path == f"{root}/folder/a" and events[8].other == f"{root}/folder/b"
    assert len({event.inode for event in events[1:9]}) == 1
    assert int(done.stdout) == sum(event.points for event in events) == POINTS
    assert not (root / "folder").exists()


@needs_compiler
def test_a_kill_in_the_middle_of_a_write(calls):
    _, events, root = calls(watch.Action.KILL, 6, code=-9)
    assert (root / "folder/a").read_bytes() == b"13", "two whole bytes, and of three the first one"
    assert [event.kind for event in events] == [Kind.MKDIR, Kind.CREATE, Kind.WRITE]


@needs_compiler
def test_a_full_disk(calls):
    done, _, root = calls(watch.Action.FAIL_FROM, 5, code=1)
    assert os.strerror(errno.ENOSPC) in done.stderr
    assert (root / "folder/a").read_bytes() == b"12"


@pytest.fixture
def disk(tmp_path):
    """A model of a disk with one file, and a function that does an event on it."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "old").write_bytes(b"old")
    model = Disk(root)

    def do(kind, name, other="", data=b"", inode=1 << 40, offset=0):
        path = str(root / name) if name else str(root)
        size = len(data)
        return model.replay(Event(kind, path, str(root / other), 0, inode, offset, size, data))

    return model, do, root.stat().st_ino


def test_what_no_fsync_has_kept_is_lost(disk):
    """Data without the file's fsync, a name without the folder's."""
    model, do, top = disk
    choose = random.Random(0)
    do(Kind.CREATE, "new")
    do(Kind.WRITE, "new", data=b"data")
    assert model.after_cut("dropped", choose) == {"old": b"old"}
    assert model.after_cut("named", choose) == {"old": b"old", "new": bytes(4)}
    do(Kind.FSYNC, "new")
    assert model.after_cut("dropped", choose) == {"old": b"old"}
    assert model.after_cut("named", choose) == {"old": b"old", "new": b"data"}
    assert do(Kind.RENAME, "new", "old") == []
    assert model.after_cut("dropped", choose) == {"old": b"old"}
    do(Kind.FSYNC, "", inode=top)
    assert model.after_cut("dropped", choose) == {"old": b"data"}
    assert model.top.unsafe() == []


def test_a_name_before_its_content_is_told(disk):
    model, do, _ = disk
    do(Kind.CREATE, "new")
    do(Kind.WRITE, "new", data=b"data")
    assert do(Kind.RENAME, "new", "old") == ["new became old before 1 writes of it were on the disk"]
    assert model.top.unsafe() == ["->new", "new->old", "old: 1 writes"]


def test_writes_that_are_partly_kept():
    file = File(b"abc", [(1, b"XY"), (5, b"Z"), (4, None)])
    kept = iter([True, False])
    assert file.content(lambda: next(kept)) == b"aXY\0"

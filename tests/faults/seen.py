"""The watcher itself: what it sees is what the kernel does, by strace where that can be run.

``watch.c`` stands before libc's functions; a raw system call, or one from inside libc, would pass it by. So
scenes are run once more under strace, and both lists are compared, path by path and kind by kind. (fsync is
left out: the watcher notes it and does not do it.)
"""

import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .cases import Case
from .watch import Kind, events
from .world import Scene, World

CALLS = {
    Kind.OPEN: ("open", "openat", "openat2", "creat"),
    Kind.WRITE: (
        "write",
        "pwrite64",
        "writev",
        "pwritev",
        "pwritev2",
        "sendfile",
        "copy_file_range",
        "splice",
        "io_uring_enter",
    ),
    Kind.TRUNCATE: ("truncate", "ftruncate", "fallocate"),
    Kind.RENAME: ("rename", "renameat", "renameat2"),
    Kind.UNLINK: ("unlink", "unlinkat"),
    Kind.RMDIR: ("rmdir",),
    Kind.MKDIR: ("mkdir", "mkdirat"),
    Kind.LINK: ("link", "linkat"),
    Kind.SYMLINK: ("symlink", "symlinkat"),
    Kind.CONNECT: (
        "mmap",
    ),  # stands for a file mapped for writing: the watcher would not see what changes there
}
KIND = {call: kind for kind, calls in CALLS.items() for call in calls}
LINE = re.compile(r"^\d+ +(\w+)\((.*)\) += (-?\d+)")
PROGRAM = """
import os, sys
from pathlib import Path
from tests.faults import watch
from nemoquant.cli import main
root, log, *arguments = sys.argv[1:]
watch.arm(Path(root), watch.Aim(), os.open(log, os.O_CREAT | os.O_WRONLY))
main(arguments)
"""


def run(world: World, choose: random.Random, long: bool) -> Iterator[Case]:  # noqa: ARG001  nothing is chosen
    """Compare one scene, or in the long run those that write in different ways."""
    if not can_trace():
        return
    names = ["quantize nvfp4", "quantize nvfp4-w4a16", "diff", "export onnx", "export onnx, a copy"]
    for name in names if long else names[1:2]:
        yield one(world, world.scenes[name])


def can_trace() -> bool:
    """Whether strace is there and may be used."""
    if not shutil.which("strace"):
        return False
    return (
        subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode
        == 0
    )


def one(world: World, scene: Scene) -> Case:
    """Run a scene under strace, and compare."""
    root, log, trace = world.prepared(scene), world.folder / "seen.log", world.folder / "seen.trace"
    wanted = ",".join(KIND)
    command = [
        "strace",
        "-f",
        "-y",
        "-s",
        "0",
        "-e",
        f"trace={wanted}",
        "-o",
        trace,
        sys.executable,
        "-c",
        PROGRAM,
    ]
    arguments = [str(argument) for argument in (root, log, *scene.arguments(root))]
    path = f"{Path.cwd()}:{Path.cwd() / 'tests'}"
    done = subprocess.run(
        [*command, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    problems = [] if done.returncode == 0 else [f"exit {done.returncode}: {done.stderr[-300:]}"]
    by_kernel = traced(trace.read_text(encoding="utf-8", errors="replace"), str(root))
    by_us: Counter[tuple[Kind, str]] = Counter()
    before = None
    for event in events(log.read_bytes()):
        opening = event.kind is Kind.TRUNCATE and before == (
            Kind.OPEN,
            event.path,
        )  # O_TRUNC: one call, two events
        before = (event.kind, event.path)
        if not event.error and event.kind is not Kind.FSYNC and not opening:
            kind = Kind.OPEN if event.kind is Kind.CREATE else event.kind
            by_us[(kind, event.path.removesuffix(" (deleted)"))] += 1
    if not by_kernel:
        problems.append("strace saw nothing")
    for name, difference in (("only strace", by_kernel - by_us), ("only the watcher", by_us - by_kernel)):
        problems += [
            f"{name} saw {n} x {kind.name} {path}" for (kind, path), n in list(difference.items())[:5]
        ]
    for path in (log, trace):
        path.unlink()
    shutil.rmtree(root)
    outcome = "not as it should be" if problems else "the same by strace"
    return Case("seen", scene.name, f"{sum(by_kernel.values()):,} events", outcome, tuple(problems))


def traced(text: str, root: str) -> "Counter[tuple[Kind, str]]":
    """Events below ``root`` in strace's output that went well."""
    counts: Counter[tuple[Kind, str]] = Counter()
    for line in joined(text):
        match = LINE.match(line)
        if not match or int(match[3]) < 0:
            continue
        kind, rest = KIND[match[1]], match[2]
        if match[1] == "mmap" and not ("PROT_WRITE" in rest and "MAP_SHARED" in rest):
            continue
        if kind is Kind.OPEN and not re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", rest):
            continue
        if match[1] == "unlinkat" and "AT_REMOVEDIR" in rest:
            kind = Kind.RMDIR
        if match[1] == "copy_file_range":  # the file that is written comes second
            rest = rest.split(", ", 2)[2]
        path = path_in(rest, by_handle=kind in (Kind.WRITE, Kind.TRUNCATE, Kind.CONNECT))
        if path == root or path.startswith(f"{root}/"):
            counts[(kind, path)] += 1
    return counts


def path_in(arguments: str, *, by_handle: bool) -> str:
    """The path that a call is about: that of a handle, or a name, which may be relative to one."""
    handle = re.search(r"(?:AT_FDCWD|\d+)<([^>]*)>", arguments)
    name = re.match(r'(?:(?:AT_FDCWD|\d+)<[^>]*>, )?"([^"]*)"', arguments)
    if by_handle or name is None:
        return handle[1] if handle else ""
    return str(Path(handle[1] if handle else "", name[1]))


def joined(text: str) -> Iterator[str]:
    """Lines of strace, where a call that another thread interrupted is one line again."""
    begun: dict[str, str] = {}
    for line in text.splitlines():
        pid = line.split(" ", 1)[0]
        if line.endswith("<unfinished ...>"):
            begun[pid] = line.removesuffix("<unfinished ...>").rstrip()
        elif " resumed>" in line:
            yield begun.pop(pid, "") + line.split(" resumed>", 1)[1]
        else:
            yield line

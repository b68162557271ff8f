"""Runs ``quantize`` repeatedly in forked children, which can be killed at any of their writes.

This is a separate program. It reads a JSON object a line: ``out``, ``preset``, ``resume``, ``kill_at`` (null:
to the end), and the paths. A child counts each file or folder that it opens, makes, renames or removes in
OUT, and each write; at number ``kill_at`` it kills itself with SIGKILL, with a write half done. The program
answers with ``{"status", "events", "error"}`` a line.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from nemoquant import api
from nemoquant.calibrate import run  # noqa: F401  loads all modules of a run once
from nemoquant.checkpoint.writer import ShardWriter
from nemoquant.run import job

WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
shutil.rmtree.avoids_symlink_attacks = (
    False  # rmtree's other way removes by names relative to a handle, which cannot be watched
)


class Events:
    """Counts events, and kills the process at the chosen one."""

    def __init__(self, out: str, kill_at: int | None) -> None:
        self.out, self.kill_at, self.count = out, kill_at, 0

    def due(self) -> bool:
        self.count += 1
        return self.count == self.kill_at

    def watch(self, event, arguments) -> None:
        if (
            event in WATCHED
            and any(isinstance(a, str | Path) and str(a).startswith(self.out) for a in arguments)
            and self.due()
        ):
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        append, pwrite = ShardWriter._append, os.pwrite

        def torn_append(writer, view, then) -> None:
            if self.due():
                writer._file.write(view[: view.size // 2].data)
                writer._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            append(writer, view, then)

        def torn_pwrite(file, data, offset) -> int:
            if self.due():
                pwrite(file, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return pwrite(file, data, offset)

        ShardWriter._append, os.pwrite = torn_append, torn_pwrite
        sys.addaudithook(self.watch)


def child(request, answer) -> None:
    events = Events(request["out"], request["kill_at"])
    error = None
    events.install()
    try:
        options = api.RunOptions(
            method="max",
            data=Path(request["data"]),
            dtype="float32",
            row_batch=2,
            threads=1,
            shard_bytes=request["shard_bytes"],
            resume=request["resume"],
        )
        api.quantize(Path(request["source"]), Path(request["out"]), request["preset"], options)
    except BaseException as e:
        error = repr(e)
    os.write(answer, json.dumps({"events": events.count, "error": error}).encode())
    os._exit(0)


assert job and torch.get_num_threads() == 1, "forks with threads are not safe: OMP_NUM_THREADS must be 1"
for line in sys.stdin:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(json.loads(line), write)
    os.close(write)
    with os.fdopen(read, "rb") as f:
        answer = json.loads(f.read() or "{}")
    print(json.dumps({"status": os.waitpid(pid, 0)[1], **answer}), flush=True)

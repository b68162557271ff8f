"""Runs a command and measures it: wall time, CPU time and peak memory.

It imports nothing large, because a child's peak begins at its parent's.
"""

import os
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """Seconds and gigabytes (1e9).

    Attributes:
        peak: ru_maxrss of the largest process of the tree; mapped pages of files count.
        peak_tree: the largest sum of resident memory over the tree, sampled.
        peak_anonymous: the same for RssAnon, memory without a file.
        disk: the most that the watched folders had on the disk; 0 where none are.
    """

    wall: float
    cpu: float
    peak: float
    peak_tree: float
    peak_anonymous: float
    disk: float = 0.0

    def json(self) -> dict[str, float]:
        return asdict(self)


def _tree(root: int) -> list[int]:
    pids, todo = [], [root]
    while todo:
        pid = todo.pop()
        pids.append(pid)
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                todo += [int(child) for child in children.read_text().split()]
            except OSError:
                continue
    return pids


def _resident(pid: int) -> tuple[int, int]:
    """VmRSS and RssAnon in bytes; zeros for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = {
        line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS:", "RssAnon:"))
    }
    return int(fields.get("VmRSS", 0)) * 1024, int(fields.get("RssAnon", 0)) * 1024


def _on_disk(folders: Iterable[Path]) -> int:
    """Bytes of all files in some folders that may come and go."""
    total = 0
    for folder in folders:
        for root, _, files in os.walk(folder):
            for name in files:
                try:
                    total += 512 * os.lstat(Path(root, name)).st_blocks
                except OSError:
                    continue
    return total


def run(command: list[str], log: Path, every: float = 0.05, disk: Sequence[Path] = ()) -> Cost:
    """Run to the end, output into ``log``; raises RuntimeError with the log's last lines if it fails.

    ``disk``: folders whose size is watched.
    """
    with log.open("w") as output:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        tree = anonymous = used = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            residents = [_resident(member) for member in _tree(process.pid)]
            tree = max(tree, sum(r for r, _ in residents))
            anonymous = max(anonymous, sum(a for _, a in residents))
            used = max(used, _on_disk(disk))
            time.sleep(every)
        wall = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{tail}")
    return Cost(
        wall,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * 1024 / 1e9,
        tree / 1e9,
        anonymous / 1e9,
        used / 1e9,
    )


def rounds(text: str) -> int:
    """``--rounds``: a median needs at least one."""
    count = int(text)
    if count < 1:
        raise ValueError
    return count


def machine() -> str:
    """CPU, cores and memory, as a line for the results."""
    info = Path("/proc/cpuinfo").read_text()
    name = next(
        (line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GB of memory, Python {platform.python_version()}"

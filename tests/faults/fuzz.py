"""A seeded fuzzer over every parser of a file from elsewhere.

A case succeeds, or ends in one of nemoquant's errors, within ``SECONDS`` and ``MEMORY``, and leaves nothing
on standard error. Anything else is a failure; its parser, seed and number make the same bytes again:

    python -m tests.faults.fuzz --cases 20000 --seed 3
    python -m tests.faults.fuzz --parser config --seed 3 --show 1234      the bytes of one case

Cases run in a process of their own, which is ended where it hangs and begun again behind the case.
"""

import argparse
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.mutations import NASTY, changed, damaged, places, replaced
from tests.faults.parsers import BAD, PARSERS, checkpoints, workspace

SECONDS = 30.0  # a case may take; on an idle machine the longest takes a third
MEMORY = 1 << 30  # bytes that a case may add
PATIENCE = 120.0  # seconds without a case until its process is ended; a new one loads modules
TEXT = 10_000  # characters of an error's message
Job = tuple[str, range]  # a parser and its cases
TABLE = PARSERS | BAD


@dataclass
class Result:
    """What became of the cases of one parser.

    Attributes:
        errors: cases by the kind of nemoquant's error.
        failures: a line for each case that ended in any other way.
        longest: seconds of the slowest case. largest: bytes of memory that a case added at most.
    """

    parser: str
    cases: int = 0
    accepted: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    longest: float = 0.0
    largest: int = 0


def case(name: str, good: bytes, seed: int, number: int) -> bytes:
    """The bytes of one case: every leaf with every nasty value in a seeded order, then changes by chance.

    Of four cases two replace a leaf, as long as there are pairs left, one changes the structure, and one the
    bytes. Where the file is no tree, all change the bytes.
    """
    parser = TABLE[name]
    rng = random.Random(f"{seed} {name} {number}")
    if parser.codec is None or number % 4 == 3:
        return damaged(good, parser.words, rng)
    tree = parser.codec.load(good)
    if number % 4 == 2:
        return parser.codec.dump(changed(tree, rng), good)
    paths = list(places(tree))
    pairs, turn = len(paths) * len(NASTY), number // 4 * 2 + number % 4
    if turn >= pairs:
        return parser.codec.dump(changed(tree, rng), good)
    # a step without a common divisor visits every pair once
    step = next(s for s in range(pairs * 618 // 1000 + seed, pairs * 2 + seed) if _coprime(s, pairs))
    leaf, nasty = divmod((seed + turn * step) % pairs, len(NASTY))
    return parser.codec.dump(replaced(tree, paths[leaf], NASTY[nasty]), good)


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def _outcome(read: Any, folder: Path) -> tuple[str, str]:
    """How a case ended: ``ok``, ``error`` with its kind, or ``failure`` with a line."""
    from nemoquant.errors import NemoquantError

    try:
        read(folder)
    except NemoquantError as error:
        text = str(error)
        if len(text) > TEXT or not text or "\n" in text:
            return "failure", f"a message of {len(text):,} characters, {text.count(chr(10)):,} line ends"
        return "error", f"{type(error).__name__}: {text}"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return (
            "failure",
            f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {error!s:.150}",
        )
    return "ok", ""


def _work(pipe: Any, base: Path, jobs: list[Job], seed: int) -> None:
    """In the process of its own: runs cases and sends what became of each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if not (base / "made").exists() and jobs[0][0] not in BAD:
        checkpoints(base)
        (base / "made").touch()
    stderr = os.dup(2)
    said = os.open(base / "said", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for name, numbers in jobs:
        folder, parser = workspace(name, base), TABLE[name]
        file, kept = folder / parser.file, base / f"good {name}"
        if not kept.exists():
            kept.write_bytes(file.read_bytes())
        good = kept.read_bytes()
        file.write_bytes(good)
        kind, what = _outcome(parser.read, folder)  # loads all modules that the parser needs
        if kind != "ok":
            pipe.send((name, -1, kind, what, 0.0, 0))
            return
        # what the parser has loaded by now, and twice what a case may take
        bound = _status("VmSize") + 2 * MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (bound, resource.RLIM_INFINITY))
        os.dup2(said, 2)
        for number in numbers:
            file.write_bytes(case(name, good, seed, number))
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
            before, began = _status("VmRSS"), time.perf_counter()
            kind, what = _outcome(parser.read, folder)
            took, added = time.perf_counter() - began, max(0, _status("VmHWM") - before)
            if os.fstat(said).st_size and kind != "failure":
                kind, what = "failure", f"on standard error: {os.pread(said, 150, 0)!r}"
            os.ftruncate(said, 0)
            os.lseek(said, 0, os.SEEK_SET)
            pipe.send((name, number, kind, what, took, added))
        os.dup2(stderr, 2)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    pipe.send(None)


def _outcomes(
    base: Path, jobs: list[Job], seed: int, patience: float
) -> Iterator[tuple[str, int, str, str, float, int]]:
    """The outcomes of all cases, those too that end their process."""
    context = multiprocessing.get_context("spawn")
    while jobs:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, base, jobs, seed), daemon=True)
        process.start()
        theirs.close()
        try:
            while True:
                if not ours.poll(patience):
                    what = f"hangs: ended after {patience:.0f} s"
                    break
                try:
                    message = ours.recv()
                except EOFError:
                    process.join()
                    what = f"ended its process: exit code {process.exitcode}"
                    break
                if message is None:
                    return
                name, number, _, text, *_ = message
                if number < 0:
                    raise RuntimeError(f"the good file of {name} is refused: {text}")
                jobs = _after(jobs, name, number)
                yield message
        finally:
            process.kill()
            process.join()
            ours.close()
        name, numbers = jobs[0]
        yield name, numbers[0], "failure", what, 0.0, 0
        jobs = _after(jobs, name, numbers[0])


def _after(jobs: list[Job], name: str, number: int) -> list[Job]:
    """The jobs that are left behind a case."""
    while jobs[0][0] != name:
        jobs = jobs[1:]
    rest = range(number + 1, jobs[0][1].stop)
    return [(name, rest), *jobs[1:]] if rest else jobs[1:]


def run(
    cases: int,
    seed: int,
    parsers: Sequence[str] | None = None,
    folder: Path | None = None,
    patience: float = PATIENCE,
    say: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Run cases over all parsers, or some.

    Args:
        cases: in all; each parser gets its share of them, at least one.
        folder: for the files; what is there from an earlier run is used again.
        say: called with a line for each parser that is done.
    """
    names = list(parsers or PARSERS)
    total = sum(TABLE[name].share for name in names)
    jobs = [(name, range(max(1, round(cases * TABLE[name].share / total)))) for name in names]
    results, counts = {name: Result(name) for name in names}, dict(jobs)
    with tempfile.TemporaryDirectory() as temporary:
        base = folder or Path(temporary)
        for name, number, kind, what, seconds, memory in _outcomes(base, jobs, seed, patience):
            if kind != "failure" and seconds > SECONDS:
                kind, what = "failure", f"takes {seconds:.1f} s"
            if kind != "failure" and memory > MEMORY:
                kind, what = "failure", f"takes {memory / 1e6:,.0f} MB"
            result = results[name]
            result.cases += 1
            result.accepted += kind == "ok"
            result.longest, result.largest = max(result.longest, seconds), max(result.largest, memory)
            if kind == "error":
                result.errors[what.partition(":")[0]] += 1
            elif kind == "failure":
                result.failures.append(f"{name}, seed {seed}, case {number}: {what}")
            if result.cases == len(counts[name]):
                took = f"longest {result.longest:.2f} s, largest {result.largest / 1e6:,.0f} MB"
                say(f"{name}: {result.cases:,} cases, {len(result.failures)} failures, {took}")
    return list(results.values())


def table(results: Sequence[Result]) -> str:
    """The results as text, and the failures below."""
    head = ("parser", "cases", "accepted", "refused", "failures", "longest", "largest")
    rows = [
        (
            r.parser,
            f"{r.cases:,}",
            f"{r.accepted:,}",
            f"{r.errors.total():,}",
            f"{len(r.failures):,}",
            f"{r.longest:.2f} s",
            f"{r.largest / 1e6:,.0f} MB",
        )
        for r in results
    ]
    if len(results) > 1:
        counts = [(r.cases, r.accepted, r.errors.total(), len(r.failures)) for r in results]
        sums = map(sum, zip(*counts, strict=True))
        longest, largest = max(r.longest for r in results), max(r.largest for r in results)
        rows.append(("all", *(f"{n:,}" for n in sums), f"{longest:.2f} s", f"{largest / 1e6:,.0f} MB"))
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    columns = [
        [row[i].ljust(width) if i == 0 else row[i].rjust(width) for row in (head, *rows)]
        for i, width in enumerate(widths)
    ]
    lines = ["  ".join(line) for line in zip(*columns, strict=True)]
    return "\n".join([*lines, *(line for r in results for line in r.failures)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parser", action="append", choices=list(PARSERS), help="of all, these alone")
    parser.add_argument("--folder", type=Path, help="for the files, to be used again")
    parser.add_argument("--show", type=int, metavar="CASE", help="write the bytes of one case of --parser")
    given = parser.parse_args()
    if given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
    if given.show is not None:
        good = (given.folder / f"good {given.parser[0]}").read_bytes()  # of a run in this folder
        sys.stdout.buffer.write(case(given.parser[0], good, given.seed, given.show))
        return 0
    results = run(
        given.cases,
        given.seed,
        given.parser,
        given.folder,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(table(results))
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())

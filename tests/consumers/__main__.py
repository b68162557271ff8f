"""``python -m tests.consumers``: see ``tests/consumers/__init__.py``."""

import argparse
import ast
import json
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nemoquant.errors import NemoquantError

from . import results
from .environment import Environment
from .rows import ENGINES, Bare, Checkpoint, Converted, Row, bare, checkpoints, converted, hashed, served

AT_ONCE = 2  # children
LONGEST = 900  # seconds of one
HERE = Path(__file__).parent
SHARED = ("child", "stored", "stubs")  # modules that the children of both engines run


def options() -> argparse.Namespace:
    """The command line."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(prog="python -m tests.consumers", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="rows with one of these in their name, or `commands`"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=cache / "nemoquant-consumers",
        metavar="DIR",
        help="environment and checkpoints, kept for the next run (default: %(default)s)",
    )
    for engine in ENGINES:
        parser.add_argument(f"--{engine}", metavar="VERSION", help="default: the newest when DIR was made")
    parser.add_argument("--only", choices=ENGINES, help="one engine")
    parser.add_argument("--again", action="store_true", help="rows whose result is there too")
    return parser.parse_args()


class Run:
    """One run: children of the engines, and the results as they come."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen, self.data, self.lock = chosen, results.read(), threading.Lock()
        self.work = chosen.work.expanduser().resolve()
        (self.work / "jobs").mkdir(parents=True, exist_ok=True)
        asked = {engine: getattr(chosen, engine) for engine in ENGINES}
        self.environment = Environment(self.work / "environment", asked)
        self.environment.make()
        self.engines = [chosen.only] if chosen.only else list(ENGINES)

    def job(self, name: str, engine: str, task: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """One job in a child; ``failed`` where it ends badly."""
        stem = self.work / "jobs" / f"{name.replace(', ', '-')}.{engine}"
        question, answer, log = (stem.with_name(f"{stem.name}.{end}") for end in ("job", "json", "log"))
        question.write_text(json.dumps({"engine": engine, "task": task, "arguments": arguments}))
        answer.unlink(missing_ok=True)
        with log.open("wb") as output:
            try:
                done = subprocess.run(
                    [self.environment.python, "-m", "consumers.child", question, answer],
                    env=self.environment.variables(engine),
                    stdout=output,
                    stderr=output,
                    timeout=LONGEST,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return {"failed": f"not ended after {LONGEST} s"}
        if done.returncode or not answer.exists():
            said = log.read_text(errors="replace").strip().splitlines()
            return {"failed": f"exit {done.returncode}: {said[-1][:300] if said else ''}"}
        row: dict[str, Any] = json.loads(answer.read_text())
        with self.lock:
            self.data["engines"][engine] = {"version": row.pop("engine"), **row.pop("versions")}
        return row

    def one(self, row: Row, engine: str) -> None:
        """Make one row of an engine, unless it is there and of the same inputs."""
        # Comments may change without running everything again.
        files = [HERE / f"{name}.py" for name in (*SHARED, f"on_{engine}")]
        code = [ast.unparse(ast.parse(file.read_text(encoding="utf-8"))) for file in files]
        inputs = f"{self.environment.versions[engine]} {hashed(*map(str.encode, code))} {row.inputs}"
        with self.lock:
            before = self.data[row.kind].get(row.name, {}).get(engine, {})
        if before.get("inputs") == inputs and "failed" not in before and not self.chosen.again:
            return
        began = time.monotonic()
        made = self.job(row.name, engine, row.task, row.arguments) | {"inputs": inputs}
        took = f"{time.monotonic() - began:.0f} s"
        found = results.problems(engine, made)
        with self.lock:
            self.data[row.kind].setdefault(row.name, {})[engine] = made
            results.write(self.data)
            said = "; ".join(found) or "no problem"
            print(f"{row.name}, {engine}, {took}: {said}", file=sys.stderr, flush=True)

    def rows(self, source: Checkpoint | Converted | Bare) -> list[Row]:
        """The rows of a checkpoint or a config; none where it can't be made, which the results then say."""
        try:
            return list(source.rows(self.work))
        except NemoquantError as error:
            print(f"{source.name}: {error}", file=sys.stderr, flush=True)
            self.data["checkpoints"][source.name] = {e: {"failed": str(error)} for e in self.engines}
            return []

    def commands(self) -> None:
        """All serving commands of an engine, in one child."""
        for engine in self.engines:
            answer = self.job("commands", engine, "commands", {"lines": served(self.work, engine)})
            found = answer.get("commands", [{"sm": 0, "words": [], "refused": answer.get("failed")}])
            for command in found:  # of any machine
                command["words"] = [word.replace(f"{self.work}/configs/", "") for word in command["words"]]
            self.data["commands"][engine] = found

    def all(self) -> int:
        """Everything that was chosen; 1 where something in the results is a problem."""
        words = self.chosen.names
        sources: list[Checkpoint | Converted | Bare] = [*checkpoints(), *converted(), *bare()]
        sources = [s for s in sources if not words or any(word in s.name for word in words)]
        rows = [row for source in sources for row in self.rows(source)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            jobs = [
                pool.submit(self.one, row, engine)
                for row in rows
                for engine in self.engines
                if engine in row.engines
            ]
            for job in jobs:
                job.result()
        if not words or "commands" in words:
            self.commands()
        self.data["date"] = datetime.now(UTC).date().isoformat()
        self.data["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
        self.data["python"] = platform.python_version()
        results.write(self.data)
        print(results.table(self.data))
        return int(results.any_problem(self.data))


if __name__ == "__main__":
    sys.exit(Run(options()).all())

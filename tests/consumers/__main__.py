"""``python -m tests.consumers``: see ``tests/consumers/__init__.py``."""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nemoquant.errors import NemoquantError

from . import results
from .environment import Environment
from .rows import Bare, Checkpoint, bare, checkpoints, served

ENGINES = ("vllm", "sglang")
AT_ONCE = 2  # children
LONGEST = 900  # seconds of one
HERE = Path(__file__).parent


def options() -> argparse.Namespace:
    """The command line."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(prog="python -m tests.consumers", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows that have one of these in their name")
    parser.add_argument(
        "--work",
        type=Path,
        default=cache / "nemoquant-consumers",
        metavar="DIR",
        help="environment and checkpoints (default: %(default)s)",
    )
    for engine in ENGINES:
        parser.add_argument(f"--{engine}", metavar="VERSION", help="default: the newest")
    parser.add_argument("--only", choices=ENGINES, help="one engine")
    parser.add_argument("--again", action="store_true", help="rows whose result is there too")
    return parser.parse_args()


class Run:
    """One run: children of the engines, and the results as they come."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen, self.data = chosen, results.read()
        self.work = chosen.work.expanduser().resolve()
        self.environment = Environment(
            self.work / "environment", {engine: getattr(chosen, engine) for engine in ENGINES}
        )
        self.environment.make()
        shared = [(HERE / f"{name}.py").read_bytes() for name in ("child", "stored", "stubs")]
        self.sources = {
            engine: hashlib.sha256(b"".join([*shared, (HERE / f"on_{engine}.py").read_bytes()])).hexdigest()[
                :16
            ]
            for engine in ENGINES
        }

    def job(self, engine: str, task: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """One job in a child; ``failed`` where it ends badly."""
        folder = self.work / "jobs"
        folder.mkdir(exist_ok=True)
        stem = hashlib.sha256(json.dumps([engine, task, arguments]).encode()).hexdigest()[:16]
        question, answer, log = (folder / f"{stem}.{end}" for end in ("job.json", "json", "log"))
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
        self.data["engines"][engine] = {"version": row.pop("engine"), **row.pop("versions")}
        return row

    def wanted(self, name: str) -> bool:
        return not self.chosen.names or any(word in name for word in self.chosen.names)

    def engines(self) -> list[str]:
        return [self.chosen.only] if self.chosen.only else list(ENGINES)

    def row(self, kind: str, name: str, engine: str, inputs: str, make: Callable[[], dict[str, Any]]) -> None:
        """Make one row, unless it is there and of the same inputs."""
        inputs = f"{self.environment.versions[engine]} {self.sources[engine]} {inputs}"
        rows = self.data[kind].setdefault(name, {})
        before = rows.get(engine, {})
        if before.get("inputs") == inputs and "failed" not in before and not self.chosen.again:
            return
        began = time.monotonic()
        rows[engine] = make() | {"inputs": inputs}
        found = results.problems(engine, rows[engine])
        took = f"{time.monotonic() - began:.0f} s"
        print(f"{name}, {engine}, {took}: {'; '.join(found) or 'no problem'}", file=sys.stderr, flush=True)
        results.write(self.data)

    def quantized(self, row: Checkpoint) -> Path | None:
        """The folder of a checkpoint; None where it could not be made, which is its result."""
        try:
            return row.made(self.work)
        except NemoquantError as error:
            self.data["checkpoints"][row.name] = {e: {"failed": str(error)} for e in self.engines()}
            print(f"{row.name}: {error}", file=sys.stderr, flush=True)
            return None

    def checkpoint(self, pool: ThreadPoolExecutor, row: Checkpoint, folder: Path) -> None:
        """One child for each engine, and one more for the draft."""
        drafts = (False, True) if row.has_draft else (False,)
        for engine in self.engines():
            for draft in drafts:
                arguments = {"folder": str(folder), "draft": draft}
                name = f"{row.name}, draft" if draft else row.name
                pool.submit(
                    self.row,
                    "checkpoints",
                    name,
                    engine,
                    row.key,
                    lambda e=engine, a=arguments: self.job(e, "load", a),
                )

    def config(self, pool: ThreadPoolExecutor, row: Bare) -> None:
        """One child for each engine."""
        folder, plan = row.made(self.work), row.algorithms()
        inputs = hashlib.sha256(
            json.dumps([plan, (folder / "config.json").read_text()]).encode()
        ).hexdigest()[:16]
        arguments = {"folder": str(folder), "plan": plan}
        for engine in self.engines():
            pool.submit(
                self.row,
                "configs",
                row.name,
                engine,
                inputs,
                lambda e=engine: self.job(e, "names", arguments),
            )

    def commands(self, rows: list[Bare]) -> None:
        """All serving commands of an engine, in one child."""
        for engine in self.engines():
            lines = served(rows, self.work, engine)
            answer = self.job(engine, "commands", {"lines": lines})
            if "failed" in answer:
                self.data["commands"][engine] = [{"sm": 0, "words": [], "refused": answer["failed"]}]
            else:
                self.data["commands"][engine] = answer["commands"]

    def all(self) -> int:
        """Everything that was chosen; 1 where something is a problem."""
        made = {row: self.quantized(row) for row in checkpoints() if self.wanted(row.name)}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for row, folder in made.items():
                if folder:
                    self.checkpoint(pool, row, folder)
            for config in bare():
                if self.wanted(config.name):
                    self.config(pool, config)
        if self.wanted("commands"):
            self.commands(bare())
        self.data["date"] = datetime.now(UTC).date().isoformat()
        self.data["machine"] = (
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        )
        results.write(self.data)
        print(results.table(self.data))
        return int(results.any_problem(self.data))


if __name__ == "__main__":
    sys.exit(Run(options()).all())

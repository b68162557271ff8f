"""One bit flipped in a file that a verb reads: refused, or told, and never computed with.

- in a file of a finished OUT: ``verify`` fails and names the file, ``diff``, ``export onnx`` and ``generate``
  refuse it in one line and write nothing; of an edited model card they say so at most, and leave it alone;
- in a graph: ``verify`` and whoever loads it;
- in a reference cache: ``diff`` refuses it;
- in what a killed run left: ``--resume`` refuses it, or ends with the bytes of an undisturbed run.
"""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from support.files import tree

from .cases import Case
from .child import Ended, nemoquant
from .watch import Action, Aim, events
from .world import World, differences

SHORT = {"checkpoint": 7, "graph": 1, "reference cache": 3, "killed run": 5}
LONG = {"checkpoint": 200, "graph": 20, "reference cache": 60, "killed run": 120}
CARD, MANIFEST, CACHE = "README.md", "nemoquant.json", "reference.safetensors"


def run(world: World, choose: random.Random, long: bool) -> Iterator[Case]:
    """Flip bits one at a time; see the top of this file."""
    number = LONG if long else SHORT
    root = world.root()
    world.finished("quantize nvfp4", root)
    files = sorted(path for path in (root / "out").iterdir())
    order = [
        file
        for _ in range(-(-number["checkpoint"] // len(files)))
        for file in choose.sample(files, len(files))
    ]
    for file in order[: number["checkpoint"]]:
        yield in_checkpoint(world, root, Flip(file, choose))
    shutil.rmtree(root)
    root = world.root()
    world.finished("export onnx", root)
    for _ in range(number["graph"]):
        yield in_graph(root, Flip(root / "out" / choose.choice(["model.onnx", "mtp.onnx"]), choose))
    shutil.rmtree(root)
    root = world.root()
    world.finished("diff", root)
    for _ in range(number["reference cache"]):
        yield in_cache(world, root, Flip(root / CACHE, choose))
    shutil.rmtree(root)
    for _ in range(number["killed run"]):
        yield in_killed_run(world, choose)


class Flip:
    """One bit of a file; flipped by ``do``, or in the block of a with statement."""

    def __init__(self, file: Path, choose: random.Random) -> None:
        self.file, self.good = file, file.read_bytes()
        self.at, self.bit = choose.randrange(len(self.good)), choose.randrange(8)

    def do(self) -> None:
        """Flip it."""
        data = bytearray(self.good)
        data[self.at] ^= 1 << self.bit
        self.file.write_bytes(data)

    def __enter__(self) -> None:
        self.do()

    def __exit__(self, *error: object) -> None:
        self.file.write_bytes(self.good)

    def __str__(self) -> str:
        return f"bit {self.bit} of byte {self.at} of {self.file.name}"


def case(scene: str, fault: object, outcome: str, problems: list[str]) -> Case:
    """A case of this suite."""
    return Case("flips", scene, str(fault), "not as it should be" if problems else outcome, tuple(problems))


def in_checkpoint(world: World, root: Path, flip: Flip) -> Case:
    """A file of OUT, and every verb that reads it."""
    out, name = root / "out", flip.file.name
    verbs: list[list[object]] = [
        ["diff", world.source, out, "--data", world.rows, "--threads", 1],
        ["generate", out, "--prompt", "the", "--max-tokens", 2, "--threads", 1],
        ["export", "onnx", out, root / "copy"],
    ]
    with flip:
        before = tree(root)
        verified, shown = nemoquant("verify", out), nemoquant("inspect", out)
        large = name == CARD or name.endswith(".safetensors")  # which inspect does not read
        problems = (
            [f"inspect, exit {shown.code}: {shown.err[-300:]}"]
            if shown.code not in ((0, 2) if large else (2,)) or "Traceback" in shown.err
            else []
        )
        if name == CARD:
            problems += verified.success() + ["verify does not name the card"] * (CARD not in _said(verified))
            for arguments in verbs:
                problems += nemoquant(*arguments).success()
            shutil.rmtree(root / "copy", ignore_errors=True)
        else:
            if verified.code not in (1, 2) or name not in _said(verified) or "Traceback" in verified.err:
                problems.append(f"verify, exit {verified.code}: {verified.err[-300:]}")
            for arguments in verbs:
                problems += [f"{arguments[0]}: {problem}" for problem in nemoquant(*arguments).refusal()]
        problems += [f"written: {d}" for d in differences(tree(root), before)]
    if name == CARD:
        return case("card", flip, "told, and left alone", problems)
    scene = "shards" if name.endswith(".safetensors") else "other files of OUT"
    return case(scene, flip, "refused by all", problems)


def in_graph(root: Path, flip: Flip) -> Case:
    """A graph: verify, and what loads it."""
    out, problems = root / "out", []
    with flip:
        verified = nemoquant("verify", out)
        if verified.code != 1 or flip.file.name not in _said(verified):
            problems.append(f"verify: {verified.err[-300:]}")
        if flip.file.name == "model.onnx":
            ran = nemoquant("generate", out, "--prompt", "the", "--max-tokens", 2, "--engine", "onnxruntime")
            problems += ran.refusal()
    return case("graphs", flip, "refused", problems)


def in_cache(world: World, root: Path, flip: Flip) -> Case:
    """A reference cache."""
    with flip:
        before = tree(root / "out")
        problems = nemoquant(*world.scenes["diff"].arguments(root)).refusal()
        problems += [f"written: {d}" for d in differences(tree(root / "out"), before)]
    return case("reference cache", flip, "refused", problems)


def in_killed_run(world: World, choose: random.Random) -> Case:
    """Any file of an OUT.partial."""
    scene = world.scenes[choose.choice(["quantize nvfp4", "quantize nvfp4", "quantize nvfp4-w4a16"])]
    expected, log = world.whole(scene)
    root = world.root()
    point = choose.randrange(20, sum(event.points for event in events(log)) - 30)
    scene.run(root, aim=Aim(Action.KILL, point))
    flip = Flip(
        choose.choice([p for p in sorted(root.rglob("*")) if p.is_file() and p.stat().st_size]), choose
    )
    flip.do()
    ended = scene.run(root, again=True)
    problems = ended.refusal() if ended.code else differences(tree(root), expected)
    shutil.rmtree(root)
    outcome = "refused" if ended.code else "byte-equal"
    return case("killed run", f"killed at point {point}, {flip}", outcome, problems)


def _said(ended: Ended) -> str:
    return ended.out + ended.err

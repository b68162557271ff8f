"""A source that changes: during the run, and between a kill and ``--resume``. Two models never become one.

- one bit of a shard flips, or a shard is cut, while the run is stopped at a file event: it ends in one line
  (no SIGBUS, no traceback), or well with the bytes of an undisturbed run, where all was read by then;
- with the good source again, ``--resume`` ends with the bytes of an undisturbed run;
- a killed run whose source changed meanwhile is refused, or ends with the bytes of a run over the new source;
- a NaN in one weight is refused; then the repaired source gives the bytes of an undisturbed run.

tests/run/test_run_source.py has more: scales and reference caches of another source, two sets of weights.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from support.files import tree

from .cases import Case
from .child import Ended, nemoquant
from .watch import Action, Aim, events
from .world import Scene, Tree, World, differences

SHARD = "model-0000{}-of-00002.safetensors"


def run(world: World, choose: random.Random, long: bool) -> Iterator[Case]:
    """Change the source at points by chance; see the top of this file."""
    scenes = [world.scenes["quantize nvfp4"], world.scenes["quantize nvfp4-w4a16"]]
    for _ in range(60 if long else 2):
        yield during(world, choose.choice(scenes), choose, flipped)
        yield during(world, choose.choice(scenes), choose, cut)
        yield before_resume(world, choose.choice(scenes), choose)
    for _ in range(15 if long else 1):
        yield not_a_number(world, choose.choice(scenes), choose)


class Own:
    """A scene over a copy of the source, which may be changed and repaired."""

    def __init__(self, world: World, scene: Scene) -> None:
        self.world, self.scene, self.root = world, scene, world.root()
        self.source, self.work = self.root / "source", self.root / "work"
        shutil.copytree(world.source, self.source)
        self.work.mkdir()

    def run(self, *more: str, **how: Any) -> Ended:
        """Run it in ``work``."""
        arguments = [
            self.source if a == self.world.source else a for a in [*self.scene.arguments(self.work), *more]
        ]
        return nemoquant(*arguments, root=self.work, **how)

    def repair(self) -> None:
        """The source is the good one again."""
        shutil.rmtree(self.source)
        shutil.copytree(self.world.source, self.source)

    def differs(self, expected: Tree) -> list[str]:
        """What differs from an undisturbed run."""
        return differences(tree(self.work), expected)

    def case(self, fault: str, outcome: str, problems: list[str]) -> Case:
        """The outcome; the folder goes."""
        shutil.rmtree(self.root)
        outcome = "not as it should be" if problems else outcome
        return Case("sources", self.scene.name, fault, outcome, tuple(problems))


def flipped(source: Path, choose: random.Random) -> str:
    """Flip a bit of a tensor in a shard."""
    file = source / SHARD.format(choose.choice((1, 2)))
    data = bytearray(file.read_bytes())
    at = choose.randrange(int.from_bytes(data[:8], "little") + 8, len(data))
    data[at] ^= 1  # of a bf16 number's mantissa, or of an fp32 number's
    with file.open("r+b") as f:
        f.write(data)
    return f"a bit of byte {at} of {file.name}"


def cut(source: Path, choose: random.Random) -> str:
    """Cut a shard in its tensors."""
    file = source / SHARD.format(choose.choice((1, 2)))
    size = choose.randrange(file.stat().st_size)
    with file.open("r+b") as f:
        f.truncate(size)
    return f"{file.name} cut to {size} bytes"


def during(
    world: World, scene: Scene, choose: random.Random, change: Callable[[Path, random.Random], str]
) -> Case:
    """Change the source while a run is stopped at a point."""
    own, (expected, log) = Own(world, scene), world.whole(scene)
    point = choose.randint(1, sum(event.points for event in events(log)))
    said: list[str] = []
    ended = own.run(aim=Aim(Action.STOP, point), meanwhile=lambda: said.append(change(own.source, choose)))
    problems = own.differs(expected) if ended.code == 0 else ended.refusal()
    if ended.code:
        own.repair()
        problems += own.run("--resume").success() + own.differs(expected)
    outcome = "refused, then byte-equal" if ended.code else "all was read by then"
    return own.case(f"{''.join(said)} at point {point}", outcome, problems)


def before_resume(world: World, scene: Scene, choose: random.Random) -> Case:
    """Change the source between a kill and ``--resume``."""
    own, (expected, log) = Own(world, scene), world.whole(scene)
    point = choose.randint(20, sum(event.points for event in events(log)) - 20)
    own.run(aim=Aim(Action.KILL, point))
    fault = f"{flipped(own.source, choose)}, killed at point {point}"
    ended = own.run("--resume")
    if ended.code:
        problems, outcome = ended.refusal(), "refused, then byte-equal"
        own.repair()
        problems += own.run("--resume").success() + own.differs(expected)
    else:
        found = tree(own.work)
        shutil.rmtree(own.work / "out")
        problems, outcome = own.run().success() + own.differs(found), "that part was not read yet"
    return own.case(fault, outcome, problems)


def not_a_number(world: World, scene: Scene, choose: random.Random) -> Case:
    """A NaN in one weight, and the source repaired."""
    own, expected = Own(world, scene), world.whole(scene)[0]
    file = own.source / SHARD.format(choose.choice((1, 2)))
    tensors = load_file(file)
    name = choose.choice(sorted(tensors))
    tensors[name].view(-1)[choose.randrange(tensors[name].numel())] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    ended = own.run()
    problems = ended.refusal()
    own.repair()
    problems += own.run("--resume").success() + own.differs(expected)
    return own.case(f"NaN in {name}", "refused, then byte-equal", problems)

"""Two processes at once on the same thing: one waits or is refused in one line, and nothing is lost.

- two ``quantize`` into one OUT: one ends well, the other is refused, or both where one came after the other;
- many entries into one ``nemoquant.json`` from two processes: each of them is in it;
- ``diff`` of one OUT from two processes, with one reference cache: the card and the manifest agree;
- ``export onnx`` of one OUT from two processes: the manifest lists what is there;
- ``quantize --resume`` of one OUT.partial from two processes.
"""

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from support.files import tree

from .cases import Case
from .child import Ended, main_of, nemoquant, start
from .watch import Action, Aim, events
from .world import World, differences

ENTRIES = 300  # of each process, at full length
REFUSED, WELL = 2, 0


def run(world: World, choose: random.Random, long: bool) -> Iterator[Case]:
    """All pairs, several times in the long run; the second process starts a moment later, or at once."""
    for _ in range(40 if long else 1):
        delay = choose.uniform(0, 0.3)
        yield quantize(world, delay)
        yield resume(world, delay, choose)
        yield diff(world, delay)
        yield export(world, delay)
    for _ in range(3 if long else 1):
        yield entries(world, ENTRIES if long else ENTRIES // 10)


def both(
    root: Path, first: Callable[[], object], second: Callable[[], object], delay: float = 0.0
) -> list[Ended]:
    """Run two functions in two children at the same time."""
    started = []
    for function in (first, second):
        out, err = os.memfd_create("out"), os.memfd_create("err")
        started.append((start(function, root, out, err), out, err))
        time.sleep(delay)
    ended = []
    for pid, out, err in started:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for stream in (out, err):
            with os.fdopen(stream, "rb") as f:
                f.seek(0)
                texts.append(f.read().decode(errors="replace"))
        ended.append(Ended(code, texts[0], texts[1]))
    return ended


def _judged(world: World, scene: str, what: str, root: Path, ended: Sequence[Ended], expected: str) -> Case:
    """One must be well, the other well or refused; what they leave is what scene ``expected`` leaves."""
    problems = [p for one in ended for p in (one.success() if one.code == WELL else one.refusal())]
    if WELL not in [one.code for one in ended]:
        problems.append("none of the two ended well")
    problems += differences(tree(root), world.whole(world.scenes[expected])[0])
    if (root / "out").exists():
        problems += nemoquant("verify", root / "out").success()
    shutil.rmtree(root)
    outcome = "both well" if all(one.code == WELL for one in ended) else "one well, one refused"
    return Case("pairs", scene, what, "not as it should be" if problems else outcome, tuple(problems))


def quantize(world: World, delay: float) -> Case:
    """Two runs into one OUT."""
    root, scene = world.root(), world.scenes["quantize nvfp4"]
    run = main_of(scene.arguments(root))
    return _judged(
        world, "two quantize", f"{delay:.3f} s apart", root, both(root, run, run, delay), scene.name
    )


def resume(world: World, delay: float, choose: random.Random) -> Case:
    """Two runs that go on with one OUT.partial."""
    root, scene = world.root(), world.scenes["quantize nvfp4"]
    points = sum(event.points for event in events(world.whole(scene)[1]))
    point = choose.randint(points // 4, points - 40)
    scene.run(root, aim=Aim(Action.KILL, point))
    run = main_of([*scene.arguments(root), *scene.again])
    what = f"killed at point {point}, {delay:.3f} s apart"
    return _judged(world, "two quantize --resume", what, root, both(root, run, run, delay), scene.name)


def diff(world: World, delay: float) -> Case:
    """Two comparisons of one OUT with one reference cache, and reports of their own in one place."""
    scene = world.scenes["diff"]
    root = world.prepared(scene)
    run = main_of(scene.arguments(root))
    return _judged(world, "two diff", f"{delay:.3f} s apart", root, both(root, run, run, delay), scene.name)


def export(world: World, delay: float) -> Case:
    """Two exports beside the same shards."""
    scene = world.scenes["export onnx"]
    root = world.prepared(scene)
    run = main_of(scene.arguments(root))
    return _judged(
        world, "two export onnx", f"{delay:.3f} s apart", root, both(root, run, run, delay), scene.name
    )


def entries(world: World, count: int) -> Case:
    """Each process enters files of its own into one manifest."""
    root = world.root()
    world.finished("quantize nvfp4", root)

    def enter(name: str) -> Callable[[], None]:
        def all_of_them() -> None:
            from nemoquant.checkpoint import manifest

            for i in range(count):
                manifest.put_file(root / "out", f"{name}{i}.onnx", b"", lambda data: None)

        return all_of_them

    ended = both(root, enter("a"), enter("b"))
    problems = [p for one in ended for p in one.success()]
    from nemoquant.checkpoint import manifest

    listed = manifest.read_manifest(root / "out")["files"]
    lost = [f"{n}{i}" for n in ("a", "b") for i in range(count) if f"{n}{i}.onnx" not in listed]
    problems += [f"{len(lost)} of {2 * count} entries were lost"] if lost else []
    shutil.rmtree(root)
    outcome = "not as it should be" if problems else "nothing lost"
    return Case("pairs", "two writers of nemoquant.json", f"{count} entries each", outcome, tuple(problems))

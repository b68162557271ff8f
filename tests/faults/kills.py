"""Kills at file events: a command that is killed there and given again ends as if nothing had been.

At every point (``watch.Aim``) the child kills itself with SIGKILL; then, in the same folder:

- ``quantize`` without ``--resume`` is refused in one line and changes nothing, or begins anew where no shard
  was left;
- an OUT that has its name is whole: ``verify`` says so;
- the command to go on ends with exit 0 and leaves the bytes of an undisturbed run, and no other file.
"""

import random
import shutil
from collections.abc import Iterator

from support.files import tree

from .cases import Case
from .watch import Action, Aim, Event, events
from .world import Scene, World, differences, plant, verified

SAMPLES = {  # cases of the short run
    "quantize nvfp4": 7,
    "quantize fp8": 1,
    "quantize nvfp4-w4a16": 2,
    "diff": 3,
    "export onnx": 2,
    "export onnx, a copy": 2,
    "demo": 1,
}


def run(world: World, choose: random.Random, long: bool) -> Iterator[Case]:
    """Kill every scene; see the top of this file."""
    chosen = []
    for name, sample in SAMPLES.items():
        scene = world.scenes[name]
        seen = [event for event in events(world.whole(scene)[1]) for _ in range(event.points)]
        points = range(1, len(seen) + 1)
        these = points[:: scene.every] if long else choose.sample(points, sample)
        chosen += [(scene, point, seen[point - 1]) for point in these]
    choose.shuffle(chosen)  # a run that is interrupted has tried some of everything
    for scene, point, event in chosen:
        yield one(world, scene, point, event)


def one(world: World, scene: Scene, point: int, event: Event) -> Case:
    """Kill ``scene`` at a point, where an undisturbed run has ``event``, and go on."""
    root, expected = world.prepared(scene), world.whole(scene)[0]
    fault = f"killed at point {point}, {event.kind.name.lower()} {event.path.rsplit('/', 1)[-1]}"
    killed = scene.run(root, aim=Aim(Action.KILL, point))
    if killed.code not in (0, -9):  # 0: threads took turns otherwise, and the point was never reached
        return Case("kills", scene.name, fault, "failed", tuple(killed.success()))
    problems = []
    left = tree(root)
    if scene.refuses and killed.code:
        without = scene.run(root)
        if without.code:
            problems += without.refusal()
            problems += [f"a refused command changed files: {d}" for d in differences(tree(root), left)]
        else:
            problems += [f"not refused: {name} was left" for name in left if name.endswith(".safetensors")]
            problems += [f"begun anew: {d}" for d in differences(tree(root), expected)]
            shutil.rmtree(root)
            root.mkdir()
            plant(left, root)
    problems += verified(root)
    if killed.code:
        problems += scene.go_on(root)
    problems += differences(tree(root), expected)
    shutil.rmtree(root)
    outcome = "byte-equal" if killed.code else "ended before it"
    return Case("kills", scene.name, fault, "not as it should be" if problems else outcome, tuple(problems))

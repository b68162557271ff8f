"""A disk that is full, at every amount: a command that meets it says so in one line, and can be gone on with.

From a point on, every call fails with ENOSPC that takes room: creating, writing (also in the middle of a
write), making folders, renaming; fsync fails with EIO, as after delayed allocation. Removing works. In some
cases only one call fails. Then there is room again:

- the command ended with exit 2 and one line of error, or well, where one call may fail (then the report says
  that the model card could not be given its figures);
- an OUT that has its name is whole: ``verify`` says so;
- the command to go on ends with exit 0 and leaves the bytes of an undisturbed run, and no other file.

The long run does the same on a small real file system of each size, where one can be mounted.
"""

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from support.files import tree

from .cases import Case
from .child import Ended, nemoquant
from .watch import Action, Aim, Event, Kind, events
from .world import Scene, World, differences, verified, without_was

SAMPLES = {  # cases of the short run
    "quantize nvfp4": 6,
    "quantize fp8": 1,
    "quantize nvfp4-w4a16": 1,
    "diff": 3,
    "export onnx": 2,
    "export onnx, a copy": 1,
    "demo": 1,
}
HARMLESS = (Kind.UNLINK, Kind.RMDIR, Kind.OPEN)  # they take no room
MOUNTED = 60  # sizes of a real file system


def run(world: World, choose: random.Random, long: bool) -> Iterator[Case]:
    """Fill the disk under every scene; see the top of this file."""
    chosen = []
    for name, sample in SAMPLES.items():
        scene = world.scenes[name]
        seen = [event for event in events(world.whole(scene)[1]) for _ in range(event.points)]
        points = [i + 1 for i, event in enumerate(seen) if event.kind not in HARMLESS]
        full = points[:: scene.every] if long else choose.sample(points, sample)
        chosen += [(scene, Aim(Action.FAIL_FROM, point), seen[point - 1]) for point in full]
        one = points[:: 5 * scene.every] if long else choose.sample(points, 1)
        chosen += [(scene, Aim(Action.FAIL_ONCE, point, errno.EDQUOT), seen[point - 1]) for point in one]
    choose.shuffle(chosen)  # a run that is interrupted has tried some of everything
    for scene, aim, event in chosen:
        yield injected(world, scene, aim, event)
    if long and can_mount(world.folder):
        scene = world.scenes["quantize nvfp4"]
        needed = sum(-(-len(data or b"") // 4096) + 1 for data in world.whole(scene)[0].values())
        for i in range(MOUNTED):
            yield mounted(world, scene, 1 + i * (needed + 8) // MOUNTED)


def injected(world: World, scene: Scene, aim: Aim, event: Event) -> Case:
    """Let calls of ``scene`` fail, from a point on where an undisturbed run has ``event``, and go on."""
    root = world.prepared(scene)
    how = "full from" if aim.action is Action.FAIL_FROM else "one call fails at"
    fault = f"{how} point {aim.point}, {event.kind.name.lower()} {event.path.rsplit('/', 1)[-1]}"
    ended = scene.run(root, aim=aim)
    return _judged(world, scene, root, fault, ended)


def _judged(world: World, scene: Scene, root: Path, fault: str, ended: Ended) -> Case:
    expected, problems = world.whole(scene)[0], ended.refusal() if ended.code else ended.success()
    problems += verified(root)
    if ended.code:
        outcome = "one line, then byte-equal"
        problems += scene.go_on(root)
        problems += differences(tree(root), expected)
    elif "figures" in ended.out + ended.err:
        outcome = "done, the card without figures"  # it is not worth an error
    else:
        outcome = "done"
        problems += differences(without_was(tree(root)), without_was(expected))
    shutil.rmtree(root)
    return Case("disk", scene.name, fault, "not as it should be" if problems else outcome, tuple(problems))


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a file system."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    place = folder / "mount-try"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "none", place], capture_output=True, check=False)
    if done.returncode == 0:
        subprocess.run(["umount", place], check=True)
    place.rmdir()
    return done.returncode == 0


def mounted(world: World, scene: Scene, pages: int) -> Case:
    """``scene`` on a file system of so many pages of 4,096 bytes, which then grows."""
    root = world.root()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={pages * 4096}", "none", root], check=True)
    try:
        ended = nemoquant(*scene.arguments(root), root=root, before=_believe_in_room)
        subprocess.run(["mount", "-o", "remount,size=128m", root], check=True)
        problems = ended.success() if ended.code == 0 else ended.refusal()
        if ended.code:
            problems += scene.go_on(root)
        problems += differences(tree(root), world.whole(scene)[0])
    finally:
        subprocess.run(["umount", root], check=True)
    root.rmdir()
    outcome = "one line, then byte-equal" if ended.code else "there was room"
    fault = f"a file system of {pages * 4} kiB"
    return Case("disk", scene.name, fault, "not as it should be" if problems else outcome, tuple(problems))


def _believe_in_room() -> None:
    """The check before a run would refuse so small a disk: another process may fill it afterwards, too."""
    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda path: usage._replace(free=1 << 40)  # type: ignore[assignment]

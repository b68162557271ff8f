"""Power cuts: what a disk may hold when everything is lost that no fsync has put there.

Every event of an undisturbed run is replayed, with its data, on a model of a disk: a file has the bytes that
its last fsync put there, a folder the names of its own last fsync; a file's fsync does not keep its name.
After an event the power fails. What the disk then holds is written out in three ways:

- ``dropped``: only what an fsync has put there;
- ``named``: all names, as if folders went first; of the data only what an fsync has put there, else zeros;
- ``some``: of the rest a random part, whether of names or of writes.

Then an OUT that has its name is whole, and the command to go on leaves the bytes of an undisturbed run.
Besides, nothing may be renamed before its content is on the disk, and nothing may be missing there once the
command is over.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from support.files import tree

from .cases import Case
from .watch import Event, Kind, events
from .world import Scene, Tree, World, differences, verified

SAMPLES = {  # cuts of the short run, each in the three ways
    "quantize nvfp4": 4,
    "quantize nvfp4-w4a16": 1,
    "diff": 3,
    "export onnx": 2,
    "export onnx, a copy": 1,
    "demo": 1,
}
WAYS = ("dropped", "named", "some")


@dataclass(eq=False)
class File:
    """Bytes on the disk, and what was written since: (offset, bytes), or (new size, None)."""

    safe: bytes = b""
    since: list[tuple[int, bytes | None]] = field(default_factory=list)

    def content(self, keep: Callable[[], bool]) -> bytes:
        """The bytes after those changes that ``keep`` lets through; the others left zeros, or nothing."""
        data = bytearray(self.safe)
        for offset, piece in self.since:
            end = offset if piece is None else offset + len(piece)
            data.extend(bytes(max(0, end - len(data))))
            if piece is None:
                del data[end:]
            elif keep():
                data[offset:end] = piece
        return bytes(data)

    def sync(self) -> None:
        """What was written is on the disk."""
        self.safe, self.since = self.content(lambda: True), []

    def unsafe(self) -> list[str]:
        """What is not on the disk."""
        return [f"{len(self.since)} writes"] if self.since else []


@dataclass(eq=False)
class Folder:
    """Names on the disk, names now, and the changes between: names that go, and names that come."""

    safe: "dict[str, File | Folder]" = field(default_factory=dict)
    now: "dict[str, File | Folder]" = field(default_factory=dict)
    since: "list[tuple[str | None, str | None, File | Folder | None]]" = field(default_factory=list)

    def change(self, gone: str | None, come: str | None, node: "File | Folder | None") -> None:
        """One change; a rename is both in one."""
        self.since.append((gone, come, node))
        _apply(self.now, gone, come, node)

    def names(self, keep: Callable[[], bool]) -> "dict[str, File | Folder]":
        """The names after those changes that ``keep`` lets through."""
        names = dict(self.safe)
        for change in self.since:
            if keep():
                _apply(names, *change)
        return names

    def sync(self) -> None:
        """The names are on the disk."""
        self.safe, self.since = dict(self.now), []

    def unsafe(self) -> list[str]:
        """What is not on the disk, here and below."""
        changes = [f"{gone or ''}->{come or ''}" for gone, come, _ in self.since]
        return changes + [f"{name}: {what}" for name, node in self.now.items() for what in node.unsafe()]


def _apply(
    names: "dict[str, File | Folder]", gone: str | None, come: str | None, node: "File | Folder | None"
) -> None:
    if gone is not None:
        names.pop(gone, None)
    if come is not None:
        assert node is not None
        names[come] = node


class Disk:
    """A model of the disk below a folder, which is all there at first."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.nodes: dict[int, File | Folder] = {}  # by inode: a number may come again after an unlink
        self.top = self._present(root)

    def _present(self, path: Path) -> Folder:
        folder = Folder()
        for inner in path.iterdir():
            node = self._present(inner) if inner.is_dir() else File(inner.read_bytes())
            folder.now[inner.name] = self.nodes[inner.stat().st_ino] = node
        folder.sync()
        self.nodes[path.stat().st_ino] = folder
        return folder

    def _parent(self, path: str) -> tuple[Folder, str]:
        parts = Path(path).relative_to(self.root).parts
        folder = self.top
        for part in parts[:-1]:
            inner = folder.now[part]
            assert isinstance(inner, Folder)
            folder = inner
        return folder, parts[-1]

    def replay(self, event: Event) -> list[str]:
        """Do one event; returns what must not be: a name for content that is not on the disk."""
        if event.error or event.kind in (Kind.OPEN, Kind.CONNECT):
            return []
        node = self.nodes.get(event.inode)
        if event.kind in (Kind.CREATE, Kind.MKDIR):
            node = self.nodes[event.inode] = File() if event.kind is Kind.CREATE else Folder()
            folder, name = self._parent(event.path)
            folder.change(None, name, node)
        elif event.kind is Kind.FSYNC and node is not None:
            node.sync()
        elif event.kind in (Kind.WRITE, Kind.TRUNCATE) and isinstance(node, File):
            node.since.append((event.offset, event.data) if event.kind is Kind.WRITE else (event.size, None))
        elif event.kind in (Kind.UNLINK, Kind.RMDIR):
            folder, name = self._parent(event.path)
            folder.change(name, None, None)
        elif event.kind is Kind.RENAME:
            (folder, old), (target, new) = self._parent(event.path), self._parent(event.other)
            assert folder is target and node is not None, f"{event.path} goes to another folder"
            folder.change(old, new, node)
            return [f"{old} became {new} before {what} of it were on the disk" for what in node.unsafe()[:3]]
        return []

    def after_cut(self, way: str, choose: random.Random) -> Tree:
        """What the disk holds when the power fails now."""
        files: Tree = {}

        def keep_name() -> bool:
            return way == "named" or (way == "some" and choose.random() < 0.5)

        def keep_data() -> bool:
            return way == "some" and choose.random() < 0.5

        def visit(folder: Folder, prefix: str) -> None:
            for name, node in sorted(folder.names(keep_name).items()):
                if isinstance(node, Folder):
                    files[prefix + name] = None
                    visit(node, f"{prefix}{name}/")
                else:
                    files[prefix + name] = node.safe if way == "dropped" else node.content(keep_data)

        visit(self.top, "")
        return files


def run(world: World, choose: random.Random, long: bool) -> Iterator[Case]:
    """Cut the power in every scene; see the top of this file."""
    chosen = []
    for name, sample in SAMPLES.items():
        scene, expected = world.scenes[name], world.whole(world.scenes[name])[0]
        root = world.prepared(scene)
        disk = Disk(root)
        recorded = list(events(scene.run(root, log=True).log))
        shutil.rmtree(root)
        renames = [i for i, event in enumerate(recorded) if event.kind is Kind.RENAME]
        cuts = set(range(0, len(recorded), scene.every) if long else choose.sample(renames, sample))
        early: list[str] = []
        tried: set[int] = set()
        for i, event in enumerate(recorded):
            early += disk.replay(event)
            if i in cuts:
                what = f"after event {i + 1}, {event.kind.name.lower()} {Path(event.path).name}"
                for way in WAYS:
                    left = disk.after_cut(way, choose)
                    state = hash(frozenset(left.items()))
                    if state not in tried:  # most writes change nothing that the disk would hold
                        tried.add(state)
                        chosen.append((scene, f"cut {what}, {way}", left))
        missing = disk.top.unsafe()
        problems = early[:5] + [f"not on the disk at the end: {', '.join(missing[:5])}"] * bool(missing)
        problems += [f"at the end: {d}" for d in differences(disk.after_cut("dropped", choose), expected)]
        outcome = "not as it should be" if problems else "content before names, nothing left over"
        yield Case("power", name, f"{len(recorded)} events in their order", outcome, tuple(problems))

    choose.shuffle(chosen)  # a run that is interrupted has tried some of everything
    for scene, fault, left in chosen:
        yield one(world, scene, fault, left)


def one(world: World, scene: Scene, fault: str, left: Tree) -> Case:
    """Go on with ``scene`` where a power cut left these files."""
    root = world.root()
    for name, data in left.items():  # a folder comes before what is in it
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)
    problems = verified(root)
    problems += scene.go_on(root)
    problems += differences(tree(root), world.whole(scene)[0])
    shutil.rmtree(root)
    return Case(
        "power", scene.name, fault, "not as it should be" if problems else "byte-equal", tuple(problems)
    )

"""The models, and the commands that faults meet: scenes.

A scene runs in a folder of its own, and is over when that folder holds what an undisturbed run leaves there.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.files import tree
from support.synthetic import CONFIG, random_tensors, write_checkpoint, write_rows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from .child import Ended, here, nemoquant
from .watch import Aim

SMALLER = {"hybrid_override_pattern": "M*E-", "num_hidden_layers": 4, "n_routed_experts": 4}
SHARD_GIGABYTES = "0.00005"  # several shards of this small model
RUN = ("--compute", "float32", "--row-batch", "2", "--threads", "1", "--shard-size", SHARD_GIGABYTES)
DEMO_PRESETS = ("fp8", "nvfp4-w4a16")
Tree = dict[str, bytes | None]


@dataclass(frozen=True)
class Scene:
    """A command in a folder.

    Attributes:
        arguments: of the command in a folder.
        again: added to go on after a fault.
        prepare: fills the folder first.
        refuses: whether the same command without ``again`` must be refused where something was left.
        new: folder that must not exist before: where it is finished, the command to go on is refused.
        before: called in the child first.
        every: step of the long run through the points; 1 where its events are not those of other scenes.
    """

    name: str
    arguments: Callable[[Path], list[object]]
    again: tuple[str, ...] = ()
    prepare: Callable[[Path], object] = lambda root: None
    refuses: bool = False
    new: str | None = None
    before: Callable[[], object] = lambda: None
    every: int = 1

    def run(self, root: Path, *, aim: Aim = Aim(), again: bool = False, log: bool = False) -> Ended:  # noqa: B008  frozen
        """Run the command in ``root``, which it is watched below."""
        arguments = [*self.arguments(root), *(self.again if again else ())]
        return nemoquant(*arguments, root=root, aim=aim, log=log, before=self.before)

    def go_on(self, root: Path) -> list[str]:
        """Run it again after a fault until it is over; returns what is not as it should be."""
        ended = self.run(root, again=True)
        if ended.code and self.new is not None and (root / self.new).exists():
            told = f"{root / self.new} exists" in ended.err
            return ended.refusal() if told else [f"{self.new} is not named: {ended.err}"]
        return ended.success()


@dataclass
class World:
    """Sources, rows and finished outputs in one folder, and new folders for cases."""

    folder: Path
    scenes: dict[str, Scene] = field(default_factory=dict)
    _whole: dict[str, tuple[Tree, bytes]] = field(default_factory=dict)
    _cases: int = 0

    def __post_init__(self) -> None:
        from nemoquant.checkpoint import intact

        self.folder.mkdir(parents=True)
        intact.stamp_folder = lambda: self.folder / "stamps"  # not in the user's cache
        self.source = self.make_source("source")
        self.rows = write_rows(self.folder / "rows.npy", (4, 16))
        self.scenes = {scene.name: scene for scene in _scenes(self)}
        self._warm()

    def _warm(self) -> None:
        """Run everything once in this process: its children then find modules and kernels loaded."""
        root = self.root()
        here(*self.scenes["quantize nvfp4"].arguments(root))
        here("verify", root / "out", "--against", self.source)
        here(*self.scenes["diff"].arguments(root))
        here(*self.scenes["export onnx"].arguments(root))
        here("generate", root / "out", "--prompt", "the", "--max-tokens", 2, "--threads", 1)
        solved = ("quantize", self.source, root / "solved", "--fmt", "nvfp4", "--calib", self.rows, *RUN)
        here(*solved)
        here("diff", self.source, root / "solved", "--data", self.rows, "--threads", 1)
        shutil.rmtree(root)

    def make_source(self, name: str, seed: int = 0) -> Path:
        """A small checkpoint with a tokenizer and all kinds of side files."""
        raw = {**CONFIG, **SMALLER, "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}}
        path = write_checkpoint(self.folder / name, raw, random_tensors(raw, seed))
        words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *_words()])}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(str(path / "tokenizer.json"))
        settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
        (path / "configuration_nemotron_h.py").write_text(
            "raise SystemExit('code of a checkpoint was run')\n"
        )
        (path / "LICENSE").write_text("a licence\n" * 40)
        return path

    def root(self) -> Path:
        """A new empty folder."""
        self._cases += 1
        path = self.folder / f"case-{self._cases}"
        path.mkdir()
        return path

    def prepared(self, scene: Scene) -> Path:
        """A new folder, filled for a scene."""
        root = self.root()
        scene.prepare(root)
        return root

    def whole(self, scene: Scene) -> tuple[Tree, bytes]:
        """What an undisturbed run of a scene leaves, and the log of its events; it is run once."""
        if scene.name not in self._whole:
            root = self.prepared(scene)
            ended = scene.run(root, log=True)
            assert ended.success() == [], (scene.name, ended.success())
            self._whole[scene.name] = (tree(root), ended.log)
            shutil.rmtree(root)
        return self._whole[scene.name]

    def finished(self, scene: str, root: Path) -> None:
        """Put what a scene leaves into ``root``."""
        plant(self.whole(self.scenes[scene])[0], root)


def plant(files: Tree, root: Path) -> None:
    """Make these files and folders below ``root``."""
    for name, data in files.items():
        if data is None:
            (root / name).mkdir(exist_ok=True)
        else:
            (root / name).write_bytes(data)


def differences(found: Tree, expected: Tree) -> list[str]:
    """Paths that only one of two trees has, or that differ."""
    absent = object()
    names = sorted(
        n for n in found.keys() | expected.keys() if found.get(n, absent) != expected.get(n, absent)
    )
    return [f"{len(names)} paths differ from an undisturbed run: {', '.join(names[:6])}"] if names else []


def verified(root: Path) -> list[str]:
    """What verify says of every checkpoint below ``root`` that has its name."""
    manifests = sorted(path for path in root.rglob("nemoquant.json") if ".partial" not in str(path))
    return [
        f"{path.parent.name} fails: {p}"
        for path in manifests
        for p in nemoquant("verify", path.parent).success()
    ]


def without_was(files: Tree) -> Tree:
    """A manifest that could not be written a second time lists the file that is there, and the one before."""
    result = dict(files)
    for name, data in files.items():
        if name.endswith("nemoquant.json") and data is not None:
            content = json.loads(data)
            result[name] = json.dumps(
                {k: v for k, v in content.items() if k not in ("was", "sha256")}
            ).encode()
    return result


def _words() -> list[str]:
    text = "the of and to a in that it was he his i with as had is for but at on not be which her him you she"
    return (text.split() + [f"word{i}" for i in range(CONFIG["vocab_size"])])[: CONFIG["vocab_size"] - 4]


def _scenes(world: World) -> list[Scene]:
    source, rows = world.source, world.rows

    def quantize(recipe: str, *more: object) -> Callable[[Path], list[object]]:
        given = ["--recipe", recipe, "--method", "max"]
        given += [] if recipe == "nvfp4-w4a16" else ["--calib", rows]
        return lambda root: ["quantize", source, root / "out", *given, *RUN, *more]

    def output(root: Path) -> None:
        world.finished("quantize nvfp4", root)

    def diff(root: Path) -> list[object]:
        files = [
            "--html",
            root / "report.html",
            "--json",
            root / "report.json",
            "--markdown",
            root / "report.md",
        ]
        cache = ["--reference-cache", root / "reference.safetensors"]
        return ["diff", source, root / "out", "--data", rows, "--threads", 1, *files, *cache]

    def demo(root: Path) -> list[object]:
        return ["demo", "--out", root / "out", "--rows", 2]

    def copy(root: Path) -> list[object]:
        return ["export", "onnx", root / "out", root / "copy"]

    resume = ("--resume",)
    return [
        Scene("quantize nvfp4", quantize("nvfp4"), resume, refuses=True),
        Scene("quantize fp8", quantize("fp8"), resume, refuses=True, every=5),
        Scene("quantize nvfp4-w4a16", quantize("nvfp4-w4a16"), resume, refuses=True),
        Scene("diff", diff, prepare=output),
        Scene("export onnx", lambda root: ["export", "onnx", root / "out", "--mtp"], prepare=output),
        Scene("export onnx, a copy", copy, prepare=output, new="copy"),
        Scene("demo", demo, new="out", before=lambda: _small_demo(source), every=5),
    ]


def _small_demo(source: Path) -> None:
    """Let the demo take the small model, two presets and short rows, and export nothing: that is a scene."""
    from nemoquant import api, demo, shipped

    def short(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            return function(*arguments, **options | {"seq_len": 16, "threads": 1})

        return call

    shipped.demo_model = demo.demo_model = lambda: source
    demo.PRESETS = DEMO_PRESETS
    demo._graphs = lambda folder, say: "torch"
    demo.api.RunOptions = short(api.RunOptions)
    demo.api.diff = short(api.diff)

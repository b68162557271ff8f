"""What is checked: checkpoints that are quantized for it, bare configs, and the commands that serve them."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nemoquant
from nemoquant.layouts.gpus import GPUS
from nemoquant.layouts.modelopt import LEGACY, algorithm, config_files, declared_name
from nemoquant.layouts.serving import commands
from nemoquant.model.parse import load_config
from nemoquant.planning.plan import Plan
from nemoquant.planning.recipe import presets

ROOT = Path(__file__).resolve().parents[2]
RECIPES = Path(__file__).parent / "recipes"
WEIGHTS_ONLY = RECIPES / "fp8-weights-only.yaml"
DEMO, NANO = ROOT / "calib" / "demo_model", ROOT / "calib" / "nano_model"
CONFIGS = {
    name: ROOT / "tests" / "configs" / f"{name}.json"
    for name in ("super-120b-a12b", "nano-30b-a3b", "nano-9b-v2")
}
DENSE = {"nano-9b-v2": ("nvfp4", "nvfp4-w4a16")}
OF_ONE = {  # presets that name layers -> the one config that they fit
    "super-nvfp4-published": "super-120b-a12b",
    "nano-fp8-published": "nano-30b-a3b",
    "nano-nvfp4-published": "nano-30b-a3b",
}
ENGINES = ("vllm", "sglang")
PROGRAMS = {"vllm": ("vllm",), "sglang": ("python", "sglang")}  # first words of an engine's commands
ROWS, LENGTH = 4, 128  # of calibration: values are compared with the file's, not with the source's


@dataclass(frozen=True)
class Row:
    """One result: the job of a child.

    Attributes:
        kind: where it goes in the results.
        inputs: identity of all that the job reads.
        task, arguments: a function of ``on_vllm.py`` and ``on_sglang.py``.
    """

    kind: str
    name: str
    inputs: str
    task: str
    arguments: dict[str, Any] = field(hash=False)
    engines: tuple[str, ...] = ENGINES


def hashed(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


@dataclass(frozen=True)
class Checkpoint:
    """A model of the repository, and the recipe that it is quantized by: a preset, or a file."""

    source: Path
    recipe: str | Path

    @property
    def name(self) -> str:
        recipe = self.recipe if isinstance(self.recipe, str) else f"check-{self.recipe.stem}"
        return f"{self.source.name.removesuffix('_model')}-{recipe}"

    @property
    def key(self) -> str:
        """Changes with whatever may change the checkpoint's bytes."""
        recipe = self.recipe if isinstance(self.recipe, Path) else ROOT / f"calib/recipes/{self.recipe}.yaml"
        files = [*sorted((ROOT / "nemoquant").rglob("*.py")), *sorted(self.source.glob("*.safetensors"))]
        files += [self.source / "config.json", recipe]
        return hashed(f"{ROWS} {LENGTH}".encode(), *(file.read_bytes() for file in files))

    def made(self, work: Path) -> Path:
        """Its folder below ``work``, quantized where it is not there or may be another's."""
        out = work / "checkpoints" / self.name
        mark = out.with_name(f"{self.name}.key")
        if not (mark.exists() and mark.read_text() == self.key):
            shutil.rmtree(out, ignore_errors=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            nemoquant.quantize(self.source, out, self.recipe, nemoquant.RunOptions(rows=ROWS, seq_len=LENGTH))
            mark.write_text(self.key)
        return out

    def rows(self, work: Path) -> Iterator[Row]:
        """The model, and its multi-token prediction if it has one.

        Raises:
            NemoquantError: it can't be quantized.
        """
        folder = self.made(work)
        inputs = identity(folder)
        yield Row("checkpoints", self.name, inputs, "load", {"folder": str(folder), "draft": False})
        if load_config(folder)[0].mtp_modules:
            name = f"{self.name}, draft"
            yield Row("checkpoints", name, inputs, "load", {"folder": str(folder), "draft": True})


@dataclass(frozen=True)
class Converted:
    """An FP8 checkpoint in the compressed-tensors layout; vLLM alone reads it."""

    of: Checkpoint

    @property
    def name(self) -> str:
        return f"{self.of.name}, compressed-tensors"

    def rows(self, work: Path) -> Iterator[Row]:
        """The model; its draft is as the source has it."""
        out = work / "checkpoints" / f"{self.of.name}-compressed-tensors"
        folder = self.of.made(work)
        shutil.rmtree(out, ignore_errors=True)
        nemoquant.convert(folder, out, "compressed-tensors", progress=False)
        arguments = {"folder": str(out), "draft": False}
        yield Row("checkpoints", self.name, identity(out), "load", arguments, ("vllm",))


def identity(folder: Path) -> str:
    """Changes with whatever an engine reads in a checkpoint."""
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json", folder / LEGACY]
    return hashed(*(file.read_bytes() for file in files if file.exists()))


@dataclass(frozen=True)
class Bare:
    """A published config without weights, and a preset: the engines' names against the plan's."""

    config: str
    preset: str

    @property
    def name(self) -> str:
        return f"{self.config}-{self.preset}"

    @property
    def plan(self) -> Plan:
        return nemoquant.plan(CONFIGS[self.config], self.preset)

    def made(self, work: Path) -> Path:
        """A folder with the config files that the output would have, and any tokenizer."""
        out = work / "configs" / self.name
        out.mkdir(parents=True, exist_ok=True)
        for file in DEMO.glob("tokenizer*.json"):
            shutil.copy(file, out)
        raw = json.loads(CONFIGS[self.config].read_text(encoding="utf-8"))
        for name, data in config_files(self.plan, raw).items():
            (out / name).write_text(json.dumps(data), encoding="utf-8")
        return out

    def rows(self, work: Path) -> Iterator[Row]:
        """One: every module that has a weight, and its algorithm."""
        folder = self.made(work)
        plan = {
            row.module: declared_name(algorithm(row))
            for row in self.plan.rows
            if row.name.endswith(".weight")
        }
        inputs = hashed(json.dumps(plan).encode(), (folder / "config.json").read_bytes())
        yield Row("configs", self.name, inputs, "names", {"folder": str(folder), "plan": plan})


def converted() -> list[Converted]:
    """The FP8 preset on both models, and FP8 weights only."""
    recipes: list[tuple[Path, str | Path]] = [(DEMO, "fp8"), (NANO, "fp8"), (DEMO, WEIGHTS_ONLY)]
    return [Converted(Checkpoint(source, recipe)) for source, recipe in recipes]


def checkpoints() -> list[Checkpoint]:
    """Every preset that fits, on both models, and the recipes beside this file on the demo model."""
    fitting = [name for name in presets() if name not in OF_ONE]
    return [
        *(Checkpoint(source, name) for source in (DEMO, NANO) for name in fitting),
        *(Checkpoint(DEMO, path) for path in sorted(RECIPES.glob("*.yaml"))),
    ]


def bare() -> list[Bare]:
    """Every preset on every config that it fits; on a dense one those that give its MLP what experts get."""
    return [
        Bare(config, preset)
        for config in CONFIGS
        for preset in (DENSE[config] if config in DENSE else presets())
        if OF_ONE.get(preset, config) == config
    ]


def served(work: Path, engine: str) -> list[tuple[int, tuple[str, ...]]]:
    """The commands of an engine for every bare config and every GPU that is known, each once: (SM, words)."""
    found: dict[tuple[str, ...], int] = {}
    for row in bare():
        plan, folder = row.plan, row.made(work)
        for name, gpu in GPUS.items():
            for serving in commands(plan, name, folder):
                if serving.argv and serving.argv[0] in PROGRAMS[engine]:
                    found.setdefault(serving.argv, gpu.sm)
    return [(sm, words) for words, sm in found.items()]

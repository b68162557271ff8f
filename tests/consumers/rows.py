"""What is checked: checkpoints that are quantized for it, bare configs, and the commands that serve them."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import nemoquant
from nemoquant.layouts.modelopt import algorithm, config_files
from nemoquant.model.parse import load_config
from nemoquant.planning.plan import Plan
from nemoquant.planning.recipe import presets

try:
    from nemoquant.layouts.gpus import GPUS
    from nemoquant.layouts.serving import commands
except ImportError:
    GPUS, commands = {}, None

ROOT = Path(__file__).resolve().parents[2]
RECIPES = Path(__file__).parent / "recipes"
DEMO, NANO = ROOT / "calib" / "demo_model", ROOT / "calib" / "nano_model"
CONFIGS = {name: ROOT / "tests" / "configs" / f"{name}.json" for name in ("super-120b-a12b", "nano-30b-a3b")}
SUPER_ONLY = "super-nvfp4-published"
CALIBRATION = (
    "--rows",
    "4",
    "--seq-len",
    "128",
)  # values are compared with the file's, not with the source's
COMMANDS = {"vllm": ("vllm",), "sglang": ("python", "sglang")}  # the first word of each engine's


@dataclass(frozen=True)
class Checkpoint:
    """A model of the repository, and the recipe that it is quantized by."""

    source: Path
    recipe: str | Path

    @property
    def name(self) -> str:
        recipe = self.recipe if isinstance(self.recipe, str) else f"check-{self.recipe.stem}"
        return f"{self.source.name.removesuffix('_model')}-{recipe}"

    @property
    def has_draft(self) -> bool:
        """Whether the model has multi-token prediction."""
        return load_config(self.source)[0].mtp_modules > 0

    @property
    def key(self) -> str:
        """Changes with whatever may change the checkpoint's bytes."""
        digest = hashlib.sha256(json.dumps(CALIBRATION).encode())
        files = [*sorted((ROOT / "nemoquant").rglob("*.py")), *sorted(self.source.glob("*.safetensors"))]
        presets = [ROOT / "calib" / "recipes" / f"{self.recipe}.yaml"]
        files += [self.source / "config.json", *([self.recipe] if isinstance(self.recipe, Path) else presets)]
        for file in files:
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]

    def made(self, work: Path) -> Path:
        """Its folder below ``work``, quantized where it is not there or is another's."""
        out = work / "checkpoints" / self.name
        mark = out.with_suffix(".key")
        if not (mark.exists() and mark.read_text() == self.key):
            shutil.rmtree(out, ignore_errors=True)
            mark.unlink(missing_ok=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            nemoquant.quantize(self.source, out, self.recipe, nemoquant.RunOptions(rows=4, seq_len=128))
            mark.write_text(self.key)
        return out


def checkpoints() -> list[Checkpoint]:
    """Every preset that fits, on both models, and the recipes beside this file on the demo model."""
    fitting = [name for name in presets() if name != SUPER_ONLY]
    return [
        *(Checkpoint(source, name) for source in (DEMO, NANO) for name in fitting),
        *(Checkpoint(DEMO, path) for path in sorted(RECIPES.glob("*.yaml"))),
    ]


@dataclass(frozen=True)
class Bare:
    """A published config without weights, and a preset."""

    config: str
    preset: str

    @property
    def name(self) -> str:
        return f"{self.config}-{self.preset}"

    @property
    def plan(self) -> Plan:
        return nemoquant.plan(CONFIGS[self.config], self.preset)

    def made(self, work: Path) -> Path:
        """A folder with the config files that the output would have."""
        out = work / "configs" / self.name
        out.mkdir(parents=True, exist_ok=True)
        raw = json.loads(CONFIGS[self.config].read_text(encoding="utf-8"))
        for name, data in config_files(self.plan, raw).items():
            (out / name).write_text(json.dumps(data), encoding="utf-8")
        return out

    def algorithms(self) -> dict[str, str]:
        """Module -> algorithm, of every module with a weight."""
        return {row.module: algorithm(row) for row in self.plan.rows if row.name.endswith(".weight")}


def bare() -> list[Bare]:
    """Every preset on every config that it fits."""
    return [
        Bare(config, preset)
        for config in CONFIGS
        for preset in presets()
        if preset != SUPER_ONLY or config.startswith("super")
    ]


def served(rows: list[Bare], work: Path, engine: str) -> list[tuple[int, list[str]]]:
    """The commands for every GPU that is known, each once: (SM, words)."""
    found: dict[tuple[str, ...], int] = {}
    for row in rows:
        for name, gpu in GPUS.items():
            for serving in commands(row.plan, name, row.made(work)):
                if serving.argv and serving.argv[0] in COMMANDS[engine]:
                    found.setdefault(serving.argv, gpu.sm)
    return [(sm, list(words)) for words, sm in found.items()]

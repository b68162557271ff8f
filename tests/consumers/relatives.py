"""Small relatives of the trained models, loaded by vLLM's code: a language model inside another, and Puzzle.

    python -m tests.consumers.relatives [--work DIR] [PRESET ...]

They are quantized from random weights by each preset (``tests/support/inside.py``, ``puzzle.py``). In a child
with vLLM the language model of the Omni is made and loaded as ``NemotronH_Nano_VL_V2`` does: with its prefix,
its mapping of the names in config files, its way with the names of tensors. Its encoders are not made: they
need torchvision, which is built for GPUs. Puzzle's config class comes with a checkpoint; here one of the same
methods stands for it. Every module's algorithm, values and scales are compared with the file, as in
``on_vllm.py``. The environment is that of ``python -m tests.consumers``.

Exit status: 0 nothing differs, 1 something does.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

PRESETS = ("fp8", "mxfp8", "nvfp4", "nvfp4-full", "nvfp4-w4a16")
DIFFERENCES = ("algorithm_differs", "values_differ", "input_scales_differ", "kv_scales_differ", "unset")
ABSENT = ("", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional")


def main() -> int:
    """Quantize, and have each output loaded in a child."""
    sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/: as pytest has it
    from support.inside import omni_checkpoint
    from support.puzzle import PUZZLE
    from support.synthetic import random_tensors, write_checkpoint, write_rows

    import nemoquant

    from .environment import Environment

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(prog="python -m tests.consumers.relatives", description=__doc__)
    parser.add_argument("presets", nargs="*", metavar="PRESET")
    parser.add_argument("--work", type=Path, default=cache / "nemoquant-consumers", metavar="DIR")
    chosen = parser.parse_args()
    environment = Environment(chosen.work.expanduser().resolve() / "environment", {"vllm": None})
    environment.make()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        rows = write_rows(base / "rows.npy")
        sources = {
            "inside": omni_checkpoint(base / "omni"),
            "puzzle": write_checkpoint(base / "puzzle", PUZZLE, random_tensors(PUZZLE)),
        }
        for task, source in sources.items():
            for preset in chosen.presets or PRESETS:
                out = base / f"{task}-{preset}"
                options = nemoquant.RunOptions(data=rows, method="max", dtype="float32")
                nemoquant.quantize(source, out, preset, options, progress=False)
                wrong += _told(f"{task}, {preset}", _in_child(environment, task, out))
    return int(wrong > 0)


def _in_child(environment: Any, task: str, out: Path) -> dict[str, Any]:
    answer = out.with_suffix(".json")
    done = subprocess.run(
        [environment.python, "-m", "consumers.relatives", "--child", task, out, answer],
        env=environment.variables("vllm"),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1]}
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def _told(name: str, found: dict[str, Any]) -> int:
    """A line on a row; returns how much of it differs."""
    differing = {key: found[key] for key in DIFFERENCES if found.get(key)}
    text = found.get("failed") or f"{found['modules']} modules, {found['algorithms']}; differing: {differing}"
    print(f"{name}: {text}", flush=True)
    return len(differing) + ("failed" in found)


# What follows runs in the environment of vLLM.


def inside(folder: Path) -> dict[str, Any]:
    """The language model of a checkpoint that has it in ``llm_config``, as vLLM's class around it does."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import configure_quant_config
    from vllm.model_executor.models.utils import init_vllm_registered_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from . import on_vllm

    for name in ABSENT:
        sys.modules.setdefault(f"torchvision{name}", MagicMock(__path__=[], __spec__=None))
    from vllm.model_executor.models.nano_nemotron_vl import NemotronH_Nano_VL_V2 as Around

    prefix, raw = "language_model.", json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config_of = on_vllm.engine_config

    class Inner(on_vllm.Stored):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            own = {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
            self.tensors = {name.removeprefix(prefix): tensor for name, tensor in own.items()}

    class Loader:
        def load_weights(self, model: torch.nn.Module, _: Any) -> None:
            model.load_weights(Inner(folder).tensors.items())

    def engine_config(_: str, draft: bool) -> Any:
        with tempfile.TemporaryDirectory() as text:
            inner = raw["llm_config"] | {"quantization_config": raw["quantization_config"]}
            (Path(text) / "config.json").write_text(json.dumps(inner), encoding="utf-8")
            config = config_of(text, draft)
        configure_quant_config(config.quant_config, Around)
        return config

    def built(config: Any, _: bool) -> tuple[torch.nn.Module, Any]:
        config.compilation_config.static_forward_context.clear()
        text = config.model_config.hf_config
        with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
            model = init_vllm_registered_model(vllm_config=config, hf_config=text, prefix=prefix[:-1])
        return model, config.model_config

    on_vllm.Stored, on_vllm.engine_config, on_vllm.built = Inner, engine_config, built
    on_vllm.get_model_loader = lambda _: Loader()
    return on_vllm.load(str(folder), False)


def puzzle(folder: Path) -> dict[str, Any]:
    """A model whose layers have sizes of their own."""
    from transformers import AutoConfig, NemotronHConfig

    from . import on_vllm

    class Puzzle(NemotronHConfig):  # type: ignore[misc]
        model_type = "nemotron_h_puzzle"
        block_configs: list[dict[str, Any]] | None = None
        mtp_block_configs: list[dict[str, Any]] | None = None

        def get_nemotron_h_config_for_layer(self, layer: int) -> "Puzzle":
            own = copy.copy(self)
            for key, value in (self.block_configs or [])[layer].items():
                object.__setattr__(own, key, value)
            return own

    AutoConfig.register(Puzzle.model_type, Puzzle)
    return on_vllm.load(str(folder), False)


TASKS: dict[str, Callable[[Path], dict[str, Any]]] = {"inside": inside, "puzzle": puzzle}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        task, folder, answer = sys.argv[2:]
        Path(answer).write_text(json.dumps(TASKS[task](Path(folder))), encoding="utf-8")
    else:
        sys.exit(main())

"""quantize and diff on the device and on the CPU: the demo model, and a random checkpoint as wide as Super.

    python -m bench.gpu.pack OUT.json WORK        on a CUDA device; WORK, a new folder, takes a few GB
    python -m bench.gpu.pack OUT.json WORK cpu    the CPU in the device's place, a tiny checkpoint

With the same scales both must write the same bytes; a model against itself must differ by nothing; the KL
divergences of both are written down. Of the large one every stage is timed apart, on all processors and on
the device: calibration, packing with given scales and encoding alone (by `max`, and by `mse`), diff.
OUT.json is a list of steps, checks and stages, written after each; after NQ_SECONDS (default 150) no new
step starts. The exit code is 1 if one is not right.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bench import checkpoints
from bench.gpu.environment import need_device
from bench.pipeline import encode, plain
from nemoquant.api import RunOptions, diff, quantize
from nemoquant.machine import usable_threads
from nemoquant.ops.library import serves
from nemoquant.ops.proven import OPERATORS

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "calib/demo_model"
MSE = str(ROOT / "bench/recipes/nvfp4-mse.yaml")
THREADS = usable_threads()  # all that there are: what a device is held against
T = TypeVar("T")

PATTERN = {"hybrid_override_pattern": "ME*E", "num_hidden_layers": 4, "num_nextn_predict_layers": 0}
WIDTHS = {
    "vocab_size": 4096,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "chunk_size": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 8,
    "moe_latent_size": 1024,
    "moe_intermediate_size": 2688,
    "moe_shared_expert_intermediate_size": 5376,
}
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 2,
    "chunk_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_latent_size": 32,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
}


class Stages:
    """A Progress that keeps how long each stage took, from its first call to its last."""

    def __init__(self) -> None:
        self.spans: dict[str, tuple[float, float]] = {}

    def __call__(self, stage: str, done: int, total: int, what: str) -> None:  # noqa: ARG002
        now = time.perf_counter()
        self.spans[stage] = self.spans.get(stage, (now, now))[0], now

    def seconds(self) -> dict[str, float]:
        return {stage: round(end - begin, 3) for stage, (begin, end) in self.spans.items()}


class Steps:
    """What was done and what was found, written after each."""

    def __init__(self, out: Path, seconds: float = float("inf")) -> None:
        """``seconds`` from now on the rest of the steps is listed as not run."""
        self.out, self.seconds, self.began = out, seconds, time.time()
        self.rows: list[dict[str, Any]] = []
        self.stages: dict[str, dict[str, float]] = {}

    def note(self, **row: Any) -> None:
        self.rows.append(row)
        self.out.write_text(json.dumps(self.rows, indent=0))
        print(json.dumps(row)[:300], flush=True)

    def timed(self, what: str, step: Callable[[], T]) -> T | None:
        """What the step returns; None where it failed, or time is up, which is noted."""
        start = time.time()
        if start - self.began > self.seconds:
            self.note(step=what, ok=None, why="out of time")
            return None
        try:
            result = step()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:400]
            self.note(step=what, s=round(time.time() - start, 2), ok=False, why=why)
            if "CUDA error" in why:
                raise SystemExit(f"the device does not answer any more: {why}") from None
            return None
        self.note(step=what, s=round(time.time() - start, 2))
        return result

    def staged(self, what: str, step: Callable[..., T]) -> T | None:
        """:meth:`timed` of a step that takes a Progress; what its stages took is kept under its name."""
        stages = Stages()
        result = self.timed(what, lambda: step(progress=stages))
        if result is not None:
            self.stages[what] = stages.seconds()
            self.rows[-1]["stages"] = self.stages[what]
        return result

    def compare(self, stage: str, seconds: Callable[[str], float | None], device: str) -> None:
        """A stage on the CPU and on the device beside each other; nothing where one is missing.

        Args:
            seconds: what it took on a device, by the device's name.
        """
        here, there = seconds("cpu"), seconds(device)
        if here and there:
            row = {"cpu_s": round(here, 3), "device_s": round(there, 3), "times": round(here / there, 2)}
            self.note(stage=stage, **row)

    def same_bytes(self, what: str, one: Path, two: Path) -> None:
        """Tensors decide; other files that differ are named."""
        ours, theirs = contents(one), contents(two)
        differ = [name for name in ours if ours[name] != theirs.get(name)]
        self.note(check=what, ok=not any(name.endswith(".safetensors") for name in differ), differ=differ)

    def bad(self) -> int:
        return sum(row.get("ok") is False for row in self.rows)


def contents(folder: Path) -> dict[str, bytes]:
    """Files by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def check_demo(steps: Steps, work: Path, device: str) -> None:
    """Each recipe calibrated on both, packed on the device with the CPU's scales, and compared on both."""
    for recipe in ("nvfp4", "fp8", MSE):
        name = Path(recipe).stem
        outputs = [work / f"demo-{name}-{number}" for number in range(2)]
        for output, where in zip(outputs, ("cpu", device), strict=True):
            options = RunOptions(
                rows=8, seq_len=256, device=where, dtype="float32", threads=8, method=plain(recipe)
            )
            run = partial(quantize, DEMO, output, recipe, options)
            steps.timed(f"demo {name} {where}", run)
        scales = outputs[0] / "nemoquant_scales.json"
        options = RunOptions(scales=scales, device=device, threads=8, method=plain(recipe))
        given = work / f"given-{name}"
        what = f"demo {name}, scales of the CPU, packed on {device}"
        if steps.timed(what, partial(quantize, DEMO, given, recipe, options)):
            steps.same_bytes(f"demo {name}: same bytes", outputs[0], given)
        if recipe == MSE:  # its codes are what is new, and they were compared
            continue
        for where in dict.fromkeys(("cpu", device)):
            compare = partial(diff, DEMO, outputs, rows=4, seq_len=256, card=False, device=where)
            report = steps.timed(f"demo diff {name} {where}", compare)
            note_divergence(steps, f"kl {name} {where}", report)
        if device == "cuda" and recipe == "fp8":
            itself = partial(diff, DEMO, [DEMO], rows=2, seq_len=128, card=False, device="cuda")
            report = steps.timed("itself", itself)
            if report:
                steps.note(check="itself", ok=report.candidates[0].logits.kl.max == 0)


def note_divergence(steps: Steps, what: str, report: Any) -> None:
    """The mean KL divergence of each candidate, where there is a report."""
    if report:
        steps.note(check=what, kl=[candidate.logits.kl.mean for candidate in report.candidates])


def random_source(folder: Path, small: bool) -> Path:
    """A checkpoint with one layer of Mamba, one of attention and two of experts, and rows.npy beside it."""
    raw = json.loads((DEMO / "config.json").read_text()) | PATTERN | (TINY if small else WIDTHS)
    raw.pop("mtp_hybrid_override_pattern", None)
    checkpoints.make(folder / "source", raw)
    shape = (4, 32 if small else 512)
    np.save(folder / "rows.npy", np.random.default_rng(0).integers(3, raw["vocab_size"], shape))
    return folder / "source"


def check_large(steps: Steps, folder: Path, device: str) -> None:
    """The same of a checkpoint as wide as Super, of few layers and experts; what each stage took on both."""
    folder.mkdir()
    source = steps.timed("mid: made", lambda: random_source(folder, small=device == "cpu"))
    if source is None:
        return
    size = round(sum(path.stat().st_size for path in source.iterdir()) / 1e9, 2)
    steps.note(size_GB=size, processors=THREADS)
    rows, places = folder / "rows.npy", ("cpu", device)
    outputs = [folder / f"out{number}" for number in range(2)]
    for output, where in zip(outputs, places, strict=True):
        options = RunOptions(data=rows, device=where, threads=THREADS, method="max")
        run = partial(quantize, source, output, "nvfp4", options)
        steps.staged(f"mid calibrated {where}", run)
    compare_stage(steps, "calibrate", "mid calibrated", device, "calibrate")
    scales = outputs[0] / "nemoquant_scales.json"
    for recipe in ("nvfp4", MSE):
        name = Path(recipe).stem
        given = [folder / f"given-{name}-{number}" for number in range(2)]
        for output, where in zip(given, places, strict=True):
            options = RunOptions(scales=scales, device=where, threads=THREADS, method=plain(recipe))
            steps.staged(f"mid {name} packed {where}", partial(quantize, source, output, recipe, options))
        if all(output.is_dir() for output in given):
            steps.same_bytes(f"mid {name}: same bytes", *given)
        compare_stage(steps, f"pack {name}", f"mid {name} packed", device, "pack")
        compare_encoding(steps, source, recipe, device)
    for where in dict.fromkeys(places):
        run = partial(diff, source, [outputs[0]], data=rows, card=False, device=where)
        report = steps.staged(f"mid diff {where}", run)
        note_divergence(steps, f"mid kl {where}", report)
    compare_stage(steps, "diff", "mid diff", device, "diff")


def compare_stage(steps: Steps, stage: str, what: str, device: str, of: str) -> None:
    """The stage ``of`` of both steps ``what``."""
    steps.compare(stage, lambda where: steps.stages.get(f"{what} {where}", {}).get(of), device)


def compare_encoding(steps: Steps, source: Path, recipe: str, device: str) -> None:
    """All codes of a recipe and nothing else: no hash, no file; the second of two rounds."""
    name, seconds = Path(recipe).stem, {}
    for where in ("cpu", device):
        for counts in (False, True):  # the first round compiles or loads kernels
            start = time.perf_counter()
            encoding = partial(encode, source, recipe, THREADS, where)
            if steps.timed(f"mid {name} encoded {where}", lambda run=encoding: run() or True) and counts:
                seconds[where] = time.perf_counter() - start
    steps.compare(f"encode {name}", seconds.get, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("work", type=Path, metavar="WORK", help="a new or empty folder")
    parser.add_argument("device", nargs="?", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda":
        need_device()
    options.work.mkdir(parents=True, exist_ok=True)
    if any(options.work.iterdir()):
        parser.error(f"{options.work} is not empty; expected a new folder")
    steps = Steps(options.out, float(os.environ.get("NQ_SECONDS", "150")))
    if options.device == "cuda":
        used = [op for op in OPERATORS if serves(op, "cuda")]
        steps.note(kernels=used or "none: torch computes")  # of plugins/, in calibration and diff
    check_demo(steps, options.work, options.device)
    check_large(steps, options.work / "mid", options.device)
    print(f"{steps.bad()} bad")
    raise SystemExit(bool(steps.bad()))


if __name__ == "__main__":
    main()

"""quantize and diff on the device and on the CPU: the demo model, and a random checkpoint as wide as Super.

    python -m bench.gpu.pack OUT.json WORK        on a CUDA device; WORK, a new folder, takes a few GB
    python -m bench.gpu.pack OUT.json WORK cpu    the CPU in the device's place, a tiny checkpoint

With the same scales both must write the same bytes; a model against itself must differ by nothing; the KL
divergences of both are written down. OUT.json is a list of steps and checks, written after each. The exit
code is 1 if one is not right.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bench import checkpoints
from nemoquant.api import RunOptions, diff, quantize

DEMO = Path(__file__).resolve().parents[2] / "calib/demo_model"
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


class Steps:
    """What was done and what was found, written after each."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[dict[str, Any]] = []

    def note(self, **row: Any) -> None:
        self.rows.append(row)
        self.out.write_text(json.dumps(self.rows, indent=0))
        print(json.dumps(row)[:300], flush=True)

    def timed(self, what: str, step: Callable[[], T]) -> T | None:
        """What the step returns; None where it failed, which is noted."""
        start = time.time()
        try:
            result = step()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:400]
            self.note(step=what, s=round(time.time() - start, 2), ok=False, why=why)
            return None
        self.note(step=what, s=round(time.time() - start, 2))
        return result

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
    for recipe in ("nvfp4", "fp8"):
        outputs = [work / f"demo-{recipe}-{number}" for number in range(2)]
        for output, where in zip(outputs, ("cpu", device), strict=True):
            options = RunOptions(rows=8, seq_len=256, device=where, dtype="float32", threads=8)
            run = partial(quantize, DEMO, output, recipe, options)
            steps.timed(f"demo {recipe} {where}", run)
        options = RunOptions(scales=outputs[0] / "nemoquant_scales.json", device=device, threads=8)
        given = work / f"given-{recipe}"
        what = f"demo {recipe}, scales of the CPU, packed on {device}"
        if steps.timed(what, partial(quantize, DEMO, given, recipe, options)):
            steps.same_bytes(f"demo {recipe}: same bytes", outputs[0], given)
        for where in dict.fromkeys(("cpu", device)):
            compare = partial(diff, DEMO, outputs, rows=4, seq_len=256, card=False, device=where)
            report = steps.timed(f"demo diff {recipe} {where}", compare)
            note_divergence(steps, f"kl {recipe} {where}", report)
        if device == "cuda":
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
    """The same of a checkpoint as wide as Super, of few layers and experts, NVFP4 alone."""
    folder.mkdir()
    source = steps.timed("mid: made", lambda: random_source(folder, small=device == "cpu"))
    if source is None:
        return
    steps.note(size_GB=round(sum(path.stat().st_size for path in source.iterdir()) / 1e9, 2))
    outputs, rows = [folder / "out0", folder / "out1"], folder / "rows.npy"
    for output, where in zip(outputs, ("cpu", device), strict=True):
        run = partial(quantize, source, output, "nvfp4", RunOptions(data=rows, device=where, threads=12))
        steps.timed(f"mid nvfp4 {where}: calibrated and packed", run)
    options = RunOptions(scales=outputs[0] / "nemoquant_scales.json", device=device, threads=12)
    run = partial(quantize, source, folder / "given", "nvfp4", options)
    if steps.timed("mid nvfp4: scales of the CPU, packed on the other", run):
        steps.same_bytes("mid: same bytes", outputs[0], folder / "given")
    for where in dict.fromkeys(("cpu", device)):
        compare = partial(diff, source, [outputs[0]], data=rows, card=False, device=where)
        report = steps.timed(f"mid diff {where}", compare)
        note_divergence(steps, f"mid kl {where}", report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("work", type=Path, metavar="WORK", help="a new or empty folder")
    parser.add_argument("device", nargs="?", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if any(options.work.iterdir()):
        parser.error(f"{options.work} is not empty; expected a new folder")
    steps = Steps(options.out)
    check_demo(steps, options.work, options.device)
    check_large(steps, options.work / "mid", options.device)
    print(f"{steps.bad()} bad")
    raise SystemExit(bool(steps.bad()))


if __name__ == "__main__":
    main()

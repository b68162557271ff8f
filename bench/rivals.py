"""Other tools beside ours: the same map, the same calibration rows, their own exports through `nemoquant
diff`.

    python -m bench.rivals --work DIR --modelopt PYTHON --llmcompressor PYTHON --autoround PYTHON
    python -m bench.rivals --work DIR --models demo --presets nvfp4-full nvfp4 --modelopt PYTHON

PYTHON is the interpreter of an environment with that tool (docs/accuracy.md says how they are made); a tool
without one is left out, and the table says so. Which module gets which format is taken from the plan of our
preset, and read back from every export; the KV cache stays as the source for all. Every tool calibrates on
the same 32 rows of 512 tokens, in float32, in a process of its own (bench/peer/), whose processor time and
peak memory are in the table. KL and the rest are from the exports, over rows 0 to 31 of the evaluation text,
and differences over rows 64 to 87 too, on which nothing of ours was chosen; they are paired over rows. What
is done stays in DIR: the same command goes on where it was stopped. A tool's refusal is kept in its own
words; `--again` tries such steps once more.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from bench.measure import machine, run
from bench.methods import CALIB, LENGTH, calibration_rows, logits, measured, standard_error
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.errors import NemoquantError
from nemoquant.model.reference import ReferenceModel
from nemoquant.planning.recipe import load_recipe
from nemoquant.quantized.checkpoint import PackedCheckpoint
from nemoquant.shipped import evaluation_data
from nemoquant.sources.source import open_weights
from nemoquant.tokens.rows import load_rows

PEERS = Path(__file__).parent / "peer"
ROWS = 32
UNSEEN = slice(64, 88)  # of the evaluation text: nothing of ours was chosen on them
OURS = "ours"
DEFAULT = "default"
VARIANTS: dict[
    str, list[str]
] = {  # of ours, by the options of `quantize`; the first is what others are compared with
    DEFAULT: [],
    "outputs=loss": ["--outputs", "loss"],
    "propagate=source": ["--propagate", "source"],
    "propagate=quantized": ["--propagate", "quantized"],
    "hess": ["--method", "hess"],
    "mse": ["--method", "mse"],
    "max": ["--method", "max"],
}
RIVALS: dict[str, tuple[str, str, tuple[str, ...]]] = {  # option: (name, script, methods)
    "modelopt": (
        "Model Optimizer",
        "rival_modelopt.py",
        ("max", "mse", "local_hessian", "gptq", "awq_lite", "awq_lite:fused", "svdquant", "svdquant:fused"),
    ),
    "llmcompressor": ("llm-compressor", "rival_llmcompressor.py", ("max", "gptq", "gptq:routed")),
    "autoround": ("AutoRound", "rival_autoround.py", ("rtn", "signround:50", "signround")),
}
PRESETS = ("nvfp4-full", "nvfp4-full-w4a16", "fp8", "nvfp4")


@dataclass(frozen=True)
class Case:
    """A model and a preset, and where its steps lie."""

    model: str
    preset: str
    folder: Path

    @property
    def source(self) -> Path:
        return CALIB / f"{self.model}_model"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"


def prepare(work: Path, model: str) -> None:
    """Calibration rows that every tool reads."""
    (work / model).mkdir(parents=True, exist_ok=True)
    np.save(work / model / "rows.npy", calibration_rows(CALIB / f"{model}_model", ROWS, LENGTH, 0))


def planned(case: Case) -> dict[str, tuple[str, str | None]]:
    """Quantized module -> formats of its weights and inputs; writes it, and the preset without KV cache."""
    case.folder.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(case.preset).dump() | {"kv_cache": "source"}
    case.recipe.write_text(yaml.safe_dump(recipe))
    command = [
        sys.executable,
        "-m",
        "nemoquant",
        "plan",
        str(case.source),
        "--recipe",
        str(case.recipe),
        "--json",
    ]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["rows"]
    formats = {
        row["name"].removesuffix(".weight"): (row["format"], row["activation_format"])
        for row in rows
        if row["format"] != "source"
    }
    (case.folder / "map.json").write_text(json.dumps(formats))
    return formats


def words(log: Path) -> str:
    """The last exception of a log, as its tool puts it."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [
        line for line in lines if line.split(":")[0].split(".")[-1].endswith(("Error", "Exception", "Exit"))
    ]
    return (named or lines or ["no output"])[-1][:300]


def command(case: Case, tool: str, method: str, python: str, step: Path) -> list[str]:
    out = step / "out"
    if tool == OURS:
        given = ["--recipe", case.recipe, "--calib", case.folder.parent / "rows.npy", *VARIANTS[method]]
        quantize = [
            python,
            "-m",
            "nemoquant",
            "quantize",
            case.source,
            out,
            *given,
            "--rows",
            ROWS,
            "--seq-len",
            LENGTH,
        ]
        return list(map(str, quantize))
    job = step / "job.json"
    rows = case.folder.parent / "rows.npy"
    data = {"source": case.source, "out": out, "rows": rows, "method": method}
    formats = json.loads((case.folder / "map.json").read_text())
    job.write_text(json.dumps({key: str(value) for key, value in data.items()} | {"map": formats}))
    return [python, str(PEERS / RIVALS[tool][1]), str(job)]


def other_map(out: Path, formats: dict[str, tuple[str, str | None]]) -> list[str]:
    """Where an export has another format than the map."""
    opened = PackedCheckpoint(out)
    found = {
        name.removesuffix(".weight"): stored.format
        for name, stored in opened.stored.items()
        if stored.format != "source" and not name.startswith("mtp.")
    }
    opened.checkpoint.close()
    both = found.keys() | formats.keys()
    wanted = {name: formats[name][0] for name in formats}
    return sorted(name for name in both if found.get(name) != wanted.get(name))


def step(case: Case, tool: str, method: str, python: str, again: bool) -> dict[str, Any]:
    """Quantize and export once; the result is kept."""
    folder = case.folder / f"{tool}-{method.replace(':', '-')}"
    kept = folder / "made.json"
    if kept.exists():
        data: dict[str, Any] = json.loads(kept.read_text())
        if not (again and "refused" in data):
            return data
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        data = run(command(case, tool, method, python, folder), folder / "log").json()
    except RuntimeError:
        data = {"refused": words(folder / "log")}
    kept.write_text(json.dumps(data))
    return data


def evaluated(folder: Path, formats: dict[str, tuple[str, str | None]], reference: "Reference") -> Any:
    """KL, log-likelihood and top-1 agreement of each row of an export in a step's folder; kept."""
    kept = folder / f"rows-{reference.rows.start}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    try:
        differs = other_map(folder / "out", formats)
        if differs:
            return {"refused": f"its export has another map: {', '.join(differs[:3])}, {len(differs)} in all"}
        data = measured(folder / "out", *reference())
    except NemoquantError as error:
        return {"refused": f"nemoquant diff: {error}"}
    kept.write_text(json.dumps(data))
    return data


def source_logits(source: Path, ids: np.ndarray) -> list[torch.Tensor]:
    """The source's log-probabilities, in batches, float32."""
    with (opened := open_weights(source, "")).checkpoint, Checkpoint(source) as checkpoint:
        model = ReferenceModel(opened.config, lambda prefix: LayerWeights(checkpoint, prefix))
        return [part.float() for part in logits(model, ids)]


class Reference:
    """Evaluation rows of a model and the source's log-probabilities on them, made when first asked for."""

    def __init__(self, source: Path, rows: slice) -> None:
        self.source, self.rows = source, rows
        self.made: tuple[np.ndarray, list[torch.Tensor]] | None = None

    def __call__(self) -> tuple[np.ndarray, list[torch.Tensor]]:
        if self.made is None:
            with (opened := open_weights(self.source, "")).checkpoint:
                ids = load_rows(evaluation_data(), self.source, opened.config, self.rows.stop, LENGTH).ids
            ids = ids[self.rows]
            self.made = ids, source_logits(self.source, ids)
        return self.made


def diffed(case: Case, exports: list[Path]) -> dict[str, Any]:
    """What `nemoquant diff` says of a case's exports, by their step's folder; kept while the same."""
    kept, listed = case.folder / "diff.json", case.folder / "diffed.json"
    names = [export.parent.name for export in exports]
    if not kept.exists() or not listed.exists() or json.loads(listed.read_text()) != names:
        outs = [str(case.folder / "named" / name) for name in names]
        shutil.rmtree(case.folder / "named", ignore_errors=True)
        (case.folder / "named").mkdir()
        for export, out in zip(exports, outs, strict=True):
            Path(out).symlink_to(export.resolve())
        options = ["--rows", str(ROWS), "--seq-len", str(LENGTH), "--no-card", "--json", str(kept)]
        run(
            [sys.executable, "-m", "nemoquant", "diff", str(case.source), *outs, *options],
            case.folder / "diff.log",
        )
        listed.write_text(json.dumps(names))
    report = json.loads(kept.read_text())
    return dict(zip(names, report["candidates"], strict=True))


def mean(values: np.ndarray) -> str:
    return f"{values.mean():.5f} +- {standard_error(values):.5f}"


def paired(result: dict[str, Any], ours: dict[str, Any], key: str) -> str:
    """The mean difference of KL over the same rows, relative to ours, with its standard error."""
    other, own = (np.array(of[key]["kl"]) for of in (result, ours))
    less = other - own
    return f"{less.mean() / own.mean():+.1%} +- {standard_error(less) / own.mean():.1%}"


def lines(case: Case, results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A Markdown table of a case, and below it what was refused."""
    yield f"\n`{case.model}_model`, `{case.preset}`:\n"
    more = f"over ours | rows {UNSEEN.start} to {UNSEEN.stop - 1}"
    yield f"| tool, method | KL | {more} | top-1 | perplexity | bits | processor time | peak memory |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    ours = results[f"{OURS}-{DEFAULT}"]
    done = {name: result for name, result in results.items() if "refused" not in result}
    for _name, result in sorted(done.items(), key=lambda item: float(np.mean(item[1]["rows"]["kl"]))):
        rows = {key: np.array(values) for key, values in result["rows"].items()}
        less, unseen = ("" if result is ours else paired(result, ours, key) for key in ("rows", "unseen"))
        yield (
            f"| {result['title']} | {mean(rows['kl'])} | {less} | {unseen} | {rows['top1'].mean():.2%} | "
            f"{np.exp(rows['nll'].mean()):.3f} | {result['bits']:.2f} | {result['cpu']:.0f} s | "
            f"{result['peak_tree']:.2f} GB |"
        )
    refused = [
        f"- {result['title']}: `{result['refused']}`" for result in results.values() if "refused" in result
    ]
    if refused:
        yield "\nRefused, in the tool's words:\n"
        yield from refused


def table(case: Case, tools: dict[str, str], without: list[str], again: bool) -> dict[str, dict[str, Any]]:
    formats = planned(case)
    references = {
        key: Reference(case.source, rows) for key, rows in (("rows", slice(0, ROWS)), ("unseen", UNSEEN))
    }
    results: dict[str, dict[str, Any]] = {}
    for tool, python in tools.items():
        title, methods = (
            ("nemoquant", tuple(VARIANTS)) if tool == OURS else (RIVALS[tool][0], RIVALS[tool][2])
        )
        for method in methods:
            if f"{tool}:{method}" in without:
                continue
            name = f"{tool}-{method.replace(':', '-')}"
            print(
                f"{time.strftime('%H:%M:%S')} {case.model} {case.preset} {name}", file=sys.stderr, flush=True
            )
            result = step(case, tool, method, python, again)
            for key, reference in references.items():
                if "refused" not in result:
                    rows = evaluated(case.folder / name, formats, reference)
                    result |= rows if "refused" in rows else {key: rows}
            results[name] = result | {"title": f"{title} `{method}`"}
    done = [name for name, result in results.items() if "refused" not in result]
    found = diffed(case, [case.folder / name / "out" for name in done])
    for name in done:
        said, own = found[name]["logits"]["kl"]["mean"], float(np.mean(results[name]["rows"]["kl"]))
        if abs(said - own) > 1e-3 * own:
            raise SystemExit(f"{name}: diff says a KL of {said}, its rows {own}; expected the same")
        results[name]["bits"] = found[name]["bits_per_quantized_weight"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for exports and results; goes on in it"
    )
    for tool in RIVALS:
        parser.add_argument(f"--{tool}", metavar="PYTHON")
    parser.add_argument("--models", nargs="+", choices=("demo", "nano"), default=("demo", "nano"))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--again", action="store_true", help="try once more what a tool refused")
    methods = {OURS: tuple(VARIANTS)} | {tool: RIVALS[tool][2] for tool in RIVALS}
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=[f"{tool}:{method}" for tool in methods for method in methods[tool] if method != DEFAULT],
        metavar="TOOL:METHOD",
        help="leave out, as autoround:signround",
    )
    args = parser.parse_args()
    tools = {OURS: sys.executable} | {tool: getattr(args, tool) for tool in RIVALS if getattr(args, tool)}
    everything: dict[str, Any] = {}
    text = [f"{machine()}, {time.strftime('%Y-%m-%d')}"]
    text += [f"{RIVALS[tool][0]}: no environment given" for tool in RIVALS if tool not in tools]
    for model in args.models:
        prepare(args.work, model)
        for preset in args.presets:
            case = Case(model, preset, args.work / model / preset)
            results = table(case, tools, args.without, args.again)
            everything[f"{model} {preset}"] = results
            text += lines(case, results)
    (args.work / "rivals.json").write_text(json.dumps(everything, indent=1))
    (args.work / "rivals.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()

"""The model card (README.md) of a quantized checkpoint: format, size, engines that load it, accuracy."""

from nemoquant._version import __version__
from nemoquant.layouts.modelopt import algorithm
from nemoquant.planning.plan import Plan, role_table
from nemoquant.units import size

# From the engines' sources and release notes, read in November 2026; none was run here.
LOADERS = {
    "FP8": [
        ("vLLM", "0.12.0", "GPUs with FP8: SM 89 (Ada) and later"),
        ("SGLang", "0.5.9", "SM 89 and later"),
        ("TensorRT-LLM", "1.3.0rc8", "SM 89 and later"),
    ],
    "NVFP4": [
        ("vLLM", "0.17.1", "W4A4 on Blackwell (SM 100, 103, 120, 121)"),
        ("SGLang", "0.5.9", "Blackwell"),
        ("TensorRT-LLM", "1.3.0rc8", "Blackwell"),
    ],
    "W4A16_NVFP4": [
        (
            "vLLM",
            "a release after May 2026 (its pull request #41769)",
            "SM 80 (Ampere) and later, by weight-only kernels",
        ),
    ],
    "MIXED_PRECISION": [
        ("vLLM", "0.17.1 (0.15.1 refuses it)", "NVFP4 experts want Blackwell; FP8 parts want SM 89 or later"),
        ("SGLang", "0.5.9", "Blackwell"),
        ("TensorRT-LLM", "1.3.0rc8", "Blackwell"),
    ],
}
NAMES = {
    "fp8": "FP8 (E4M3, one scale a tensor)",
    "nvfp4": "NVFP4 (E2M1, a scale for each 16 values)",
    "source": "as the source",
}


COST = "- Cost in accuracy: "  # start of the line that diff replaces


def with_cost(text: str, sentence: str) -> str | None:
    """A card's text with ``sentence`` as its line on accuracy; None where the text lacks that line."""
    lines = text.split("\n")
    places = [i for i, line in enumerate(lines) if line.startswith(COST)]
    if len(places) != 1:
        return None
    lines[places[0]] = COST + sentence
    return "\n".join(lines)


def algorithms(plan: Plan) -> tuple[str, ...]:
    """ModelOpt's names for the formats in the checkpoint; MIXED_PRECISION stands for several."""
    kinds = sorted({algorithm(row) for row in plan.quantized})
    return ("MIXED_PRECISION",) if len(kinds) > 1 else tuple(kinds)


def card(plan: Plan, calibration: str, warnings: list[str], copied: list[str]) -> str:
    """The card's text. ``calibration`` is one sentence on the origin of the activation scales."""
    per_weight, quantized = plan.bits_per_weight, plan.bits_per_quantized_weight
    kv = plan.kv_cache_bytes_per_token()
    lines = [
        "---",
        "tags: [nemotron_h, modelopt, " + ", ".join(sorted({row.format for row in plan.quantized})) + "]",
        "---",
        f"# Nemotron-H, quantized: {plan.recipe.name}",
        "",
        plan.recipe.summary,
        "",
        f"- Size: {size(plan.bytes_out)} of tensors, {size(plan.bytes_in)} before.",
        f"- Bits: {per_weight:.2f} a weight over the whole model"
        + (f", {quantized:.2f} a weight in quantized modules, scales included." if quantized else "."),
        f"- KV cache: {kv['planned']:,} bytes a token ({kv['source']:,} before).",
        f"- Calibration: {calibration}",
        f"{COST}not measured; `nemoquant diff` measures it. Measure it on your task before you use it.",
        "",
        "## Map",
        "",
        "| role | weights | GEMM inputs | tensors | bytes |",
        "|---|---|---|---:|---:|",
        *(
            f"| {role} | {weights} | {inputs} | {count:,} | {total:,} |"
            for role, weights, inputs, count, total in role_table(plan)
        ),
        "",
        *(
            f"- `{name}`: {text}"
            for name, text in NAMES.items()
            if any(row.format == name for row in plan.rows)
        ),
        "",
        "## What loads it",
        "",
        "ModelOpt unified layout. Versions are from the engines' sources and release notes; none was run on "
        "this checkpoint.",
        "`producer` in the config files says modelopt because engines look for that name; nemoquant wrote "
        "them.",
        "",
        "| engine | from version | hardware |",
        "|---|---|---|",
        *(
            f"| {engine} | {version} | {gpu} |"
            for kind in algorithms(plan)
            for engine, version, gpu in LOADERS[kind]
        ),
        "",
    ]
    if warnings:
        lines += ["## Warnings", "", *(f"- {warning}" for warning in warnings), ""]
    lines += [
        "## Provenance",
        "",
        f"Made by nemoquant {__version__}. `nemoquant.json` has the recipe, the plan's and every file's "
        f"sha256; `nemoquant verify` checks them.",
    ]
    if copied:
        lines += ["", "Copied from the source: " + ", ".join(f"`{name}`" for name in copied) + "."]
    return "\n".join(lines) + "\n"

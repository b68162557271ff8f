"""The model card (README.md) of a quantized checkpoint: format, size, engines that load it, accuracy."""

from nemoquant._version import __version__
from nemoquant.formats import FORMATS
from nemoquant.layouts.loaders import Loader, loaders
from nemoquant.planning.plan import Plan, role_table
from nemoquant.units import size
from nemoquant.words import in_markdown, markdown_code

NAMES = {name: number.title for name, number in FORMATS.items()} | {"source": "as the source"}


NOT_LOOKED_AT = Loader("any", "not known", "this mixture of formats was not looked at in their sources")
COST = "- Cost in accuracy: "  # start of the line that diff replaces


def with_cost(text: str, sentence: str) -> str | None:
    """A card's text with ``sentence`` as its line on accuracy; None where the text lacks that line."""
    lines = text.split("\n")
    places = [i for i, line in enumerate(lines) if line.startswith(COST)]
    if len(places) != 1:
        return None
    lines[places[0]] = COST + sentence
    return "\n".join(lines)


def card(plan: Plan, calibration: str, changes: list[str], warnings: list[str], copied: list[str]) -> str:
    """The card's text.

    Args:
        calibration: one sentence on the origin of the activation scales.
        changes: a sentence each on solved weights and folds.
    """
    per_weight, quantized = plan.bits_per_weight, plan.bits_per_quantized_weight
    kv = plan.kv_cache_bytes_per_token()
    lines = [
        "---",
        "tags: [nemotron_h, modelopt, " + ", ".join(sorted({row.format for row in plan.quantized})) + "]",
        "---",
        f"# Nemotron-H, quantized: {in_markdown(plan.recipe.name)}",
        "",
        in_markdown(plan.recipe.summary),
        "",
        f"- Size: {size(plan.bytes_out)} of tensors, {size(plan.bytes_in)} before.",
        f"- Bits: {per_weight:.2f} a weight over the whole model"
        + (f", {quantized:.2f} a weight in quantized modules, scales included." if quantized else "."),
        f"- KV cache: {kv['planned']:,} bytes a token ({kv['source']:,} before).",
        f"- Calibration: {calibration}",
        *(f"- {text}" for text in changes),
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
            f"| {loader.engine} | {loader.version or 'does not load it'} | {loader.hardware} |"
            for loader in loaders(plan) or [NOT_LOOKED_AT]
        ),
        "",
    ]
    if warnings:
        lines += ["## Warnings", "", *(f"- {in_markdown(warning)}" for warning in warnings), ""]
    lines += [
        "## Provenance",
        "",
        f"Made by nemoquant {__version__}. `nemoquant.json` has the recipe, the plan's and every file's "
        f"sha256; `nemoquant verify` checks them.",
    ]
    if copied:
        lines += ["", "Copied from the source: " + ", ".join(map(markdown_code, copied)) + "."]
    return "\n".join(lines) + "\n"

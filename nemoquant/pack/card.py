"""The model card (README.md) of a quantized checkpoint: format, size, engines that load it, accuracy."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from nemoquant._version import __version__
from nemoquant.formats import FORMATS
from nemoquant.layouts.engines import markdown_table, mixture, notes, proof
from nemoquant.layouts.serving import Chat, commands
from nemoquant.model.nested import TOWER
from nemoquant.pack.hub import head, source_id, source_name
from nemoquant.planning.plan import Plan
from nemoquant.planning.shown import LAYERS, formats, role_cells
from nemoquant.sources.hub import origin
from nemoquant.sources.source import Source
from nemoquant.tokens.template import template_source
from nemoquant.units import size
from nemoquant.words import in_markdown, markdown_code

NAMES = {name: number.title for name, number in FORMATS.items()} | {"source": "as the source"}


# For transformers, hubs show code that reads FP8 codes as if they were weights; vLLM loads the file as it is.
LIBRARY = "vllm"
COST = "- Cost in accuracy: "  # start of the line that diff replaces


def with_cost(text: str, sentence: str) -> str | None:
    """A card's text with ``sentence`` as its line on accuracy; None where the text lacks that line."""
    lines = text.split("\n")
    places = [i for i, line in enumerate(lines) if line.startswith(COST)]
    if len(places) != 1:
        return None
    lines[places[0]] = COST + sentence
    return "\n".join(lines)


class Told(NamedTuple):
    """What a run says of itself in its card.

    Attributes:
        calibration: one sentence on the origin of the activation scales.
        changes: a sentence each on solved weights and folds.
        warnings: a sentence each.
        copied: names of files of the source.
    """

    calibration: str
    changes: Sequence[str]
    warnings: Sequence[str]
    copied: Sequence[str]


def card(source: Source, plan: Plan, gpu: str | None, told: Told) -> str:
    """The card's text.

    Args:
        gpu: that the commands for serving are for; None is the first one that has the plan's formats.
    """
    per_weight, quantized = plan.bits_per_weight, plan.bits_per_quantized_weight
    kv, file = plan.kv_cache_bytes_per_token(), mixture(plan)
    origin = source.path, source.raw_config
    columns, cells = role_cells(plan.rows)
    tags = {"nemotron_h", "modelopt", "nemoquant", *(row.format for row in plan.quantized)}
    lines = [
        f"# {in_markdown(source_name(*origin))}, {_quantized(plan)}",
        "",
        plan.headline,
        "",
        f"- Source: {linked(*origin)}",
        f"- Recipe: {markdown_code(plan.recipe.name)}",
        f"- Size: {size(plan.bytes_out)} of tensors, {size(plan.bytes_in)} before.",
        f"- Bits: {per_weight:.2f} a weight over the whole model"
        + (f", {quantized:.2f} a weight in quantized modules, scales included." if quantized else "."),
        *_beside(plan),
        f"- KV cache: {kv['planned']:,} bytes a token ({kv['source']:,} before).",
        f"- Calibration: {told.calibration}",
        *(f"- {text}" for text in told.changes),
        f"{COST}not measured; `nemoquant diff` measures it. Measure it on your task before you use it.",
        "",
        "## Map",
        "",
        f"| {' | '.join(columns)} |",
        "|---|---|---|---:|---:|" + "---|" * ("layers" in columns),
        *(f"| {' | '.join(f'{c:,}' if isinstance(c, int) else c for c in row)} |" for row in cells),
        "",
        *([f"- {LAYERS}"] * ("layers" in columns)),
        *(
            f"- `{name}`: {text}"
            for name, text in NAMES.items()
            if any(row.format == name for row in plan.rows)
        ),
        "",
        "## What loads it",
        "",
        f"ModelOpt unified layout. {proof(file)}",
        "`producer` in the config files says modelopt because engines look for that name; nemoquant wrote "
        "them.",
        "",
        *markdown_table(file),
        "",
        *(f"- {line}" for line in notes(file)),
        "",
        "## Serve it",
        "",
        *_serving(plan, gpu, Chat.of(template_source(source.path))),
    ]
    lines += ending(
        "`nemoquant.json` has the recipe, the plan's and every file's", told.warnings, told.copied
    )
    return head(*origin, LIBRARY, tags) + "\n".join(lines) + "\n"


def _quantized(plan: Plan) -> str:
    """What was made, for the title: of formats that some weight has."""
    found = formats(plan.rows)
    return f"quantized to {found}" if found else "with a quantized KV cache"


def _beside(plan: Plan) -> Iterator[str]:
    """What stands beside the language model."""
    found = [row for row in plan.rows if row.role == TOWER]
    if found:
        names = ", ".join(
            markdown_code(f"{name}.*") for name in dict.fromkeys(r.name.split(".")[0] for r in found)
        )
        yield (
            f"- Beside the language model: {len(found):,} tensors ({names}), "
            f"{size(sum(row.bytes_out for row in found))}, copied as they are."
        )


def ending(has: str, warnings: Sequence[str], copied: Sequence[str]) -> Iterator[str]:
    """The last lines of a card; ``has``: which file beside it has whose sha256."""
    if warnings:
        yield from ("## Warnings", "", *(f"- {in_markdown(warning)}" for warning in warnings), "")
    yield from ("## Provenance", "")
    yield f"Made by nemoquant {__version__}. {has} sha256; `nemoquant verify` checks them."
    if copied:
        yield from ("", "Copied from the source: " + ", ".join(map(markdown_code, copied)) + ".")


def linked(folder: Path, raw_config: Mapping[str, Any]) -> str:
    """A source's name in Markdown, as a link where it is one of the hub."""
    name, snapshot = source_id(folder, raw_config), origin(folder)
    if snapshot is not None:
        page = f"https://huggingface.co/{snapshot.model}/tree/{quote(snapshot.commit)}"
        return f"[{snapshot.model}]({page}), revision {markdown_code(snapshot.commit)}"
    if name is not None:
        return f"[{name}](https://huggingface.co/{name})"
    return markdown_code(source_name(folder, raw_config))


def _serving(plan: Plan, gpu: str | None, chat: Chat) -> Iterator[str]:
    yield from ("Options were read in the engines' sources; vLLM's and SGLang's own parsers take them.", "")
    for serving in commands(plan, gpu, chat=chat):
        code = ("", "```", *serving.lines, "```") if serving.argv else ()
        yield from (serving.where + ":" * bool(code), *code, "")

"""The model card (README.md) of a converted checkpoint: what it is, from what, and what changed."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from nemoquant.checkpoint.converted import FILE
from nemoquant.converting import Target
from nemoquant.converting.result import Converted
from nemoquant.pack.card import ending, linked
from nemoquant.pack.hub import head
from nemoquant.quantized.checkpoint import PackedCheckpoint
from nemoquant.units import size
from nemoquant.words import in_markdown

LIBRARY = "transformers"
TITLES: Mapping[Target, str] = MappingProxyType(
    {
        "compressed-tensors": "Nemotron-H, quantized: FP8 in the compressed-tensors layout",
        "bf16": "Nemotron-H, decoded to bf16 from a quantized checkpoint",
    }
)
RELATIONS: Mapping[Target, str | None] = MappingProxyType({"compressed-tensors": "quantized", "bf16": None})
LOADS: Mapping[Target, str] = MappingProxyType(
    {
        "compressed-tensors": "transformers from 5.19 on, with the package compressed-tensors: experts are "
        "decoded to bf16 when they are loaded, in other modules inputs are rounded to FP8. vLLM and "
        "TensorRT-LLM are better served by the ModelOpt layout, and graphs are exported from that alone.",
        "bf16": "Whatever loads an unquantized Nemotron-H: transformers, fine-tuners, engines, `nemoquant "
        "quantize`.",
    }
)


def card(opened: PackedCheckpoint, result: Converted, copied: Sequence[str]) -> str:
    """The card's text.

    Args:
        opened: the checkpoint that was converted.
        copied: names of its files that were copied.
    """
    origin = opened.path, opened.raw_config
    lines = [
        f"# {TITLES[result.to]}",
        "",
        f"Converted from {linked(*origin)}, in the {result.layout} layout: {size(result.bytes_out)} of "
        f"tensors, {size(result.bytes_in)} before. Accuracy was not measured; `nemoquant diff` measures it.",
        "",
        "## What changed",
        "",
        *(f"- {in_markdown(note)}" for note in result.notes),
        "",
        "## What loads it",
        "",
        LOADS[result.to],
        "",
    ]
    lines += ending(f"`{FILE}` has every file's", result.warnings, copied)
    return head(*origin, LIBRARY, {"nemotron_h", result.to}, RELATIONS[result.to]) + "\n".join(lines) + "\n"

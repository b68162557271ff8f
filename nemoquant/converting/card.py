"""The model card (README.md) of a converted checkpoint: what it is, from what, and what changed."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from nemoquant._version import __version__
from nemoquant.checkpoint.converted import FILE
from nemoquant.converting import Target
from nemoquant.units import size
from nemoquant.words import in_markdown, markdown_code

TITLES: Mapping[Target, str] = MappingProxyType(
    {
        "compressed-tensors": "Nemotron-H, quantized: FP8 in the compressed-tensors layout",
        "bf16": "Nemotron-H, decoded to bf16 from a quantized checkpoint",
    }
)
LOADS: Mapping[Target, str] = MappingProxyType(
    {
        "compressed-tensors": "transformers from 5.19 on, with the package compressed-tensors: experts are "
        "decoded to bf16 when they are loaded, in other modules inputs are rounded to FP8. vLLM and "
        "TensorRT-LLM are better served by the ModelOpt layout, and graphs are exported from that alone.",
        "bf16": "Whatever loads an unquantized Nemotron-H: transformers, fine-tuners, engines, `nemoquant "
        "quantize`.",
    }
)


def card(
    to: Target,
    layout: str,
    sizes: tuple[int, int],
    notes: Sequence[str],
    warnings: Sequence[str],
    copied: Sequence[str],
) -> str:
    """The card's text.

    Args:
        layout: of the checkpoint that was converted.
        sizes: bytes of tensors, before and after.
    """
    lines = [
        "---",
        f"tags: [nemotron_h, {to}]",
        "---",
        f"# {TITLES[to]}",
        "",
        f"Converted from a checkpoint in the {layout} layout: {size(sizes[1])} of tensors, {size(sizes[0])} "
        "before. Accuracy was not measured; `nemoquant diff` measures it.",
        "",
        "## What changed",
        "",
        *(f"- {in_markdown(note)}" for note in notes),
        "",
        "## What loads it",
        "",
        LOADS[to],
        "",
    ]
    if warnings:
        lines += ["## Warnings", "", *(f"- {in_markdown(warning)}" for warning in warnings), ""]
    lines += [
        "## Provenance",
        "",
        f"Made by nemoquant {__version__}. `{FILE}` has every file's sha256; `nemoquant verify` checks them.",
    ]
    if copied:
        lines += ["", "Copied from the source: " + ", ".join(map(markdown_code, copied)) + "."]
    return "\n".join(lines) + "\n"

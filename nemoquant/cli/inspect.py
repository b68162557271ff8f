"""``nemoquant inspect``: describe a checkpoint or config."""

from collections.abc import Iterator
from typing import Any

import click

from nemoquant.cli.shared import MODEL, download_option, json_option, local, print_json, say, table, whole
from nemoquant.units import size


@click.command("inspect")
@click.argument("model", type=MODEL)
@click.option(
    "--context",
    type=whole(1),
    help="Tokens for the full-context figure; default: the config's maximum.",
)
@download_option
@json_option
def command(model: str, context: int | None, download: bool, as_json: bool) -> None:
    """Show layers, parameters, formats and cache sizes of MODEL, a checkpoint folder (quantized or not), a
    config.json, or a name on the hub, of which the config will do.

    \b
    Examples:
      nemoquant inspect MODEL
      nemoquant inspect config.json --context 1048576 --json
      nemoquant inspect nvidia/NAME --download                      the config alone is fetched
    """
    from nemoquant import api

    path = local(model, download=download, weights=False, quiet=as_json)
    summary = api.inspect(path, context=context)
    if as_json:
        print_json(summary)
        return
    layers, kv = summary["layers"], summary["kv_cache"]
    lines = [
        (
            "layers",
            f"{layers['total']}: "
            + ", ".join(f"{n} {kind}" for kind, n in layers["kinds"].items())
            + f"; MTP modules {layers['mtp_modules']}",
        ),
        ("pattern", layers["pattern"]),
        *(
            (
                f"{'' if number else 'own sizes'}",
                f"{field} " + ", ".join(f"{v} ({n} layers)" for v, n in counts.items()),
            )
            for number, (field, counts) in enumerate(layers["sizes"].items())
        ),
        ("parameters", f"{summary['parameters']:,} ({summary['parameters_without_mtp']:,} without MTP)"),
        ("active per token", f"{summary['active_parameters']:,}"),
        (
            "tensors",
            f"{summary['tensors']:,}, {summary['bytes']:,} bytes ({size(summary['bytes'])}), from "
            f"{summary['source']}",
        ),
        *_beside(summary["beside"]),
        ("quantization", summary["quantization"] or "none"),
        ("weights", ", ".join(f"{count:,} {name}" for name, count in summary["weights"].items())),
        (
            "KV cache",
            f"{kv['bytes_per_token']:,} B a token, {size(kv['bytes_at_context'])} at {kv['context']:,} "
            f"tokens",
        ),
        ("SSM state", f"{size(summary['ssm_state_bytes_per_sequence'])} a sequence"),
    ]
    for name, text in lines:
        say(f"{name:<18}{text}")
    table(
        [(k, v["tensors"], v["bytes"]) for k, v in summary["dtypes"].items()],
        ("stored as", "tensors", "bytes"),
        right="12",
    )
    for text in summary["warnings"]:
        say(f"warning: {text}", err=True)


def _beside(found: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Of a language model inside another: where it stands, and what is beside it."""
    if found is None:
        return
    yield "language model", f"in `{found['section']}`; layers and parameters are its own"
    if found["parts"]:
        named = ", ".join(f"{part} ({count:,})" for part, count in found["parts"].items())
        yield "beside it", f"{found['tensors']:,} tensors, {size(found['bytes'])}: {named}"

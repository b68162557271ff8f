"""``nemoquant export``: graphs and engines."""

import re
from pathlib import Path

import click

from nemoquant.bars import progress_bars
from nemoquant.cli.shared import (
    FILE,
    GIGABYTES,
    MODEL,
    PATH,
    download_option,
    json_option,
    local,
    print_json,
    say,
    whole,
)
from nemoquant.engine import TARGETS, TargetName
from nemoquant.errors import UsageError
from nemoquant.graph import COMPUTES, DIALECT_NAMES, Compute, DialectName
from nemoquant.units import size


@click.group("export")
def command() -> None:
    """Export a checkpoint as an ONNX graph over its packed bytes, or as a TensorRT engine.

    \b
    Examples:
      nemoquant export onnx OUT                                   OUT/model.onnx, for ONNX Runtime
      nemoquant export trt OUT model.engine --sm 120              a TensorRT-RTX engine, built without a GPU
    """


def parse_layers(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:  # noqa: ARG001
    """Parse ``A:B``."""
    if value is None:
        return None
    first, colon, end = value.partition(":")
    if not (colon and re.fullmatch("[0-9]{1,9}", first) and re.fullmatch("[0-9]{1,9}", end)):
        raise UsageError(f"--layers {value}: expected A:B, the first layer and the one behind the last")
    return int(first), int(end)


@command.command("onnx")
@click.argument("source", metavar="DIR", type=MODEL)
@click.argument("out", required=False, type=PATH)
@click.option(
    "--dialect",
    type=click.Choice(DIALECT_NAMES),
    default="onnxruntime",
    show_default=True,
    help="Runtime that it is for.",
)
@click.option(
    "--compute",
    type=click.Choice(COMPUTES),
    help="Dtype of activations; default: float32, bfloat16 for TensorRT.",
)
@click.option("--last-token-only", is_flag=True, help="Logits of the last position only.")
@click.option(
    "--layers",
    metavar="A:B",
    callback=parse_layers,
    help="Only layers A to B - 1, with hidden states in or out.",
)
@click.option("--mtp", is_flag=True, help="Also mtp.onnx, the multi-token-prediction module.")
@click.option("--no-copy", is_flag=True, help="Refuse where tensors would have to be copied.")
@download_option
@json_option
def export_onnx(
    source: str,
    out: Path | None,
    dialect: DialectName,
    compute: Compute | None,
    last_token_only: bool,
    layers: tuple[int, int] | None,
    mtp: bool,
    no_copy: bool,
    download: bool,
    as_json: bool,
) -> None:
    """Write DIR/model.onnx beside the shards of DIR, which it points into: no weight is copied.

    With OUT, the checkpoint is copied into that new folder, and the graph stands there. That is needed where
    the shards are links, or where experts do not lie back to back, as in published checkpoints, and where DIR
    is a name on the hub. ONNX Runtime loads the graph once before it is written, where it is installed and
    runs the dialect; else a warning says so.

    \b
    Examples:
      nemoquant export onnx OUT
      nemoquant export onnx MODEL MODEL-onnx --compute float16
      nemoquant export onnx nvidia/NAME-FP8 NAME-onnx --download
      nemoquant export onnx OUT --layers 3:4
    """
    from nemoquant import api

    path = local(source, download=download, quiet=as_json)
    with progress_bars(as_json) as progress:
        exported = api.export_onnx(
            path,
            out,
            dialect=dialect,
            compute=compute,
            last_token_only=last_token_only,
            layers=layers,
            mtp=mtp,
            copy=not no_copy,
            progress=progress,
            say=lambda text: None if as_json else say(text, err=True),
        )
    figures = {
        "folder": str(exported.folder),
        "graphs": {path.name: path.stat().st_size for path in exported.graphs},
        "dialect": dialect,
        "copied_bytes": exported.copied_bytes,
        "functions": exported.functions,
        "nodes": exported.nodes,
        "loaded_by": exported.loaded_by,
        "warnings": list(exported.warnings),
    }
    if as_json:
        print_json(figures)
        return
    for warning in exported.warnings:
        say(f"warning: {warning}", err=True)
    for graph in exported.graphs:
        say(f"{graph}: {size(graph.stat().st_size)}, {dialect} dialect")
    say(f"{exported.nodes:,} nodes, {len(exported.functions)} functions: {', '.join(exported.functions)}")
    say(
        f"{size(exported.copied_bytes)} of tensors copied"
        if exported.copied_bytes
        else "no tensor copied: weights stay in the shards"
    )
    if exported.loaded_by is not None:
        say(f"loaded by {exported.loaded_by} before it was written")


@command.command("trt")
@click.argument("source", metavar="DIR", type=MODEL)
@click.argument("out", type=FILE)
@click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    help="rtx: TensorRT-RTX, which builds without a GPU; trt: TensorRT, on the GPU itself. Default: rtx "
    "where no GPU is found.",
)
@click.option(
    "--sm",
    type=whole(1, 9999),
    help="GPU to build for, as 120 for SM 12.0; default: the one in this machine.",
)
@click.option(
    "--compute",
    type=click.Choice(COMPUTES),
    default="bfloat16",
    show_default=True,
    help="Dtype of activations.",
)
@click.option(
    "--max-seq-len",
    type=whole(2),
    default=4096,
    show_default=True,
    help="Most positions of a sequence.",
)
@click.option("--max-batch", type=whole(1), default=1, show_default=True, help="Most sequences at once.")
@click.option(
    "--workspace",
    type=GIGABYTES,
    help="Scratch memory in GB; default: the builder's own choice.",
)
@click.option("--last-token-only", is_flag=True, help="Logits of the last position only.")
@click.option(
    "--mtp",
    is_flag=True,
    help="Also an engine of the multi-token-prediction module: model.mtp.engine beside model.engine.",
)
@click.option(
    "--strip-weights",
    is_flag=True,
    help="Leave the weights out of the file; they come from the shards when it is loaded.",
)
@click.option(
    "--weight-streaming",
    is_flag=True,
    help="Let weights stay in host memory, for models larger than the GPU's (trt).",
)
@click.option(
    "--timing-cache",
    type=FILE,
    metavar="FILE",
    help="Measured tactics, read if it exists and written after (trt).",
)
@click.option(
    "--plugins",
    type=FILE,
    metavar="FILE",
    help="Plugin library (trt); default: where `nemoquant plugins build` puts it.",
)
@download_option
@json_option
def export_trt(
    source: str,
    out: Path,
    target: TargetName | None,
    sm: int | None,
    compute: Compute,
    max_seq_len: int,
    max_batch: int,
    workspace: float | None,
    last_token_only: bool,
    mtp: bool,
    strip_weights: bool,
    weight_streaming: bool,
    timing_cache: Path | None,
    plugins: Path | None,
    download: bool,
    as_json: bool,
) -> None:
    """Build a TensorRT engine of the checkpoint in DIR, or with that name on the hub, into the file OUT, with
    OUT.json beside it.

    TensorRT-RTX needs no GPU to build. The network is strongly typed: what can't have its precision fails,
    nothing falls back.

    \b
    Examples:
      nemoquant export trt OUT model.engine --sm 120
      nemoquant export trt OUT model.engine --sm 89 --compute float16 --max-seq-len 8192
      nemoquant export trt OUT model.engine --target trt --timing-cache tactics.cache
    """
    from nemoquant import api

    path = local(source, download=download, quiet=as_json)
    with progress_bars(as_json) as progress:
        facts = api.export_engine(
            path,
            out,
            target=target,
            sm=sm,
            compute=compute,
            max_seq_len=max_seq_len,
            max_batch=max_batch,
            workspace=int(workspace * 1e9) if workspace else None,
            last_token_only=last_token_only,
            mtp=mtp,
            strip_weights=strip_weights,
            weight_streaming=weight_streaming,
            timing_cache=timing_cache,
            plugins=plugins,
            progress=progress,
            say=lambda text: None if as_json else say(text, err=True),
        )
    if as_json:
        print_json(facts)
        return
    types = ", ".join(f"{count:,} {name}" for name, count in facts["layers_by_output_type"].items())
    say(
        f"{out}: {facts['runtime']} {facts['version']}, {size(facts['bytes'])}, SM {facts['sm']}, "
        f"{facts['layers']:,} layers, built in "
        f"{facts['build_seconds']} s"
    )
    say(f"layers by the type that they put out: {types}")
    if facts["warnings"]:
        say(f"{len(facts['warnings'])} warnings of the builder are in {out.name}.json", err=True)

"""``nemoquant convert``: a quantized checkpoint for other programs."""

import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import click

from nemoquant.bars import progress_bars
from nemoquant.cli.shared import MODEL, PATH, download_option, json_option, local, print_json, say
from nemoquant.converting import TARGETS, Target
from nemoquant.units import duration, size


@click.command("convert")
@click.argument("source", metavar="DIR", type=MODEL)
@click.argument("out", type=PATH)
@click.option(
    "--to",
    type=click.Choice(TARGETS),
    required=True,
    help="compressed-tensors: FP8 for transformers, the same codes; bf16: every weight decoded.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")
@download_option
@json_option
def command(source: str, out: Path, to: Target, dry_run: bool, download: bool, as_json: bool) -> None:
    """Write the quantized checkpoint in DIR, or with that name on the hub, into the new folder OUT, for
    programs that can't read it.

    Nothing is calibrated or encoded again; what changes in the numbers is said, and stands in the model card.

    \b
    Examples:
      nemoquant convert DIR OUT --to compressed-tensors
      nemoquant convert DIR OUT --to bf16
      nemoquant convert nvidia/NAME-FP8 OUT --to bf16 --download
    """
    from nemoquant import api
    from nemoquant.checkpoint.making import ended

    began = time.monotonic()
    path = local(source, download=download, quiet=as_json)
    with ExitStack() as end:
        with progress_bars(as_json) as progress:
            result = api.convert(
                path, out, to, dry_run=dry_run, progress=progress, say=lambda text: say(text, err=True)
            )
            if not dry_run:
                end.enter_context(ended(out))
        if as_json:
            seconds = round(time.monotonic() - began, 3)
            figures = asdict(result) | {"out": str(out), "dry_run": dry_run, "seconds": seconds}
            figures["skipped_side_files"] = figures.pop("skipped_files")
            print_json(figures)
            return
        for warning in result.warnings:
            say(f"warning: {warning}", err=True)
        if result.skipped_files:
            say(f"not copied: {', '.join(result.skipped_files)} (not part of what is written)", err=True)
        for note in result.notes:
            say(note)
        sizes = f"{size(result.bytes_in)} -> {size(result.bytes_out)} of tensors"
        if dry_run:
            say(f"dry run: {result.tensors:,} tensors would be written to {out}; {sizes}")
        else:
            took = duration(time.monotonic() - began)
            say(f"{out}: {to}, {sizes}, verified, {took}")

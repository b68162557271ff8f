"""``nemoquant verify``: check a quantized checkpoint."""

import sys
from pathlib import Path

import click

from nemoquant.bars import progress_bars
from nemoquant.cli.shared import PATH, json_option, print_json, say


@click.command("verify")
@click.argument("out", type=PATH)
@click.option(
    "--against",
    type=PATH,
    metavar="SRC",
    help="The source: compare and encode its weights again.",
)
@json_option
def command(out: Path, against: Path | None, as_json: bool) -> None:
    """Check that OUT is what its manifest and plan say: hashes, tensors, scales, config files. Exit code 1 if
    it is not. A folder without a manifest, converted or of another tool, is checked as far as that goes
    without a plan.

    \b
    Examples:
      nemoquant verify OUT
      nemoquant verify OUT --against MODEL
    """
    from nemoquant import api

    with progress_bars(as_json) as progress:
        report = api.verify(out, against, progress=progress)
    if as_json:
        print_json(report)
    else:
        for warning in report["warnings"]:
            say(f"warning: {warning}", err=True)
        for problem in report["problems"]:
            say(f"problem: {problem}", err=True)
        checked = ", ".join(
            f"{count:,} {name.replace('_', ' ')}" for name, count in report["checked"].items() if count
        )
        say(f"{out}: {'ok' if report['ok'] else 'FAILED'} ({checked})")
    if not report["ok"]:
        sys.exit(1)

"""``nemoquant verify``: check a quantized checkpoint."""

import sys

import click

from nemoquant.bars import progress_bars
from nemoquant.cli.shared import MODEL, download_option, json_option, local, print_json, say


@click.command("verify")
@click.argument("out", type=MODEL)
@click.option(
    "--against",
    type=MODEL,
    metavar="SRC",
    help="The source: compare and encode its weights again.",
)
@download_option
@json_option
def command(out: str, against: str | None, download: bool, as_json: bool) -> None:
    """Check that OUT is what its manifest and plan say: hashes, tensors, scales, config files. Exit code 1 if
    it is not. A folder without a manifest, converted or of another tool, is checked as far as that goes
    without a plan. Both OUT and SRC may be names on the hub.

    \b
    Examples:
      nemoquant verify OUT
      nemoquant verify OUT --against MODEL
      nemoquant verify OUT --against nvidia/NAME
    """
    from nemoquant import api

    folder = local(out, download=download, quiet=as_json)
    source = None if against is None else local(against, download=download, quiet=as_json)
    with progress_bars(as_json) as progress:
        report = api.verify(folder, source, progress=progress)
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
        say(f"{out}: {'ok' if report['ok'] else 'FAILED'}" + f" ({checked})" * bool(checked))
    if not report["ok"]:
        sys.exit(1)

"""``nemoquant demo``: the whole toolchain in one command."""

import time
from pathlib import Path

import click

from nemoquant.bars import progress_bars
from nemoquant.cli.shared import PATH, say, show, whole


@click.command("demo")
@click.option(
    "--out",
    type=PATH,
    default=Path("nemoquant-demo"),
    show_default=True,
    help="New folder for all that is made.",
)
@click.option(
    "--rows",
    type=whole(1),
    default=32,
    show_default=True,
    help="Rows of 512 tokens to calibrate and compare on.",
)
def command(out: Path, rows: int) -> None:
    """Quantize the small trained model that comes with nemoquant with every preset, verify, and compare all
    with bf16.

    Takes one to two minutes on two cores, needs no GPU and no download.

    \b
    Examples:
      nemoquant demo
      nemoquant demo --out /tmp/demo --rows 8
    """
    from nemoquant.demo import REPORTS, demo
    from nemoquant.evaluate.report.markdown import table, warning
    from nemoquant.shipped import demo_model

    began = time.monotonic()
    say(f"source: {demo_model()}", err=True)
    with progress_bars(False) as progress:
        report = demo(out, rows=rows, say=lambda text: say(text, err=True), progress=progress)
    show("\n".join(table(report)) + "\n\n")
    for found in report.all_warnings():
        say(f"warning: {warning(*found)}", err=True)
    say(f"{out / REPORTS['html']}: open it in a browser. All of it took {time.monotonic() - began:.0f} s.")

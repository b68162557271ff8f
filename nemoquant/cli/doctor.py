"""``nemoquant doctor``: which engines can run on this machine."""

import click

from nemoquant.cli.shared import json_option, print_json, table


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Show which engines can be built and run on this machine, and why the others can't.

    \b
    Examples:
      nemoquant doctor
      nemoquant doctor --json
    """
    from dataclasses import asdict

    from nemoquant.engine.doctor import doctor

    findings = doctor()
    if as_json:
        print_json([asdict(finding) for finding in findings])
        return
    words = {True: "yes", False: "no"}
    table(
        [(f.name, words[f.builds], words[f.runs], f.why) for f in findings],
        ("engine", "builds", "runs", "why"),
    )

"""``nemoquant plan``: what a recipe would do."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemoquant.cli.shared import (
    PATH,
    THREADS,
    json_option,
    memory_option,
    method_options,
    no_scale_groups_option,
    print_json,
    recipe_name,
    recipe_options,
    run_option,
    say,
    table,
    whole,
)
from nemoquant.formats import DEVICES
from nemoquant.run.options import RunOptions
from nemoquant.units import size

if TYPE_CHECKING:
    from nemoquant.planning.plan import Plan


@click.command("plan")
@click.argument("model", type=PATH)
@recipe_options
@method_options
@no_scale_groups_option
@click.option(
    "--estimate",
    is_flag=True,
    help="Also measure this machine shortly, and say what quantize would need: memory, disk, time.",
)
@run_option("rows", type=whole(1), show_default=True, help="Calibration rows, for --estimate.")
@run_option("seq_len", type=whole(1), show_default=True, help="Tokens in a row, for --estimate.")
@run_option(
    "threads",
    type=THREADS,
    help="Threads, for --estimate; default: all that this process may use.",
)
@run_option(
    "device",
    type=click.Choice(DEVICES),
    show_default=True,
    help="Where it would compute, for --estimate.",
)
@click.option(
    "--out",
    type=PATH,
    default=".",
    help="Folder on the disk that would be written, for --estimate.",
)
@memory_option
@json_option
def command(
    model: Path, fmt: str | None, recipe: str | None, estimate: bool, out: Path, as_json: bool, **given: Any
) -> None:
    """Show what a recipe does with MODEL, a checkpoint folder or a bare config.json, from headers alone.

    \b
    Examples:
      nemoquant plan MODEL --fmt nvfp4
      nemoquant plan config.json --recipe fp8-published --json
      nemoquant plan MODEL --fmt nvfp4 --estimate --memory 4G       and what it would take here
    """
    from nemoquant import api
    from nemoquant.layouts.loaders import cautions, loaders
    from nemoquant.planning.plan import ROLE_HEADER, method_warnings, role_table

    name = recipe_name(fmt, recipe)
    options = RunOptions(**given)
    resolved = api.plan(
        model,
        name,
        scale_groups=options.scale_groups,
        method=options.method,
        folds=options.folds,
        descent=options.descent,
    )
    expected = api.estimate(model, name, options, out=out) if estimate else None
    if as_json:
        data = resolved.to_json() | {"loaders": [loader._asdict() for loader in loaders(resolved)]}
        data["cautions"] = [*method_warnings(resolved, options.method), *cautions(resolved)]
        print_json(data | ({"estimate": expected.to_json()} if expected else {}))
        return
    say(f"{resolved.recipe.name}: {resolved.recipe.summary}")
    table(role_table(resolved), ROLE_HEADER, right="34")
    figures = resolved.summary()
    kv, ssm = figures["kv_cache_bytes_per_token"], figures["ssm_state_bytes_per_sequence"]
    quantized = figures["bits_per_quantized_weight"]
    lines = [
        ("tensors", f"{figures['tensors_in']:,} in, {figures['tensors_out']:,} out"),
        (
            "bytes",
            f"{figures['bytes_in']:,} in, {figures['bytes_out']:,} out ({size(figures['bytes_out'])}, "
            f"{figures['compression']:.2f} times smaller)",
        ),
        ("bits per weight", f"{figures['bits_per_weight']:.3f}"),
        ("in quantized modules", "none are quantized" if quantized is None else f"{quantized:.3f}"),
        ("KV cache per token", f"{kv['source']:,} B as the source, {kv['planned']:,} B planned"),
        ("SSM state per sequence", f"{size(ssm['planned'])} ({resolved.config.mamba_ssm_cache_dtype})"),
        ("calibration", _calibration(resolved)),
    ]
    for name, text in lines:
        say(f"{name:<24}{text}")
    loading = [
        f"not {loader.engine}: {loader.hardware}"
        if loader.version is None
        else f"{loader.engine} {loader.version}: {loader.hardware}"
        for loader in loaders(resolved)
    ]
    for number, text in enumerate(loading or ["not known: nobody has looked at this mixture of formats"]):
        say(f"{'' if number else 'loaded by':<24}{text}")
    if expected:
        from nemoquant.run.estimate import expectation

        say(f"{'on this machine':<24}{expectation(expected)}")
    for name in resolved.unused_formats:
        say(
            f"warning: no tensor of this model got the format {name}: it lacks the roles that the recipe "
            f"names",
            err=True,
        )
    for text in [*method_warnings(resolved, options.method), *cautions(resolved)]:
        say(f"warning: {text}", err=True)
    if resolved.assumed:
        say("dtypes of the source are assumed from the config: bf16, the router's correction bias fp32")


def _calibration(resolved: "Plan") -> str:
    """What calibration is needed for."""
    needed = [
        ("codes that are solved for", any(row.solved for row in resolved.quantized)),
        (f"folds ({', '.join(resolved.recipe.folds)})", bool(resolved.recipe.folds)),
        ("activation scales", bool(resolved.kv_layers) or any(row.calibrated for row in resolved.rows)),
    ]
    return (
        "needed for " + ", ".join(what for what, is_needed in needed if is_needed)
        if (resolved.needs_calibration)
        else "not needed"
    )

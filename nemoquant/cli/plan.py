"""``nemoquant plan``: what a recipe would do."""

from pathlib import Path

import click

from nemoquant.cli.shared import json_option, print_json, recipe_name, recipe_options, table
from nemoquant.units import size


@click.command("plan")
@click.argument("model", type=click.Path(path_type=Path))
@recipe_options
@click.option("--no-scale-groups", is_flag=True, help="Give every tensor its own scales, as other tools do; for comparisons.")
@json_option
def command(model: Path, fmt: str | None, recipe: str | None, no_scale_groups: bool, as_json: bool) -> None:
    """Show what a recipe does with MODEL, a checkpoint folder or a bare config.json, from headers alone.

    \b
    Examples:
      nemoquant plan MODEL --fmt nvfp4
      nemoquant plan config.json --recipe fp8-published --json
    """
    from nemoquant import api
    from nemoquant.pack.card import role_table

    made = api.plan(model, recipe_name(fmt, recipe), scale_groups=not no_scale_groups)
    if as_json:
        print_json(made.to_json())
        return
    click.echo(f"{made.recipe.name}: {made.recipe.summary}")
    table(role_table(made), ("role", "weights", "GEMM inputs", "tensors", "bytes"), right="34")
    figures = made.summary()
    kv, ssm = figures["kv_cache_bytes_per_token"], figures["ssm_state_bytes_per_sequence"]
    quantized = figures["bits_per_quantized_weight"]
    lines = [
        ("tensors", f"{figures['tensors_in']:,} in, {figures['tensors_out']:,} out"),
        (
            "bytes",
            f"{figures['bytes_in']:,} in, {figures['bytes_out']:,} out ({size(figures['bytes_out'])}, {figures['compression']:.2f} times smaller)",
        ),
        ("bits per weight", f"{figures['bits_per_weight']:.3f}"),
        ("in quantized modules", "none are quantized" if quantized is None else f"{quantized:.3f}"),
        ("KV cache per token", f"{kv['source']:,} B as the source, {kv['planned']:,} B planned"),
        ("SSM state per sequence", f"{size(ssm['planned'])} ({made.config.mamba_ssm_cache_dtype})"),
        ("calibration", "needed for activation scales" if made.needs_calibration else "not needed"),
    ]
    for name, text in lines:
        click.echo(f"{name:<24}{text}")
    for name in made.unused_formats:
        click.echo(f"warning: no tensor of this model got the format {name}: it lacks the roles that the recipe names", err=True)
    if made.assumed:
        click.echo("dtypes of the source are assumed from the config: bf16, the router's correction bias fp32")

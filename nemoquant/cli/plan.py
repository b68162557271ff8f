"""``nemoquant plan``: what a recipe would do."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemoquant.cli.shared import (
    MODEL,
    PATH,
    THREADS,
    download_option,
    gpu_option,
    json_option,
    local,
    memory_option,
    method_options,
    no_scale_groups_option,
    print_json,
    recipe_name,
    recipe_options,
    run_option,
    say,
    say_serving,
    table,
    whole,
)
from nemoquant.formats import DEVICES
from nemoquant.layouts import ENGINES, RIGHT
from nemoquant.layouts.gpus import GPUS, SMS
from nemoquant.run.options import RunOptions
from nemoquant.units import size

if TYPE_CHECKING:
    from nemoquant.layouts.engines import Mixture


@click.command("plan")
@click.argument("model", type=MODEL)
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
@click.option(
    "--for",
    "engine",
    type=click.Choice(list(ENGINES)),
    help="Show this engine alone, with its command; exit code 1 if it can't run the output on --gpu, or any.",
)
@gpu_option
@download_option
@json_option
def command(
    model: str,
    fmt: str | None,
    recipe: str | None,
    estimate: bool,
    out: Path,
    engine: str | None,
    download: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Show what a recipe does with MODEL, a checkpoint folder, a bare config.json or a name on the hub, from
    headers alone, or from the config.

    \b
    Examples:
      nemoquant plan MODEL --fmt nvfp4
      nemoquant plan config.json --recipe fp8-published --json
      nemoquant plan nvidia/NAME --fmt nvfp4 --download             the config alone is fetched
      nemoquant plan MODEL --fmt nvfp4 --estimate --memory 4G       and what it would take here
      nemoquant plan MODEL --fmt nvfp4 --for sglang --gpu h100      whether SGLang runs it there, and how
    """
    from nemoquant import api
    from nemoquant.layouts.engines import READERS, cautions, header, mixture, notes, proof
    from nemoquant.layouts.engines import table as engine_table
    from nemoquant.layouts.serving import NEMOTRON_3, Chat, commands
    from nemoquant.planning.plan import method_warnings
    from nemoquant.planning.shown import LAYERS, role_cells
    from nemoquant.tokens.template import template_source

    name = recipe_name(fmt, recipe)
    options = RunOptions(**given)
    engines = [ENGINES[engine]] if engine else list(ENGINES.values())
    path = local(model, download=download, weights=estimate, quiet=as_json)
    resolved = api.plan(
        path,
        name,
        scale_groups=options.scale_groups,
        **options.overrides._asdict(),
    )
    expected = api.estimate(path, name, options, out=out) if estimate else None
    file = mixture(resolved)
    chat = Chat.of(template_source(path)) if path.is_dir() else NEMOTRON_3
    serving = [c for c in commands(resolved, options.gpu, "OUT", chat) if c.engine in engines]
    if as_json:
        data = resolved.to_json() | {"engines": {name: _by_sm(file, name) for name in engines}}
        data["warnings"] = list(resolved.warnings)
        data["cautions"] = [
            *method_warnings(resolved, options.overrides),
            *cautions(resolved),
        ]
        data["serving"] = [command.to_json() for command in serving]
        print_json(data | ({"estimate": expected.to_json()} if expected else {}))
        _check_runs(resolved.recipe.name, file, engines if engine else [], options.gpu)
        return
    say(f"{resolved.recipe.name}: {resolved.headline}")
    columns, cells = role_cells(resolved.rows)
    table(cells, columns, right="34")
    if "layers" in columns:
        say(LAYERS)
    figures = resolved.summary()
    kv, ssm = figures["kv_cache_bytes_per_token"], figures["ssm_state_bytes_per_sequence"]
    quantized = figures["bits_per_quantized_weight"]
    needed = resolved.calibrated_for
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
        ("calibration", f"needed for {needed}" if needed else "not needed"),
    ]
    for name, text in lines:
        say(f"{name:<24}{text}")
    table(engine_table(file, engines), header(engines))
    say(proof(file))
    for text in notes(file, engines if engine else (*engines, *READERS)):
        say(f"- {text}")
    if engine or options.gpu:
        say_serving(serving)
    if expected:
        from nemoquant.run.estimate import expectation

        say(f"{'on this machine':<24}{expectation(expected)}")
    for text in resolved.warnings:
        say(f"warning: {text}", err=True)
    for name in resolved.unused_formats:
        say(
            f"warning: no tensor of this model got the format {name}: it lacks the roles that the recipe "
            f"names",
            err=True,
        )
    for text in [
        *method_warnings(resolved, options.overrides),
        *cautions(resolved),
    ]:
        say(f"warning: {text}", err=True)
    if resolved.assumed:
        say("dtypes of the source are assumed from the config: bf16, the router's correction bias fp32")
    _check_runs(resolved.recipe.name, file, engines if engine else [], options.gpu)


def _by_sm(file: "Mixture", engine: str) -> dict[str, Any]:
    """What an engine does by compute capability, as JSON data."""
    from nemoquant.layouts.engines import outcome

    return {str(sm): outcome(file, engine, sm)._asdict() for sm in SMS}


def _check_runs(recipe: str, file: "Mixture", engines: list[str], gpu: str | None) -> None:
    """Ends with exit code 1 where an engine that was asked for can't run the output on a GPU, or any."""
    from nemoquant.layouts.engines import outcome, why_not

    for engine in engines:
        sms = [GPUS[gpu].sm] if gpu else SMS
        if all(outcome(file, engine, sm).runs not in RIGHT for sm in sms):
            where = GPUS[gpu].title if gpu else "any GPU"
            say(f"{engine} does not run {recipe} on {where}: {why_not(file, engine, sms[-1])}", err=True)
            sys.exit(1)

"""``nemoquant generate``: text from a checkpoint."""

from pathlib import Path

import click

from nemoquant.arguments import HOTTEST, MOST_SEED
from nemoquant.cli.shared import FILE, MODEL, THREADS, Number, download_option, local, say, show, whole
from nemoquant.engine import ENGINES, EngineName


@click.command("generate")
@click.argument("model", metavar="DIR", type=MODEL)
@click.option("--prompt", required=True, help="Text to go on from.")
@click.option(
    "--chat", is_flag=True, help="The prompt is what a user says: put it through the chat template."
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="torch",
    show_default=True,
    help="What runs it.",
)
@click.option(
    "--engine-file",
    type=FILE,
    metavar="FILE",
    help="What `nemoquant export trt` wrote, for --engine rtx or trt.",
)
@click.option(
    "--plugins",
    type=FILE,
    metavar="FILE",
    help="Plugin library for --engine trt.",
)
@click.option("--max-tokens", type=whole(1), default=64, show_default=True, help="Most tokens to generate.")
@click.option(
    "--temperature",
    type=Number(0, HOTTEST),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token.",
)
@click.option(
    "--seed", type=whole(0, MOST_SEED), default=0, show_default=True, help="Of the choice with a temperature."
)
@click.option(
    "--mtp",
    type=whole(1),
    help="Draft so many tokens at a time with the multi-token-prediction module.",
)
@click.option("--threads", type=THREADS, help="Threads; default: all that this process may use.")
@download_option
def command(
    model: str,
    prompt: str,
    chat: bool,
    engine: EngineName,
    engine_file: Path | None,
    plugins: Path | None,
    max_tokens: int,
    temperature: float,
    seed: int,
    mtp: int | None,
    threads: int | None,
    download: bool,
) -> None:
    """Generate text with the checkpoint in DIR, quantized or not, or a name on the hub. Stops at the model's
    end-of-sequence tokens.

    \b
    Examples:
      nemoquant generate OUT --prompt "It is a truth universally acknowledged"
      nemoquant generate OUT --prompt "Once" --engine onnxruntime --temperature 0.8 --seed 1
      nemoquant generate OUT --prompt "In the beginning" --mtp 2
      nemoquant generate OUT --prompt "Once" --engine rtx --engine-file model.engine
      nemoquant generate nvidia/NAME --prompt "Once" --download
    """
    from nemoquant import api

    path, begun = local(model, download=download), False

    def shown(text: str) -> None:
        nonlocal begun
        begun = True
        show(text)

    try:
        made = api.generate(
            path,
            prompt,
            chat=chat,
            engine=engine,
            engine_file=engine_file,
            plugins=plugins,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            mtp=mtp or 0,
            threads=threads,
            ready=lambda: shown(prompt),
            stream=shown,
            say=lambda text: say(text, err=True),
        )
    finally:
        if begun:
            say("")  # an error stands on a line of its own
    for warning in made.warnings:
        say(f"warning: {warning}", err=True)
    say(made.summary(), err=True)

"""``nemoquant generate``: text from a checkpoint."""

import time
from pathlib import Path

import click


@click.command("generate")
@click.argument("model", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to go on from.")
@click.option(
    "--chat", is_flag=True, help="The prompt is what a user says: put it through the chat template."
)
@click.option(
    "--engine",
    type=click.Choice(["torch", "onnxruntime", "rtx", "trt"]),
    default="torch",
    show_default=True,
    help="What runs it.",
)
@click.option(
    "--engine-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="What `nemoquant export trt` wrote, for --engine rtx or trt.",
)
@click.option(
    "--plugins",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Plugin library for --engine trt.",
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Most tokens to generate."
)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice with a temperature.")
@click.option(
    "--mtp",
    type=click.IntRange(min=1),
    help="Draft so many tokens at a time with the multi-token-prediction module.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads; default: all that this process may use."
)
def command(
    model: Path,
    prompt: str,
    chat: bool,
    engine: str,
    engine_file: Path | None,
    plugins: Path | None,
    max_tokens: int,
    temperature: float,
    seed: int,
    mtp: int | None,
    threads: int | None,
) -> None:
    """Generate text with the checkpoint in DIR, quantized or not. Stops at the model's end-of-sequence
    tokens.

    \b
    Examples:
      nemoquant generate OUT --prompt "It is a truth universally acknowledged"
      nemoquant generate OUT --prompt "Once" --engine onnxruntime --temperature 0.8 --seed 1
      nemoquant generate OUT --prompt "In the beginning" --mtp 2
      nemoquant generate OUT --prompt "Once" --engine rtx --engine-file model.engine
    """
    from nemoquant.engine.generate import Drafts, Sampler, generate, stop_tokens
    from nemoquant.engine.load import load_engine
    from nemoquant.model.parse import load_config
    from nemoquant.tokens.codec import TextCodec

    config, _ = load_config(model)
    sampler, codec = Sampler(temperature, seed), TextCodec(model)
    ids = codec.chat(prompt) if chat else codec.encode(prompt)
    loaded = load_engine(engine, model, threads, engine_file, plugins)
    drafts = Drafts()
    began, count, shown = time.monotonic(), 0, ""
    tokens: list[int] = []
    click.echo(prompt, nl=False)
    for token in generate(
        loaded,
        ids,
        max_tokens=max_tokens,
        stop=stop_tokens(model, config),
        sampler=sampler,
        mtp=mtp or 0,
        drafts=drafts,
    ):
        tokens.append(token)
        text = codec.decode(ids + tokens)[len(codec.decode(ids)) :]
        if not text.endswith("\ufffd"):  # a character of several tokens is shown when it is complete
            click.echo(text[len(shown) :], nl=False)
            shown = text
        count += 1
    click.echo()
    took = time.monotonic() - began
    line = f"{engine}: {len(ids)} tokens in, {count} out, {took:.1f} s ({count / took:.1f} tokens/s)"
    if drafts.rate is not None:
        line += f"; {drafts.accepted} of {drafts.drafted} drafts accepted ({drafts.rate:.1%})"
    click.echo(line, err=True)

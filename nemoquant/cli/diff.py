"""``nemoquant diff``: how far quantized checkpoints are from their source."""

import sys
from pathlib import Path

import click
from click.core import ParameterSource

from nemoquant.bars import progress_bars
from nemoquant.cli.shared import (
    FILE,
    MODEL,
    PATH,
    THREADS,
    download_option,
    local,
    print_json_text,
    say,
    show,
    whole,
)
from nemoquant.engine import ENGINES, EngineName
from nemoquant.formats import DEVICES, Device


@click.command("diff")
@click.argument("source", metavar="SRC", type=MODEL)
@click.argument("outs", metavar="OUT...", nargs=-1, required=True, type=MODEL)
@click.option(
    "--data",
    type=PATH,
    metavar="PATH_OR_NAME",
    help="Text to compare on: what quantize takes as --calib; mix and the default are of other works there.",
)
@click.option(
    "--data-column",
    "columns",
    multiple=True,
    metavar="NAME",
    help="The column of the text, where it has no usual name; twice for a question and its answer.",
)
@click.option("--rows", type=whole(1), default=32, show_default=True, help="Rows of text.")
@click.option("--seq-len", type=whole(2), default=512, show_default=True, help="Tokens in a row.")
@click.option(
    "--html", type=FILE, metavar="FILE", help="Write the report as one HTML file that opens offline."
)
@click.option(
    "--json",
    "json_file",
    type=FILE,
    metavar="FILE",
    help="Write the report's data; - is standard output, with nothing else on it.",
)
@click.option(
    "--markdown",
    type=FILE,
    metavar="FILE",
    help="Write the summary that the terminal shows, for a pull request.",
)
@click.option(
    "--fail-if",
    multiple=True,
    metavar="CONDITION",
    help="Exit with 1 if a checkpoint meets it: 'kl > 0.02', 'top1 < 0.9'. Repeatable.",
)
@click.option(
    "--reference-cache",
    type=FILE,
    metavar="FILE",
    help="Keep the source's side in FILE for later runs on the same text, or take it from there.",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="torch",
    show_default=True,
    help="Take logits through this engine too; torch is the diff's own arithmetic.",
)
@click.option(
    "--engine-file",
    "engine_files",
    multiple=True,
    type=FILE,
    metavar="FILE",
    help="The engine of an OUT, for --engine rtx or trt; one for each OUT, in their order.",
)
@click.option("--plugins", type=FILE, metavar="FILE", help="Plugin library for --engine trt.")
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="cpu",
    show_default=True,
    help="Where source and OUT compute, layer by layer; cuda is one NVIDIA GPU, and needs Triton.",
)
@click.option("--no-card", is_flag=True, help="Leave OUT's model card without the figures.")
@click.option("--threads", type=THREADS, help="Threads; default: all that this process may use.")
@download_option
def command(
    source: str,
    outs: tuple[str, ...],
    data: Path | None,
    columns: tuple[str, ...],
    rows: int,
    seq_len: int,
    html: Path | None,
    json_file: Path | None,
    markdown: Path | None,
    fail_if: tuple[str, ...],
    reference_cache: Path | None,
    engine: EngineName,
    engine_files: tuple[Path, ...],
    plugins: Path | None,
    device: Device,
    no_card: bool,
    threads: int | None,
    download: bool,
) -> None:
    """Compare one or more checkpoints OUT with the bf16 checkpoint SRC that they were made from, over the
    same text. Each may be a name on the hub.

    Each is run with the arithmetic that it will have in an engine: weights decoded, GEMM inputs and KV cache
    rounded. The summary goes to standard output, and the main figures into OUT's model card.

    \b
    Figures for --fail-if: kl kl_median kl_p99 kl_max perplexity perplexity_ratio top1 top5 mtp_acceptance flipped
    bits_per_weight; comparisons > >= < <=.

    \b
    Examples:
      nemoquant diff MODEL OUT
      nemoquant diff MODEL OUT-fp8 OUT-nvfp4 --html report.html
      nemoquant diff MODEL OUT --data chats.jsonl --rows 64 --seq-len 2048 --json report.json
      nemoquant diff MODEL OUT --fail-if 'kl > 0.02' --fail-if 'top1 < 0.9'
      nemoquant diff nvidia/NAME nvidia/NAME-FP8 OUT --download     the published checkpoint beside ours
    """  # noqa: E501  help that click does not wrap
    from nemoquant import api
    from nemoquant.evaluate.conditions import Condition
    from nemoquant.evaluate.report.files import CACHE, check_files, write_files
    from nemoquant.tokens.array import are_rows

    conditions = [Condition.parse(text) for text in fail_if]
    to_stdout = str(json_file) == "-"
    files = {"html": html, "json": None if to_stdout else json_file, "markdown": markdown}
    reference, *candidates = [local(name, download=download, quiet=to_stdout) for name in (source, *outs)]
    check_files(files | {CACHE: reference_cache}, [reference, *candidates])
    given = click.get_current_context().get_parameter_source
    unused = [
        flag
        for name, flag in (("rows", "--rows"), ("seq_len", "--seq-len"))
        if given(name) is ParameterSource.COMMANDLINE
    ]
    if data is not None and unused and are_rows(data, columns):
        say(f"warning: not used: {', '.join(unused)} (an array says its rows and length itself)", err=True)
    with progress_bars(to_stdout) as progress:
        report = api.diff(
            reference,
            candidates,
            data=data,
            columns=columns,
            rows=rows,
            seq_len=seq_len,
            reference_cache=reference_cache,
            engine=engine,
            engine_files=engine_files,
            plugins=plugins,
            device=device,
            threads=threads,
            card=not no_card,
            progress=progress,
        )
    write_files(report, files)
    if to_stdout:
        print_json_text(report.dump())
    else:
        from nemoquant.evaluate.report.markdown import markdown as summary

        show(summary(report))
        for kind, path in files.items():
            if path is not None:
                say(f"{kind}: {path}", err=True)
    failures = [line for condition in conditions for line in condition.failures(report)]
    for line in failures:
        say(f"failed: {line}", err=True)
    if failures:
        sys.exit(1)

"""``nemoquant quantize``: write a quantized checkpoint."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from nemoquant.bars import progress_bars
from nemoquant.cli.shared import (
    GIGABYTES,
    MODEL,
    PATH,
    THREADS,
    download_option,
    dtype_of,
    gpu_option,
    json_option,
    loading,
    memory_option,
    method_options,
    no_scale_groups_option,
    print_json,
    recipe_name,
    recipe_options,
    run_option,
    say,
    say_serving,
    whole,
)
from nemoquant.errors import UsageError
from nemoquant.formats import DEVICES
from nemoquant.machine import resident
from nemoquant.run.options import DTYPES, OPTIONS, PLACES, RunOptions, Where
from nemoquant.units import duration, size

if TYPE_CHECKING:
    from nemoquant.api.quantizing import Result
    from nemoquant.planning.plan import Plan
    from nemoquant.run.estimate import Estimate


@click.command("quantize")
@click.argument("source", metavar="SRC", type=MODEL)
@click.argument("out", type=PATH)
@recipe_options
@method_options
@run_option(
    "data",
    type=PATH,
    metavar="PATH_OR_NAME",
    help="Calibration text: .txt, .jsonl, .json, .csv, .parquet, .arrow, .npy, .npz, a folder of such files, "
    "or a data set of the hub that is on this machine, such as cnn_dailymail; mix: the shipped prose, code, "
    "mathematics and chat; default: the shipped prose.",
)
@run_option(
    "columns",
    multiple=True,
    metavar="NAME",
    help="The column of the text, where it has no usual name; twice for a question and its answer.",
)
@run_option("rows", type=whole(1), show_default=True, help="Calibration rows.")
@run_option("seq_len", type=whole(1), show_default=True, help="Tokens in a calibration row.")
@run_option(
    "scales",
    type=PATH,
    metavar="FILE",
    help="nemoquant_scales.json of an earlier run, instead of calibrating.",
)
@run_option(
    "device",
    type=click.Choice(DEVICES),
    show_default=True,
    help="Where calibration computes and packing encodes, to the same codes; cuda is one NVIDIA GPU, and "
    "needs Triton.",
)
@run_option(
    "dtype",
    type=click.Choice(["auto", *DTYPES]),
    default="auto",
    callback=dtype_of,
    show_default=True,
    help="Dtype that calibration computes in.",
)
@run_option(
    "row_batch",
    type=whole(1),
    help="Calibration rows that go through a layer at once; default: as many as --memory, or 4 GB, admits.",
)
@memory_option
@run_option("threads", type=THREADS, help="Threads; default: all that this process may use.")
@run_option(
    "shard_bytes",
    type=GIGABYTES,
    default=OPTIONS["shard_bytes"].default / 1e9,
    callback=lambda context, parameter, gigabytes: int(gigabytes * 1e9),
    show_default=True,
    help="Largest output file, in GB.",
)
@no_scale_groups_option
@run_option(
    "on",
    type=click.Choice(PLACES),
    show_default=True,
    help="Where to compute: this process, or a Ray cluster (extra `ray`), whose nodes see SRC under the "
    "same path.",
)
@click.option("--engine", "renamed", type=click.Choice(PLACES), hidden=True)
@run_option(
    "address",
    metavar="HOST:PORT",
    help="The Ray cluster; `auto`: one that runs here; default: one is started here.",
)
@run_option(
    "resume", is_flag=True, help="Go on with what an earlier run, with the same options, left in OUT.partial."
)
@run_option(
    "also",
    multiple=True,
    metavar="FILE",
    help="A file of SRC to copy too, such as a reasoning parser; several times for several.",
)
@gpu_option
@click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")
@download_option
@json_option
def command(
    source: str,
    out: Path,
    fmt: str | None,
    recipe: str | None,
    renamed: Where | None,
    dry_run: bool,
    download: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Quantize the bf16 checkpoint in SRC, a folder or a name on the hub, into the new folder OUT.

    Calibrates layer by layer, packs in a stream, verifies what was written, and only then gives the folder
    its name.

    \b
    Examples:
      nemoquant quantize MODEL OUT --fmt fp8
      nemoquant quantize nvidia/NAME OUT --fmt nvfp4 --download     fetch what the hub's cache lacks of it
      nemoquant quantize MODEL OUT --fmt nvfp4 --calib chats.jsonl --rows 128 --seq-len 2048
      nemoquant quantize MODEL OUT --recipe nvfp4-w4a16             weights only
      nemoquant quantize MODEL OUT --fmt nvfp4 --method mse         faster, a little farther from the source
      nemoquant quantize MODEL OUT --fmt fp8 --method max --scales EARLIER/nemoquant_scales.json
      nemoquant quantize MODEL OUT --fmt fp8 --resume               go on after Ctrl-C, a crash or a kill
      nemoquant quantize MODEL OUT --fmt fp8 --also super_v3_reasoning_parser.py --gpu h200
    """
    name = recipe_name(fmt, recipe)
    if renamed is not None:
        given["on"] = _renamed(renamed, given["on"])
    options = RunOptions(**given)
    if options.scales and options.data:
        raise UsageError(
            "got both --scales and --calib; expected one: --scales takes the place of calibration"
        )
    starting = ExitStack()
    starting.enter_context(loading())
    from nemoquant import api
    from nemoquant.checkpoint.making import ended
    from nemoquant.checkpoint.side_files import for_serving
    from nemoquant.run.estimate import expectation
    from nemoquant.solve.words import change_sentences

    if download:
        starting.close()  # what is loaded by now is not worth hours without garbage collection
    began = time.monotonic()

    def planned(resolved: "Plan") -> None:
        nonlocal began
        if download:
            began = time.monotonic()  # what is expected is the run, without the download
        if not as_json:
            say(
                f"{resolved.recipe.name}: {size(resolved.bytes_in)} -> {size(resolved.bytes_out)}, "
                f"{resolved.bits_per_weight:.2f} bits a weight, "
                f"{len(resolved.quantized):,} of {len(resolved.rows):,} tensors quantized"
                + (", activations calibrated" if resolved.needs_calibration else ", no calibration needed"),
                err=True,
            )

    estimates: list[Estimate] = []

    def expected(estimate: "Estimate") -> None:
        starting.close()
        estimates.append(estimate)
        if not as_json:
            say(f"expected: {expectation(estimate)}", err=True)

    with ExitStack() as end:
        with starting, progress_bars(as_json) as progress:
            result = api.quantize(
                source,
                out,
                name,
                options,
                dry_run=dry_run,
                download=download,
                planned=planned,
                expected=expected,
                progress=progress,
                say=lambda text: say(text, err=True),
            )
            if not dry_run:
                end.enter_context(ended(out))
        took = time.monotonic() - began
        unused = _unused_options(result.plan.needs_calibration, options)
        warnings = result.warnings + unused
        if as_json:
            figures = result.plan.summary() | {"out": str(out), "dry_run": dry_run, "seconds": round(took, 3)}
            figures["calibration"] = result.calibration
            figures["expected"] = estimates[0].to_json() if estimates else None
            figures["peak_memory"] = resident("VmHWM")
            figures |= {"warnings": warnings, "verified": result.verified}
            figures["skipped_side_files"] = result.skipped_files
            print_json(figures | {"serving": [command.to_json() for command in result.serving]})
            return
        for warning in warnings:
            say(f"warning: {warning}", err=True)
        if result.skipped_files:
            say(f"not copied: {', '.join(result.skipped_files)} (not part of a checkpoint)", err=True)
        for file in for_serving(result.skipped_files):
            say(f"published serving commands name {file}: --also {file} copies it", err=True)
        if result.calibration is not None:
            say(_calibrated(result.calibration))
            for text in change_sentences(result.calibration, result.plan.recipe):
                say(text)
        say(_outcome(source, result, took, estimates[0] if estimates else None, dry_run=dry_run))
        say_serving(result.serving)


def _outcome(
    source: str, result: "Result", took: float, expected: "Estimate | None", *, dry_run: bool
) -> str:
    """What was made, in one line; nothing was expected of a run that OUT is of already."""
    resolved = result.plan
    sizes = f"{size(resolved.bytes_in)} -> {size(resolved.bytes_out)} of tensors"
    what = f"{sizes}, {resolved.bits_per_weight:.2f} bits a weight"
    if dry_run:
        return (
            f"dry run: {resolved.recipe.name} fits {source}; {what}; {resolved.tensors_out:,} tensors would "
            f"be written to {result.out}"
        )
    if expected is None:
        return f"{result.out}: {resolved.recipe.name}, {what}, finished already"
    return (
        f"{result.out}: {resolved.recipe.name}, {what}, verified, {duration(took)} (expected "
        f"{duration(expected.seconds)}), "
        f"{size(resident('VmHWM'))} of memory at most (expected {size(expected.memory)})"
    )


def _renamed(engine: Where, on: Where) -> Where:
    """What ``--engine``, the old name of ``--on``, says; with a note."""
    is_given = click.get_current_context().get_parameter_source("on") is ParameterSource.COMMANDLINE
    if is_given and on != engine:
        raise UsageError(f"got --on {on} and --engine {engine}, its old name; expected --on alone")
    say("note: --engine is now --on", err=True)
    return engine


def _unused_options(calibrates: bool, options: RunOptions) -> list[str]:
    """A warning for options that were given and have no effect."""
    given = click.get_current_context().get_parameter_source
    names = [n for n in ("rows", "seq_len", "dtype", "row_batch") if given(n) is ParameterSource.COMMANDLINE]
    if not calibrates:
        why = "this recipe needs no calibration"
    elif options.scales is not None:
        why = "--scales takes the place of calibration"
    else:
        from nemoquant.tokens.array import are_rows

        why = "an array says its rows and length itself"
        names = [name for name in names if name in ("rows", "seq_len")]
        if not (names and options.data is not None and are_rows(Path(options.data), options.columns)):
            return []
    return [f"not used: {', '.join(OPTIONS[name].flag for name in names)} ({why})"] if names else []


def _calibrated(run: dict[str, Any]) -> str:
    """Summary of the calibration in one line."""
    line = f"calibrated on {run['rows']} rows of {run['seq_len']} tokens ({run['data']}, {run['dtype']})"
    coverage = run["coverage"]
    if coverage["experts"]:
        reached = coverage["experts"] - coverage["unreached"]
        line += f"; {reached:,} of {coverage['experts']:,} experts reached"
        line += f", the least used got {coverage['fewest_tokens']:,}"
    return line

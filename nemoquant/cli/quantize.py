"""``nemoquant quantize``: the main job."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from nemoquant.cli.shared import json_option, loading, memory_option, print_json, progress_bars, recipe_name, recipe_options
from nemoquant.errors import UsageError
from nemoquant.run.options import CalibrationOptions
from nemoquant.units import duration, size

if TYPE_CHECKING:
    from nemoquant.formats import Device
    from nemoquant.planning.plan import Plan
    from nemoquant.run.estimate import Estimate


@click.command("quantize")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@recipe_options
@click.option(
    "--calib",
    type=click.Path(path_type=Path),
    help="Calibration data: .txt, .jsonl, .parquet or .npy; default: the shipped text.",
)
@click.option("--rows", type=click.IntRange(min=1), default=32, show_default=True, help="Calibration rows.")
@click.option("--seq-len", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens in a calibration row.")
@click.option(
    "--scales",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="nemoquant_scales.json of an earlier run, instead of calibrating.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where calibration computes and packing encodes, to the same codes; cuda is one NVIDIA GPU, and needs Triton.",
)
@click.option(
    "--compute",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Dtype that calibration computes in.",
)
@click.option(
    "--row-batch",
    type=click.IntRange(min=1),
    help="Calibration rows that go through a layer at once; default: as many as --memory, or 4 GB, admits.",
)
@memory_option
@click.option("--threads", type=click.IntRange(min=1), help="Threads; default: all that this process may use.")
@click.option(
    "--shard-size", type=click.FloatRange(min=0.000001), default=5.0, show_default=True, help="Largest output file, in GB."
)
@click.option("--no-scale-groups", is_flag=True, help="Give every tensor its own scales, as other tools do; for comparisons.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where to compute: this process, or a Ray cluster (extra `ray`), whose nodes see SRC under the same path.",
)
@click.option("--address", metavar="HOST:PORT", help="The Ray cluster; `auto`: one that runs here; default: one is started here.")
@click.option("--resume", is_flag=True, help="Go on with what an earlier run, with the same options, left in OUT.partial.")
@click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")
@json_option
def command(
    source: Path, out: Path, fmt: str | None, recipe: str | None, calib: Path | None, rows: int, seq_len: int, scales: Path | None,
    device: "Device", compute: str, row_batch: int | None, memory: int | None, threads: int | None, shard_size: float,
    no_scale_groups: bool, engine: str, address: str | None, resume: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Quantize the bf16 checkpoint in SRC into the new folder OUT.

    Calibrates layer by layer, packs in a stream, verifies what was written, and only then gives the folder its name.

    \b
    Examples:
      nemoquant quantize MODEL OUT --fmt fp8
      nemoquant quantize MODEL OUT --fmt nvfp4 --calib chats.jsonl --rows 128 --seq-len 2048
      nemoquant quantize MODEL OUT --recipe nvfp4-w4a16             weights only, no calibration
      nemoquant quantize MODEL OUT --fmt fp8 --scales EARLIER/nemoquant_scales.json
      nemoquant quantize MODEL OUT --fmt fp8 --resume               go on after Ctrl-C, a crash or a kill
    """
    name = recipe_name(fmt, recipe)
    if scales and calib:
        raise UsageError("got both --scales and --calib; expected one: --scales takes the place of calibration")
    options = CalibrationOptions(calib, rows, seq_len, scales, device, None if compute == "auto" else compute, row_batch, memory)
    starting = ExitStack()
    starting.enter_context(loading())
    from nemoquant import api
    from nemoquant.run.estimate import expectation, resident

    began = time.monotonic()

    def planned(made: "Plan") -> None:
        if not as_json:
            click.echo(
                f"{made.recipe.name}: {size(made.bytes_in)} -> {size(made.bytes_out)}, {made.bits_per_weight:.2f} bits a weight, "
                f"{len(made.quantized):,} of {len(made.rows):,} tensors quantized"
                + (", activations calibrated" if made.needs_calibration else ", no calibration needed"),
                err=True,
            )

    promised: list[Estimate] = []

    def expected(estimate: "Estimate") -> None:
        starting.close()
        promised.append(estimate)
        if not as_json:
            click.echo(f"expected: {expectation(estimate)}", err=True)

    with starting, progress_bars(as_json) as progress:
        result = api.quantize(
            source, out, name, calibration=options, scale_groups=not no_scale_groups, threads=threads,
            shard_bytes=int(shard_size * 1e9), dry_run=dry_run, resume=resume, engine=engine, address=address,
            planned=planned, expected=expected, progress=progress,
            say=lambda text: click.echo(text, err=True),
        )  # fmt: skip
    took = time.monotonic() - began
    unused = _unused_options(result.plan.needs_calibration, scales is not None, calib is not None and calib.suffix == ".npy")
    warnings = result.warnings + unused
    if as_json:
        figures = result.plan.summary() | {"out": str(out), "dry_run": dry_run, "seconds": round(took, 3)}
        figures["calibration"] = result.calibration
        figures["expected"] = promised[0].to_json()
        figures["peak_memory"] = resident("VmHWM")
        print_json(figures | {"warnings": warnings, "verified": result.verified, "skipped_side_files": result.skipped_files})
        return
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    if result.skipped_files:
        click.echo(f"not copied: {', '.join(result.skipped_files)} (not part of a checkpoint)", err=True)
    made = result.plan
    what = f"{size(made.bytes_in)} -> {size(made.bytes_out)} of tensors, {made.bits_per_weight:.2f} bits a weight"
    if dry_run:
        click.echo(f"dry run: {made.recipe.name} fits {source}; {what}; {made.tensors_out:,} tensors would be written to {out}")
    else:
        if result.calibration is not None:
            click.echo(_calibrated(result.calibration))
        peak, expect = resident("VmHWM"), promised[0]
        click.echo(
            f"{out}: {made.recipe.name}, {what}, verified, {duration(took)} (expected {duration(expect.seconds)}), "
            f"{size(peak)} of memory at most (expected {size(expect.memory)})"
        )


def _unused_options(calibrates: bool, has_scales: bool, has_rows: bool) -> list[str]:
    """Options that were given and had no effect, in words."""
    given = click.get_current_context().get_parameter_source
    names = {"rows": "--rows", "seq_len": "--seq-len", "compute": "--compute", "row_batch": "--row-batch"}
    options = [flag for name, flag in names.items() if given(name) is ParameterSource.COMMANDLINE]
    if not calibrates:
        why = "this recipe needs no calibration"
    elif has_scales:
        why = "--scales takes the place of calibration"
    else:
        why = "an .npy file says its rows and length itself"
        options = [flag for flag in options if has_rows and flag in ("--rows", "--seq-len")]
    return [f"not used: {', '.join(options)} ({why})"] if options else []


def _calibrated(found: dict[str, Any]) -> str:
    """How calibration went, in a line."""
    line = f"calibrated on {found['rows']} rows of {found['seq_len']} tokens ({found['data']}, {found['dtype']})"
    coverage = found["coverage"]
    if coverage["experts"]:
        reached = coverage["experts"] - coverage["unreached"]
        line += f"; {reached:,} of {coverage['experts']:,} experts reached, the least used got {coverage['fewest_tokens']:,}"
    return line

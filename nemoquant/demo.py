"""The whole toolchain on the trained demo model: every preset that fits it, verified, and compared in one report."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nemoquant import api
from nemoquant.errors import VerificationError, listing
from nemoquant.pack import output
from nemoquant.planning.recipe import recipe_folder

if TYPE_CHECKING:
    from nemoquant.evaluate.schema import Report

PRESETS = ("fp8", "fp8-published", "nvfp4", "nvfp4-full", "nvfp4-w4a16")
REPORTS = {"html": "report.html", "json": "report.json", "markdown": "report.md"}


def demo_model() -> Path:
    """The trained demo model: in the installed package, or in the source tree."""
    return recipe_folder().parent / "demo_model"


def demo(
    out: Path, *, rows: int = 32, say: Callable[[str], None] = lambda text: None, progress: api.Progress = api.no_progress
) -> "Report":
    """Quantize, verify and compare into the new folder ``out``; it appears when everything is in it.

    Args:
        rows: of 512 tokens each, to calibrate and to compare on.
        say: told in a line what was done.
    Raises:
        OutputError: ``out`` exists or can't be written. VerificationError: an output is not what its plan says.
    """
    from nemoquant.evaluate.report.files import write_files

    source = demo_model()
    plans = [api.plan(source, preset) for preset in PRESETS]
    output.check_output(out, source, sum(p.tensors_out for p in plans), sum(p.bytes_out for p in plans))
    with output.making(out) as folder:
        scales = None
        for preset, plan in zip(PRESETS, plans, strict=True):
            options = api.CalibrationOptions(rows=rows, scales=scales if plan.needs_calibration else None)
            result = api.quantize(source, folder / preset, preset, calibration=options, progress=progress)
            scales = scales or folder / preset / "nemoquant_scales.json"  # calibrated once: the file serves every recipe
            report = api.verify(folder / preset, source)
            if not report["ok"]:
                raise VerificationError(f"{preset}: {listing(report['problems'])}")
            say(f"{preset}: {result.plan.recipe.summary} {plan.bits_per_weight:.2f} bits a weight; verified against the source.")
        found = api.diff(source, [folder / preset for preset in PRESETS], rows=rows, progress=progress)
        write_files(found, {kind: folder / name for kind, name in REPORTS.items()})
    return found

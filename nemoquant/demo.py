"""The whole toolchain on the trained demo model: every preset that fits it, verified and compared."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nemoquant import api
from nemoquant.checkpoint.folder import check_output, making
from nemoquant.errors import VerificationError, listing
from nemoquant.progress import Progress, no_progress
from nemoquant.shipped import demo_model

if TYPE_CHECKING:
    from nemoquant.evaluate.schema import Report

ENGINE_SM = 120  # GPU of the example engine; it is built, not run
PRESETS = ("fp8", "fp8-published", "mxfp8", "nvfp4", "nvfp4-full", "nvfp4-w4a16")
REPORTS = {"html": "report.html", "json": "report.json", "markdown": "report.md"}


def demo(
    out: Path,
    *,
    rows: int = 32,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress = no_progress,
) -> "Report":
    """Quantize, verify, export and compare into the new folder ``out``; it appears when everything is in it.

    Graphs need the extra `ort`, an engine the extra `rtx`; without an extra its part is left out, with a
    message.

    Args:
        rows: of 512 tokens each, to calibrate and to compare on.
        say: called with a line of text after each step.
    Raises:
        OutputError: ``out`` exists or can't be written. VerificationError: an output differs from its plan.
    """
    from nemoquant.evaluate.report.files import write_files

    source = demo_model()
    plans = [api.plan(source, preset) for preset in PRESETS]
    check_output(out, source, sum(p.tensors_out for p in plans), sum(p.bytes_out for p in plans))
    with making(out) as folder:
        scales = None
        for preset, plan in zip(PRESETS, plans, strict=True):
            options = api.RunOptions(rows=rows, scales=scales if plan.needs_calibration else None)
            result = api.quantize(source, folder / preset, preset, options, progress=progress)
            # calibrated once: the file serves every recipe
            scales = scales or folder / preset / "nemoquant_scales.json"
            report = api.verify(folder / preset, source)
            if not report["ok"]:
                raise VerificationError(f"{preset}: {listing(report['problems'])}")
            say(
                f"{preset}: {result.plan.recipe.summary} {plan.bits_per_weight:.2f} bits a weight; verified "
                f"against the source."
            )
        engine = _graphs(folder, say)
        comparison = api.diff(
            source, [folder / preset for preset in PRESETS], rows=rows, engine=engine, progress=progress
        )
        write_files(comparison, {kind: folder / name for kind, name in REPORTS.items()})
    return comparison


def _graphs(folder: Path, say: Callable[[str], None]) -> str:
    """Export every preset, and build one engine; returns the engine for the diff."""
    if not (importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx_ir")):
        say("graphs: left out, they need the extra `ort`: pip install 'nemoquant[ort]'")
        return "torch"
    for preset in PRESETS:
        exported = api.export_onnx(folder / preset, mtp=True)
    say(
        f"graphs: model.onnx and mtp.onnx beside the shards of each, {exported.nodes} nodes in "
        f"{len(exported.functions)} functions, no weight copied."
    )
    if importlib.util.find_spec("tensorrt_rtx"):
        facts = api.export_engine(
            folder / "nvfp4", folder / f"nvfp4-sm{ENGINE_SM}.engine", target="rtx", sm=ENGINE_SM
        )
        figures = f"{facts['bytes'] / 1e6:.1f} MB, built in {facts['build_seconds']:.1f} s"
        say(f"engine: nvfp4-sm{ENGINE_SM}.engine, TensorRT-RTX {facts['version']}, {figures}")
    else:
        say("engine: left out, it needs the extra `rtx`: pip install 'nemoquant[rtx]'")
    return "onnxruntime"

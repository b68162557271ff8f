"""The whole toolchain on the trained demo model: every preset that fits it, verified and compared."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemoquant import api
from nemoquant._version import __version__
from nemoquant.checkpoint.folder import FOLDER, HALF, STATE, check_output
from nemoquant.checkpoint.making import Making, clear, making
from nemoquant.engine import EngineName
from nemoquant.engine.enginefile import facts_file
from nemoquant.errors import OutputError, UsageError, VerificationError, listing
from nemoquant.files import MOST_SETTINGS, read_json, replace_text
from nemoquant.progress import Progress, no_progress
from nemoquant.shipped import demo_model

if TYPE_CHECKING:
    from nemoquant.evaluate.schema import Report

ENGINE_SM = 120  # GPU of the example engine; it is built, not run
PRESETS = ("fp8", "fp8-published", "mxfp8", "nvfp4", "nvfp4-full", "nvfp4-w4a16", "nvfp4-full-w4a16")
ENGINE = Path(f"nvfp4-sm{ENGINE_SM}.engine")
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
    message. What an earlier demo finished before it was killed or interrupted is used.

    Args:
        rows: of 512 tokens each, to calibrate and to compare on.
        say: called with a line of text after each step.
    Raises:
        OutputError: ``out`` exists or can't be written. VerificationError: an output differs from its plan.
        UsageError: an earlier demo that did not end took other rows.
    """
    from nemoquant.evaluate.report.files import write_files

    source = demo_model()
    plans = [api.plan(source, preset) for preset in PRESETS]
    if (out / REPORTS["html"]).is_file():
        clear(out)  # of a demo that was killed when all but this was done
    check_output(out, source, sum(p.tensors_out for p in plans), sum(p.bytes_out for p in plans), resume=True)
    files = {*REPORTS.values(), str(ENGINE), str(facts_file(ENGINE))}
    with making(out, files, PRESETS, resume=True) as made:
        folder = made.folder
        _begin(made, rows, say)
        scales: Path | None = None
        for preset, plan in zip(PRESETS, plans, strict=True):
            takes = plan.needs_calibration and not plan.needs_inputs
            options = api.RunOptions(rows=rows, scales=scales if takes else None, resume=True)
            result = api.quantize(source, folder / preset, preset, options, progress=progress)
            # one file serves every recipe that needs no more of the inputs than their maxima
            scales = scales or folder / preset / "nemoquant_scales.json"
            report = api.verify(folder / preset, source, progress=False)
            if not report["ok"]:
                raise VerificationError(f"{preset}: {listing(report['problems'])}")
            say(
                f"{preset}: {result.plan.headline} {plan.bits_per_weight:.2f} bits a weight; verified "
                f"against the source."
            )
        engine = _graphs(folder, say)
        comparison = api.diff(
            source, [folder / preset for preset in PRESETS], rows=rows, engine=engine, progress=progress
        )
        write_files(comparison, {kind: folder / name for kind, name in REPORTS.items()})
    return comparison


def _begin(made: Making, rows: int, say: Callable[[str], None]) -> None:
    """Write what this demo is made with; one that goes on must be made with the same.

    Raises:
        UsageError, OutputError
    """
    file, now = made.folder / FOLDER / STATE, {"demo": __version__, "rows": rows}
    try:
        before = read_json(file, MOST_SETTINGS, follow=False) if made.begun else now
    except (OSError, ValueError) as error:
        raise OutputError(f"{file} can't be read ({error}); remove {made.folder} and begin again") from None
    if before != now:
        raise UsageError(
            f"{made.folder} was begun with {_words(before)}, this is {_words(now)}; give the same rows, or "
            f"remove the folder"
        )
    if made.begun:
        finished = [preset for preset in PRESETS if (made.folder / preset).is_dir()]
        say(f"going on with {made.folder}: {listing(finished) or 'no preset'} finished")
    else:
        replace_text(file, json.dumps(now))
    made.disposable, made.kept = True, lambda error: _kept(made.folder, error)
    made.drop_halves()


def _words(made_with: Any) -> str:
    known = made_with if isinstance(made_with, dict) else {}
    return f"--rows {known.get('rows')} by version {known.get('demo')}"


def _kept(folder: Path, error: BaseException) -> str:
    """What to say of an unfinished demo; empty where nothing is worth keeping."""
    if not any((folder / (preset + end)).is_dir() for preset in PRESETS for end in ("", HALF)):
        return ""
    if isinstance(error, VerificationError):
        return f"{folder} is kept as it is; remove it to begin again"
    return f"{folder} is kept: the same command goes on from there"


def _graphs(folder: Path, say: Callable[[str], None]) -> EngineName:
    """Export every preset, and build one engine; returns the engine for the diff."""
    if not (importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx_ir")):
        say("graphs: left out, they need the extra `ort`: pip install 'nemoquant[ort]'")
        return "torch"
    for preset in PRESETS:
        exported = api.export_onnx(folder / preset, mtp=True, progress=False)
    say(
        f"graphs: model.onnx and mtp.onnx beside the shards of each, {exported.nodes} nodes in "
        f"{len(exported.functions)} functions, no weight copied."
    )
    if importlib.util.find_spec("tensorrt_rtx"):
        for file in (ENGINE, facts_file(ENGINE)):  # of an earlier demo: nothing would be overwritten
            (folder / file).unlink(missing_ok=True)
        facts = api.export_engine(
            folder / "nvfp4", folder / ENGINE, target="rtx", sm=ENGINE_SM, progress=False
        )
        figures = f"{facts['bytes'] / 1e6:.1f} MB, built in {facts['build_seconds']:.1f} s"
        say(f"engine: {ENGINE}, TensorRT-RTX {facts['version']}, {figures}")
    else:
        say("engine: left out, it needs the extra `rtx`: pip install 'nemoquant[rtx]'")
    return "onnxruntime"

"""The Python API: the command line as functions. Messages and progress go to callbacks, results are data."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemoquant.errors import UsageError, listing
from nemoquant.formats import Device
from nemoquant.layouts.loaders import cautions
from nemoquant.machine import usable_threads
from nemoquant.planning.plan import Plan
from nemoquant.planning.recipe import load_recipe, presets
from nemoquant.planning.resolve import resolve
from nemoquant.progress import Progress as Progress
from nemoquant.progress import no_progress
from nemoquant.run.options import PathLike
from nemoquant.run.options import RunOptions as RunOptions  # part of this API
from nemoquant.sources.source import BareConfig, Source, open_source, open_weights

if TYPE_CHECKING:
    from nemoquant.evaluate.schema import Report
    from nemoquant.graph.export import Exported
    from nemoquant.run.estimate import Estimate


@dataclass(frozen=True)
class Result:
    """Result of ``quantize``.

    Attributes:
        warnings: one sentence each.
        verified: counts of what verify checked before ``out`` got its name.
        skipped_files: files of the source that were not copied.
        calibration: its settings and coverage of experts; None where none was needed, and in a dry run.
    """

    out: Path
    plan: Plan
    warnings: list[str]
    verified: dict[str, int]
    skipped_files: list[str] = field(default_factory=list)
    calibration: dict[str, Any] | None = None


def plan(source: PathLike, recipe: str, *, scale_groups: bool = True) -> Plan:
    """Resolve a recipe (preset name or file) for a checkpoint folder's headers, or a bare ``config.json``.

    Raises:
        CheckpointError, RecipeError
    """
    return _plan(open_source(Path(source)), recipe, scale_groups)


def estimate(
    source: PathLike, recipe: str, options: RunOptions | None = None, *, out: PathLike = "."
) -> "Estimate":
    """Estimate what ``quantize`` would need on this machine: memory, disk and time.

    It reads headers and makes a short measurement.

    Args:
        options: of the run; calibration data is not read, ``rows`` and ``seq_len`` give its amount.
        out: a path on the disk that would be written to; a file without a name is written beside it.
    Raises:
        CheckpointError, RecipeError, UsageError, MissingExtraError
    """
    from nemoquant.calibrate.batch import Batch, compute_dtype
    from nemoquant.checkpoint.folder import nearest_folder
    from nemoquant.formats.gpu import check
    from nemoquant.run.budget import budget
    from nemoquant.run.estimate import estimate_run

    options = options or RunOptions()
    check(options.device)
    opened = open_weights(Path(source), "an estimate needs the folder with the weights, which it measures on")
    with opened.checkpoint:
        resolved = _plan(opened, recipe, options.scale_groups)
        batch, threads = None, options.threads or usable_threads()
        if resolved.needs_calibration and options.scales is None:
            batch = Batch(options.rows, options.seq_len, options.dtype or compute_dtype(options.device))
        chosen = budget(
            resolved,
            batch,
            memory=options.memory,
            row_batch=options.row_batch,
            threads=threads,
            device=options.device,
        )
        return estimate_run(
            opened.checkpoint,
            resolved,
            nearest_folder(Path(out)),
            batch,
            chosen,
            threads=threads,
            device=options.device,
        )


def _plan(source: Source | BareConfig, recipe: str, scale_groups: bool) -> Plan:
    assumed = isinstance(source, BareConfig)
    return resolve(
        load_recipe(recipe), source.config, source.table, assumed=assumed, scale_groups=scale_groups
    )


def _recipe_warnings(recipe: str, resolved: Plan) -> list[str]:
    """Warns of a file that kept a preset's name but not its content: the name goes into the model card."""
    name = resolved.recipe.name
    if recipe in presets() or name not in presets() or load_recipe(name) == resolved.recipe:
        return []
    return [
        f"{recipe} calls itself {name} but differs from that preset; give it a `name` and `summary` of its "
        f"own"
    ]


def quantize(
    source: PathLike,
    out: PathLike,
    recipe: str,
    options: RunOptions | None = None,
    *,
    dry_run: bool = False,
    planned: Callable[[Plan], None] = lambda plan: None,
    expected: Callable[["Estimate"], None] | None = None,
    progress: Progress = no_progress,
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Quantize the checkpoint in ``source`` into the new folder ``out``.

    Everything is checked before the first byte is written; ``out`` appears only when it is complete and
    verified.

    Args:
        recipe: preset name or recipe file.
        options: all other options of a run; None takes the defaults.
        dry_run: check everything, write nothing.
        planned: called with the plan before anything long begins.
        expected: called with an estimate of what the run will need, from a short measurement, before the
            first byte is written; None measures nothing.
        say: called with a line of text on what is used of an earlier run.
    Raises:
        NemoquantError: any of its kinds; see errors.py. Interrupted: Ctrl-C, with how to continue.
    """
    from nemoquant.formats.gpu import check

    source, out, options = Path(source), Path(out), options or RunOptions()
    check(options.device)
    opened = open_weights(
        source, "quantize needs the folder with the weights (`nemoquant plan` takes a bare config)"
    )
    with opened.checkpoint:
        resolved = _plan(opened, recipe, options.scale_groups)
        warnings = _recipe_warnings(recipe, resolved)
        warnings += [
            f"no tensor of this model got the format {name}: it lacks the roles that the recipe names"
            for name in resolved.unused_formats
        ]
        warnings += cautions(resolved)
        if not resolved.needs_calibration:
            warnings += [
                f"recipe {resolved.recipe.name} needs no calibration: {flag} is not used"
                for flag in options.unused_where_nothing_is_calibrated()
            ]
        from nemoquant.run.job import Job, Listener

        job = Job(opened, resolved, out, options, Listener(progress, say, expected))
        job.check()
        planned(resolved)
        if not dry_run:
            verified, skipped, warnings, calibration = job.run(warnings)
            return Result(out, resolved, warnings, verified, skipped, calibration)
        return Result(out, resolved, [*warnings, *job.dry_run()], {})


def verify(
    out: PathLike, against: PathLike | None = None, *, progress: Progress = no_progress
) -> dict[str, Any]:
    """Check a written checkpoint; with its source also bit for bit against it.

    Returns:
        ``{"ok", "problems", "warnings", "checked"}``.
    Raises:
        CheckpointError: the manifest, or the source, can't be used.
    """
    from nemoquant.pack.verify import verify as check

    needs = "--against needs the source's folder with its weights"
    source = None if against is None else open_weights(Path(against), needs)
    return check(Path(out), source, progress=progress).to_json()


def diff(
    source: PathLike,
    candidates: Sequence[PathLike],
    *,
    data: PathLike | None = None,
    rows: int = 32,
    seq_len: int = 512,
    reference_cache: PathLike | None = None,
    engine: str = "torch",
    engine_files: Sequence[PathLike] = (),
    plugins: PathLike | None = None,
    device: Device = "cpu",
    threads: int | None = None,
    card: bool = True,
    progress: Progress = no_progress,
) -> "Report":
    """Measure how far quantized checkpoints are from their source, side by side over the same text.

    Args:
        candidates: folders made from ``source``: by nemoquant, by another tool in the ModelOpt layout, or not
            quantized.
        data: .txt, .jsonl, .parquet or .npy; None is the shipped evaluation text, which is never used for
            calibration.
        rows, seq_len: number and length of rows; ignored for .npy, whose shape gives both.
        engine: take logits through this engine too: ``onnxruntime``, ``rtx`` or ``trt``; ``torch`` is the
            diff's own arithmetic.
        engine_files: of ``rtx`` and ``trt``, one for each candidate in their order.
        plugins: the plugin library of ``trt``; None is where ``nemoquant plugins build`` puts it.
        device: where both sides' torch arithmetic runs, ``cpu`` or ``cuda``; weights are copied there as they
            are used.
        reference_cache: file for the source's side, written by the first run and read by later ones.
        card: write the figures into the model cards of candidates that nemoquant wrote.
    Raises:
        NemoquantError: any of its kinds; see errors.py.
    """
    from nemoquant.formats.gpu import check
    from nemoquant.shipped import evaluation_data
    from nemoquant.tokens.rows import load_rows

    check(device)
    if min(rows, 1 if threads is None else threads) < 1 or seq_len < 2:
        raise UsageError(
            f"rows is {rows}, seq_len {seq_len}, threads {threads}; expected at least 1 row, 2 tokens, 1 "
            f"thread"
        )
    paths, cache = [Path(c) for c in candidates], None if reference_cache is None else Path(reference_cache)
    if not paths:
        raise UsageError("no checkpoint to compare; expected at least one beside the source")
    twice = [str(p) for i, p in enumerate(paths) if p.resolve() in [q.resolve() for q in paths[:i]]]
    if twice:
        raise UsageError(f"{listing(twice)} is given twice; expected each checkpoint once")
    opened = open_weights(Path(source), "diff needs the folder with the weights")
    text = evaluation_data() if data is None else Path(data)
    tokens = load_rows(text, opened.path, opened.config, rows, seq_len)
    if tokens.ids.shape[1] < 2:
        raise UsageError(
            f"{text} has rows of one token; expected at least 2, the first one predicts the second"
        )
    import torch

    from nemoquant.engine.base import Engine
    from nemoquant.engine.load import load_engine
    from nemoquant.evaluate.candidate import CandidateCheckpoint
    from nemoquant.evaluate.card import update_card
    from nemoquant.evaluate.reference import check_cache
    from nemoquant.evaluate.run import diff as compare

    torch.set_num_threads(threads or usable_threads())
    with ExitStack() as stack:
        stack.enter_context(opened.checkpoint)
        names = [p.resolve().name for p in paths]
        names = names if len(set(names)) == len(names) else [str(p) for p in paths]
        sides = [CandidateCheckpoint(path, opened, name) for path, name in zip(paths, names, strict=True)]
        for side in sides:
            stack.enter_context(side.checkpoint)
        if cache is not None:
            check_cache(cache, opened, tokens, device)
        engines: list[Engine] = []
        if engine != "torch" or engine_files:
            files: list[Path | None] = [Path(file) for file in engine_files] or [None] * len(paths)
            if len(files) != len(paths):
                raise UsageError(
                    f"{len(files)} engine files for {len(paths)} checkpoints; expected one for each, in "
                    f"their order"
                )
            library = None if plugins is None else Path(plugins)
            engines = [
                load_engine(engine, path, threads, file, library)
                for path, file in zip(paths, files, strict=True)
            ]
        report = compare(opened, sides, tokens, cache, progress, engines=engines, device=device)
    warnings = list(tokens.warnings)
    if card:
        warnings += [
            w
            for path, measured in zip(paths, report.candidates, strict=True)
            for w in update_card(path, measured, report)
        ]
    return report.model_copy(update={"warnings": warnings})


def export_onnx(
    source: PathLike,
    out: PathLike | None = None,
    *,
    dialect: str = "onnxruntime",
    compute: str | None = None,
    last_token_only: bool = False,
    layers: tuple[int, int] | None = None,
    mtp: bool = False,
    copy: bool = True,
    progress: Progress = no_progress,
) -> "Exported":
    """Write ``model.onnx`` (and ``mtp.onnx``) beside a checkpoint's shards, or with a copy of it in ``out``.

    Args:
        dialect: ``onnxruntime``, ``tensorrt_rtx`` or ``tensorrt``.
        compute: ``float32``, ``float16`` or ``bfloat16``; None is the dialect's own.
        layers: first layer, and the index after the last one; None is the whole model.
        mtp: also the multi-token-prediction module; the main graph then outputs the hidden states for it.
        copy: False refuses where tensors would have to be copied.
    Raises:
        NemoquantError: any of its kinds; see errors.py.
    """
    from nemoquant.engine.files import onnx_package

    onnx_package()
    from nemoquant.graph.build import GraphOptions
    from nemoquant.graph.dialects import DIALECTS
    from nemoquant.graph.export import export_onnx as export

    options = GraphOptions(compute or DIALECTS[dialect].computes[0], last_token_only, layers, with_hidden=mtp)
    return export(
        Path(source),
        None if out is None else Path(out),
        dialect,
        options,
        mtp=mtp,
        copy=copy,
        progress=progress,
    )


def export_engine(
    source: PathLike,
    out: PathLike,
    *,
    target: str | None = None,
    sm: int | None = None,
    compute: str = "bfloat16",
    max_seq_len: int = 4096,
    max_batch: int = 1,
    workspace: int | None = None,
    last_token_only: bool = False,
    mtp: bool = False,
    strip_weights: bool = False,
    weight_streaming: bool = False,
    timing_cache: PathLike | None = None,
    plugins: PathLike | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Build a TensorRT engine of a checkpoint into the new file ``out``, with ``out.json`` beside it.

    Args:
        target: ``rtx``, TensorRT-RTX, builds on any machine; ``trt``, TensorRT, on the GPU that the engine is
            for. None is ``rtx`` where no GPU is found, else ``trt``.
        sm: the GPU to build for; None is the one in this machine.
        max_seq_len, max_batch: most positions of a sequence, past ones included, and most sequences at once.
        workspace: bytes of scratch memory; None is the builder's own choice.
        last_token_only: logits of the last position only.
        mtp: also build the multi-token-prediction module, into a second file beside ``out``.
        strip_weights: leave the weights out of the file; they are taken from the shards when it is loaded.
        weight_streaming, timing_cache, plugins: see ``nemoquant.engine.build.EngineOptions``; ``trt`` only.
        say: called with a line of text at each step.
    Returns:
        the content of ``out.json``.
    Raises:
        NemoquantError: any of its kinds; see errors.py.
    """
    from nemoquant.engine.files import onnx_package

    onnx_package()
    from nemoquant.engine.build import EngineOptions
    from nemoquant.engine.export import export_engine as export
    from nemoquant.engine.targets import default_target, find_gpu

    gpu = find_gpu()
    options = EngineOptions(
        target or default_target(gpu),
        sm,
        compute,
        max_seq_len,
        max_batch,
        workspace,
        last_token_only=last_token_only,
        strip_weights=strip_weights,
        weight_streaming=weight_streaming,
        timing_cache=None if timing_cache is None else Path(timing_cache),
        plugins=None if plugins is None else Path(plugins),
    )
    return export(Path(source), Path(out), options, gpu, say, mtp=mtp)


def inspect(path: PathLike, *, context: int | None = None) -> dict[str, Any]:
    """Describe a checkpoint folder or a bare ``config.json``: layers, parameters, formats, cache sizes.

    Args:
        context: tokens for ``kv_cache.bytes_at_context``; None is the config's ``max_position_embeddings``.
    Raises:
        CheckpointError
    """
    from nemoquant.sources.summary import summarize

    return summarize(Path(path), context)

"""The diff: quantized checkpoints beside their source."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nemoquant import arguments
from nemoquant.api.model import found
from nemoquant.arguments import PathLike
from nemoquant.bars import shown
from nemoquant.engine import ENGINES, EngineName
from nemoquant.errors import NemoquantError, UncomputableError, UsageError, listing
from nemoquant.formats import Device
from nemoquant.machine import torch_threads, usable_threads
from nemoquant.progress import Progress
from nemoquant.sources.hub import called, origin
from nemoquant.sources.source import open_weights
from nemoquant.words import as_utf8, plain

if TYPE_CHECKING:
    from nemoquant.evaluate.schema import Report


def diff(
    source: PathLike,
    candidates: PathLike | Sequence[PathLike],
    *,
    data: PathLike | None = None,
    columns: Sequence[str] = (),
    rows: int = 32,
    seq_len: int = 512,
    reference_cache: PathLike | None = None,
    engine: EngineName = "torch",
    engine_files: PathLike | Sequence[PathLike] = (),
    plugins: PathLike | None = None,
    device: Device = "cpu",
    threads: int | None = None,
    card: bool = True,
    download: bool = False,
    progress: Progress | Literal[False] | None = None,
    say: Callable[[str], None] | None = None,
) -> "Report":
    """Measure how far quantized checkpoints are from their source, side by side over the same text.

    Args:
        source: a folder, or a model's name on the hub.
        candidates: the same of what was made from ``source``, or a list of several: by nemoquant, by another
            tool in the ModelOpt layout, or not quantized.
        data: text: a file, a folder of files, ``mix`` (shipped text of four domains), or the name of a data
            set of the hub that is on this machine (docs/calibration.md); None is the shipped prose. What is
            shipped for evaluation is never used for calibration.
        columns: those that hold the text, where no known name says it: one, or those of a question and its
            answer.
        rows, seq_len: number and length of rows; ignored for an array that has rows already.
        engine: take logits through this engine too: ``onnxruntime``, ``rtx`` or ``trt``; ``torch`` is the
            diff's own arithmetic.
        engine_files: of ``rtx`` and ``trt``, one for each candidate in their order.
        plugins: the plugin library of ``trt``; None is where ``nemoquant plugins build`` puts it.
        device: where both sides' torch arithmetic runs, ``cpu`` or ``cuda``; weights are copied there as they
            are used.
        reference_cache: file for the source's side, written by the first run and read by later ones.
        threads: None is all that this process may use.
        card: write the figures into the model cards of candidates that nemoquant wrote; those in the hub's
            cache stay as they are, with a warning.
        download: of a name on the hub, fetch what its cache lacks; without it nothing reaches a network.
        progress: None shows it in a terminal or notebook; False shows nothing; a function is called with it.
        say: called with a line of text on what a name on the hub stands for.
    Raises:
        NemoquantError: any of its kinds; see errors.py.
    """
    arguments.check_word("engine", engine, ENGINES)
    arguments.check_flags(card=card)
    bars = shown(progress)
    rows, seq_len = arguments.whole("rows", rows, 1), arguments.whole("seq_len", seq_len, 2)
    threads = arguments.threads(threads)
    given = arguments.several_paths("candidates", candidates)
    files = arguments.paths("engine_files", engine_files)
    cache = arguments.optional_path("reference_cache", reference_cache)
    library = arguments.optional_path("plugins", plugins)
    text = arguments.optional_path("data", data)
    names_of_columns = arguments.column_names("columns", columns)
    from nemoquant.formats.gpu import check
    from nemoquant.shipped import evaluation_data
    from nemoquant.tokens.rows import load_rows

    check(device)
    if not given:
        raise UsageError("no checkpoint to compare; expected at least one beside the source")
    source, *paths = [
        found(argument, one, download=download, say=say, progress=progress)
        for argument, one in [("source", source), *(("candidates", one) for one in given)]
    ]
    twice = [str(p) for i, p in enumerate(paths) if p.resolve() in [q.resolve() for q in paths[:i]]]
    if twice:
        raise UsageError(f"{listing(twice)} is given twice; expected each checkpoint once")
    opened = open_weights(source, "diff needs the folder with the weights")
    text = evaluation_data(text)
    tokens = load_rows(text, opened.path, opened.config, rows, seq_len, columns=names_of_columns)
    if tokens.ids.shape[1] < 2:
        raise UsageError(
            f"{text} has rows of one token; expected at least 2, the first one predicts the second"
        )
    from nemoquant.checkpoint.intact import Reading
    from nemoquant.engine.base import Engine
    from nemoquant.engine.load import load_engine
    from nemoquant.evaluate.candidate import CandidateCheckpoint
    from nemoquant.evaluate.card import update_card
    from nemoquant.evaluate.engines import check_length
    from nemoquant.evaluate.reference import check_cache
    from nemoquant.evaluate.run import diff as compare

    with ExitStack() as stack:
        report = stack.enter_context(bars)
        stack.enter_context(torch_threads(threads or usable_threads()))
        stack.enter_context(opened.checkpoint)
        names = [as_utf8(called(p)) for p in paths]
        names = names if len(set(names)) == len(names) else [as_utf8(p) for p in paths]
        sides = [CandidateCheckpoint(path, opened, name) for path, name in zip(paths, names, strict=True)]
        for side in sides:
            stack.enter_context(side.checkpoint)
        if cache is not None:
            check_cache(cache, opened, tokens, device)
        engines: list[Engine] = []
        if engine != "torch" or files:
            engine_of: list[Path | None] = [*files] or [None] * len(paths)
            if len(engine_of) != len(paths):
                raise UsageError(
                    f"{len(engine_of)} engine files for {len(paths)} checkpoints; expected one for each, in "
                    f"their order"
                )
            length = tokens.ids.shape[1]
            engines = [
                load_engine(
                    engine,
                    path,
                    threads,
                    file,
                    library,
                    progress=report,
                    admit=lambda known: check_length(known, length),
                )
                for path, file in zip(paths, engine_of, strict=True)
            ]
        signed = {side.path: side.manifest for side in sides if side.manifest is not None}
        known = [one.intact for one in engines if one.intact is not None]
        reading = stack.enter_context(Reading(signed, known=known))

        def computed(stage: str, done: int, total: int, what: str) -> None:
            reading.check()
            report(stage, done, total, what)

        try:
            measured = compare(opened, sides, tokens, cache, computed, engines=engines, device=device)
        except UncomputableError:
            reading.finish(report)  # damage is the better explanation
            raise
        except NemoquantError:
            reading.check()
            raise
        intact = reading.finish(report)
    warnings = list(tokens.warnings)
    if card:
        theirs = [path for path in intact if origin(path) is not None]
        warnings += [f"the card of {called(path)} in the hub's cache is left as it is" for path in theirs]
        warnings += [
            plain(w)
            for path, candidate in zip(paths, measured.candidates, strict=True)
            if path in intact and path not in theirs
            for w in update_card(intact[path], candidate, measured)
        ]
    return measured.model_copy(update={"warnings": warnings})

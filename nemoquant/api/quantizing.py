"""A quantize run: its estimate, the run itself, and the check of what it wrote."""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, Unpack

from nemoquant import arguments
from nemoquant.api.look import recipe_text, resolved
from nemoquant.api.model import found
from nemoquant.arguments import PathLike
from nemoquant.bars import shown
from nemoquant.checkpoint.folder import check_output
from nemoquant.errors import UsageError, listing
from nemoquant.layouts.engines import cautions
from nemoquant.layouts.serving import Chat, Serving, commands
from nemoquant.machine import usable_threads
from nemoquant.notebook import html_table
from nemoquant.planning.plan import Plan, method_warnings
from nemoquant.planning.recipe import load_recipe, presets
from nemoquant.progress import Progress
from nemoquant.run.options import RunOptions, RunOptionsDict, renamed
from nemoquant.sources.hub import Wanted
from nemoquant.sources.source import open_source, open_weights
from nemoquant.tokens.template import template_source

if TYPE_CHECKING:
    from nemoquant.run.estimate import Estimate

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, repr=False)
class Result:
    """Result of ``quantize``.

    Attributes:
        out: the new folder.
        plan: what became of each tensor.
        warnings: one sentence each.
        verified: counts of what verify checked before ``out`` got its name; empty in a dry run.
        skipped_files: files of the source that were not copied.
        calibration: its settings and coverage of experts; None where none was needed, and in a dry run.
        serving: the command for each serving engine, or why there is none; empty in a dry run.
    """

    out: Path
    plan: Plan
    warnings: list[str]
    verified: dict[str, int]
    skipped_files: list[str] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    serving: list[Serving] = field(default_factory=list)

    def _summary(self) -> str:
        checked = f"{self.verified['tensors']:,} tensors verified" if self.verified else "nothing written"
        return f"{self.plan.recipe.name}, {self.plan.sizes()}, {checked}"

    def __repr__(self) -> str:
        warned = f", {len(self.warnings)} warnings" if self.warnings else ""
        return f"Result({str(self.out)!r}: {self._summary()}{warned})"

    def _repr_html_(self) -> str:
        rows = [("warning", text) for text in self.warnings]
        rows += [("not copied", ", ".join(self.skipped_files))] if self.skipped_files else []
        return html_table(f"{self.out}: {self._summary()}", (), rows)


def with_options(function: Callable[P, R]) -> Callable[P, R]:
    """Lets help() and completion show, instead of ``**given``, the options that it stands for."""
    signature = inspect.signature(function)
    written = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = inspect.signature(RunOptions).parameters.values()
    function.__signature__ = signature.replace(parameters=[*written, *options])  # type: ignore[attr-defined]
    return function


def run_options(function: str, options: RunOptions | None, given: RunOptionsDict) -> RunOptions:
    """The options of a call, from its keyword arguments or as one object.

    Raises:
        UsageError: both are given. TypeError: there is no option of a name, as in any call.
    """
    known = [*(f.name for f in fields(RunOptions)), "engine"]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(
            f"{function}() got an unexpected keyword argument {unknown[0]!r}; options are "
            f"{', '.join(known[:-1])}"
        )
    if options is None:
        return RunOptions(**renamed(given, 4))  # points to the caller of quantize
    if not isinstance(options, RunOptions):
        raise UsageError(f"options is {options!r}; expected RunOptions, or its fields as keyword arguments")
    if given:
        raise UsageError(
            f"got options and {listing(list(given))}; expected one of the two: RunOptions, or its fields as "
            f"keyword arguments"
        )
    return options


@with_options
def estimate(
    source: PathLike,
    recipe: PathLike,
    options: RunOptions | None = None,
    *,
    out: PathLike = ".",
    download: bool = False,
    say: Callable[[str], None] | None = None,
    **given: Unpack[RunOptionsDict],
) -> "Estimate":
    """Estimate what ``quantize`` would need on this machine: memory, disk and time.

    It reads headers and makes a short measurement.

    Args:
        source: its folder, or a model's name on the hub.
        options: of the run, all in one; calibration data is not read, ``rows`` and ``seq_len`` give its
            amount.
        out: a path on the disk that would be written to; a file without a name is written beside it.
        download: of a name on the hub, fetch what its cache lacks; without it nothing reaches a network.
        say: called with a line of text on what a name on the hub stands for.
        given: the fields of :class:`RunOptions`, as keyword arguments.
    Raises:
        CheckpointError, RecipeError, UsageError, MissingExtraError
    """
    options = run_options("estimate", options, given)
    folder, name = arguments.path("out", out), recipe_text(recipe)
    from nemoquant.calibrate.batch import Batch, compute_dtype
    from nemoquant.checkpoint.folder import nearest_folder
    from nemoquant.formats.gpu import check
    from nemoquant.run.budget import budget
    from nemoquant.run.estimate import estimate_run

    check(options.device)
    wanted = Wanted(admit=lambda config: resolved(open_source(config), name, options))
    source = found("source", source, wanted, download=download, say=say)
    opened = open_weights(source, "an estimate needs the folder with the weights, which it measures on")
    with opened.checkpoint:
        made = resolved(opened, name, options)
        batch, threads = None, options.threads or usable_threads()
        if made.needs_calibration and options.scales is None:
            batch = Batch(options.rows, options.seq_len, options.dtype or compute_dtype(options.device))
        chosen = budget(
            made,
            batch,
            memory=options.memory,
            row_batch=options.row_batch,
            threads=threads,
            device=options.device,
        )
        return estimate_run(
            opened.checkpoint,
            made,
            nearest_folder(folder),
            batch,
            chosen,
            threads=threads,
            device=options.device,
        )


def _recipe_warnings(recipe: str, made: Plan) -> list[str]:
    """Warns of a file that kept a preset's name but not its content: the name goes into the model card."""
    name = made.recipe.name
    if recipe in presets() or name not in presets() or load_recipe(name) == made.recipe:
        return []
    return [
        f"{recipe} calls itself {name} but differs from that preset; give it a `name` and `summary` of its "
        f"own"
    ]


@with_options
def quantize(
    source: PathLike,
    out: PathLike,
    recipe: PathLike,
    options: RunOptions | None = None,
    *,
    dry_run: bool = False,
    download: bool = False,
    planned: Callable[[Plan], None] | None = None,
    expected: Callable[["Estimate"], None] | None = None,
    progress: Progress | Literal[False] | None = None,
    say: Callable[[str], None] | None = None,
    **given: Unpack[RunOptionsDict],
) -> Result:
    """Quantize the checkpoint in ``source`` into the new folder ``out``.

    Everything is checked before the first byte is written; ``out`` appears only when it is complete and
    verified.

    Args:
        source: its folder, or a model's name on the hub.
        recipe: preset name or recipe file, also one of Model Optimizer; see ``plan``.
        options: all options of the run in one; None takes the keyword arguments, and defaults.
        dry_run: check everything, write nothing.
        download: of a name on the hub, fetch what its cache lacks, once the plan was made from the config
            alone; without it nothing reaches a network.
        planned: called with the plan before anything long begins.
        expected: called with an estimate of what the run will need, from a short measurement, before the
            first byte is written; None measures nothing.
        progress: None shows it in a terminal or notebook; False shows nothing; a function is called with it.
        say: called with a line of text on what is used of an earlier run, and what a name on the hub stands
            for.
        given: the fields of :class:`RunOptions`, as keyword arguments.
    Raises:
        NemoquantError: any of its kinds; see errors.py. Interrupted: Ctrl-C, with how to continue.
    """
    options = run_options("quantize", options, given)
    out, name = arguments.path("out", out), recipe_text(recipe)
    arguments.check_flags(dry_run=dry_run)
    bars = shown(progress)
    arguments.check_functions(planned=planned, expected=expected, say=say)
    from nemoquant.formats.gpu import check

    check(options.device)

    def admit(config: Path) -> None:
        """What would end the run once gigabytes are there ends it before they are fetched."""
        made = resolved(open_source(config), name, options)
        if not options.resume:
            check_output(out, config.parent, made.tensors_out, made.bytes_out, resume=False)

    wanted = Wanted(also=options.also, admit=admit)
    source = found("source", source, wanted, download=download, say=say, progress=progress)
    opened = open_weights(
        source, "quantize needs the folder with the weights (`nemoquant plan` takes a bare config)"
    )
    with opened.checkpoint, bars as report:
        made = resolved(opened, name, options)
        warnings = [*made.warnings, *_recipe_warnings(name, made)]
        warnings += [
            f"no tensor of this model got the format {unused}: it lacks the roles that the recipe names"
            for unused in made.unused_formats
        ]
        warnings += method_warnings(made, options.overrides)
        warnings += cautions(made)
        if not made.needs_calibration:
            warnings += [
                f"recipe {made.recipe.name} needs no calibration: {flag} is not used"
                for flag in options.unused_where_nothing_is_calibrated()
            ]
        from nemoquant.run.job import Job, Listener

        job = Job(opened, made, out, options, Listener(report, say or (lambda text: None), expected))
        job.check()
        if planned is not None:
            planned(made)
        if not dry_run:
            verified, skipped, warnings, calibration = job.run(warnings)
            serving = commands(made, options.gpu, out, Chat.of(template_source(source)))
            return Result(out, made, warnings, verified, skipped, calibration=calibration, serving=serving)
        return Result(out, made, [*warnings, *job.dry_run()], {})


def verify(
    out: PathLike,
    against: PathLike | None = None,
    *,
    download: bool = False,
    progress: Progress | Literal[False] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Check a written checkpoint; with its source also bit for bit against it.

    A folder without a manifest, converted or another tool's, is checked as far as that goes without a plan:
    headers, index and config agree, all tensors and parts are there, every scale is valid, every weight is
    finite; of a converted one the hashes of its files too. A warning says that nothing else could be checked.

    Args:
        out: its folder, or a model's name on the hub.
        against: the source, the same way.
        download: of a name on the hub, fetch what its cache lacks; without it nothing reaches a network.
        progress: None shows it in a terminal or notebook; False shows nothing; a function is called with it.
        say: called with a line of text on what a name on the hub stands for.
    Returns:
        ``{"ok", "problems", "warnings", "edited", "checked"}``; ``edited`` are files that may be edited and
        were, such as the model card.
    Raises:
        CheckpointError: the manifest, or the source, can't be used: it has NaN or Inf, or changes meanwhile;
            or ``against`` is given and there is no manifest. UsageError
    """
    bars = shown(progress)
    folder = found("out", out, download=download, say=say, progress=progress)
    other = None
    if against is not None:
        other = found("against", against, download=download, say=say, progress=progress)
    from nemoquant.checkpoint.manifest import FILE
    from nemoquant.pack.verify import verify as check

    if other is None and folder.is_dir() and not os.path.lexists(folder / FILE):
        from nemoquant.pack.found import verify_found  # with torch, which the other way needs not

        with bars as report:
            return verify_found(folder, report).to_json()
    needs = "--against needs the source's folder with its weights"
    source = None if other is None else open_weights(other, needs)
    with bars as report:
        return check(folder, source, progress=report).to_json()

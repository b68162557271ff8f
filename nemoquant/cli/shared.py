"""Parts that several verbs share: options and output."""

import gc
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from nemoquant import arguments
from nemoquant.bars import progress_bars
from nemoquant.errors import UsageError, brief
from nemoquant.formats import FORMATS, METHODS
from nemoquant.layouts.gpus import GPUS
from nemoquant.planning.solving import FOLDS, MOST_DESCENT, MOST_HEADROOM, OUTPUTS, PROPAGATE
from nemoquant.run.options import OPTIONS
from nemoquant.words import passage, plain

if TYPE_CHECKING:
    from nemoquant.layouts.serving import Serving


class Place(click.Path):
    """A path; ``~`` at its beginning is the home, as everywhere."""

    def __init__(self, *, folder: bool = True) -> None:
        super().__init__(path_type=Path, dir_okay=folder)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            expanded = arguments.path(param.human_readable_name if param else "path", value)
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return super().convert(expanded, param, ctx)


class Model(click.ParamType["str"]):
    """A checkpoint's folder or config.json, or a name on the hub; :func:`local` says where it is."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            arguments.path(param.human_readable_name if param else "model", value)
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return click.Path().shell_complete(ctx, param, incomplete)


def local(given: str, *, download: bool, weights: bool = True, quiet: bool = False) -> Path:
    """Where a model is on this machine; what a name on the hub stands for is said on standard error.

    Args:
        weights: whether they are needed; else a config alone will do.
        quiet: whether a download shows no progress.
    """
    from nemoquant.sources.hub import ALL, SETTINGS
    from nemoquant.sources.located import located

    with progress_bars(quiet) as progress:
        return located(
            "model",
            given,
            ALL if weights else SETTINGS,
            download=download,
            say=lambda text: say(text, err=True),
            progress=progress,
        )


class Number(click.FloatRange):
    """A number of a range, which neither ``nan`` nor ``inf`` is in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{brief(value)} is not a finite number", param, ctx)
        return number


def whole(least: int, most: int = arguments.MOST_WHOLE) -> click.IntRange:
    """A whole number of a range; the Python API has the same."""
    return click.IntRange(least, most)


PATH, FILE, MODEL = Place(), Place(folder=False), Model()
THREADS = whole(1, arguments.MOST_THREADS)
GIGABYTES = Number(0.000001, 1e9)
F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def loading() -> Iterator[None]:
    """Switches garbage collection off while modules are loaded.

    It would take a sixth of the loading time, and free nothing.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def run_option(name: str, **settings: Any) -> Callable[[F], F]:
    """The click option of a ``RunOptions`` field: flag and default from its table, ``settings`` for click."""
    option = OPTIONS[name]
    return click.option(option.flag, name, **({"default": option.default} | settings))


def dtype_of(context: click.Context, parameter: click.Parameter, value: str) -> str | None:  # noqa: ARG001  click's callback
    """``auto`` is not a dtype: the machine decides."""
    return None if value == "auto" else value


def recipe_options(function: F) -> F:
    """``--fmt`` and ``--recipe``; :func:`recipe_name` reads them."""
    function = click.option(
        "--recipe",
        metavar="NAME_OR_FILE",
        help="Preset name or recipe file; `nemoquant recipes list` shows presets. Or a recipe of Model "
        "Optimizer: a file, or modelopt:NAME of its library.",
    )(function)
    return click.option(
        "--fmt", type=click.Choice(list(FORMATS)), help="Number format: the preset of that name."
    )(function)


def recipe_name(fmt: str | None, recipe: str | None) -> str:
    """The recipe that the two options name; exactly one must be given."""
    if (fmt is None) == (recipe is None):
        got = "neither" if fmt is None else "both"
        raise UsageError(f"got {got} of --fmt and --recipe; expected one, such as --fmt fp8")
    return fmt or recipe or ""


class Bytes(click.ParamType["int"]):
    """``4G``, ``500M``, ``1.5GB``, ``2GiB``: a number of bytes."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?)B?", value.strip())
        count = (
            float(match[1]) * (1024 if match[3] else 1000) ** "_KMGT".index(match[2].upper() or "_")
            if match
            else 0
        )
        if not 1 <= count < arguments.MOST_BYTES:
            self.fail(f"{brief(value)} is no size; expected one such as 4G, 500M or 2GiB", param, ctx)
        return int(count)


memory_option = run_option(
    "memory",
    type=Bytes(),
    metavar="SIZE",
    help="Most memory that the run may take, such as 4G: rows at once and read-ahead follow it.",
)

no_scale_groups_option = run_option(
    "scale_groups",
    is_flag=True,
    default=False,
    callback=lambda context, parameter, switched_off: not switched_off,
    help="Give every tensor its own scales, as other tools do; for comparisons.",
)


def _folds(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """``latent,norm``, or ``none``."""
    if value is None:
        return None
    names = [] if value == "none" else [name.strip() for name in value.split(",")]
    if unknown := [name for name in names if name not in FOLDS]:
        raise click.BadParameter(
            f"{brief(unknown[0])} is no fold; expected none, or some of {', '.join(FOLDS)}",
            context,
            parameter,
        )
    return tuple(names)


def method_options(function: F) -> F:
    """``--method``, ``--folds`` and others on solving, which take the place of the recipe's own."""
    for add in (
        run_option(
            "propagate",
            type=click.Choice(PROPAGATE),
            help="What gptq and hess solve a layer for: the source's stream, or that of the quantized layers "
            "before it, whose errors it then takes up.",
        ),
        run_option(
            "outputs",
            type=click.Choice(OUTPUTS),
            help="How errors in a layer's outputs count for gptq and hess: equally, or as they matter to the "
            "model's loss, whose gradients take about six times as long as calibration itself.",
        ),
        run_option(
            "headroom",
            type=Number(1, MOST_HEADROOM),
            help="How many times the largest input that calibration sees NVFP4 inputs may reach unclipped.",
        ),
        run_option(
            "descent",
            type=whole(0, MOST_DESCENT),
            help="Sweeps of coordinate descent after gptq or hess; each takes about as long as gptq itself.",
        ),
        run_option(
            "folds",
            metavar="NAMES",
            callback=_folds,
            help="Changes of weights that keep the function, such as latent,norm; or none.",
        ),
        run_option(
            "method",
            type=click.Choice(METHODS),
            help="How weights get their codes, instead of the recipe's method: max and mse from the weight "
            "alone, hess and gptq solved with the inputs of calibration.",
        ),
    ):
        function = add(function)
    return function


gpu_option = run_option(
    "gpu",
    type=click.Choice(list(GPUS)),
    help="The GPU that the commands for serving are for; default: a usual one that has the formats.",
)

download_option = click.option(
    "--download",
    is_flag=True,
    help="Fetch what the hub's cache lacks of a model that is given by its name on the hub, such as "
    "nvidia/NAME. Without this nothing reaches a network.",
)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON for machines, and nothing else, on standard output."
)


def say(text: object, *, err: bool = False) -> None:
    """One line on standard output or standard error, whatever names are in it."""
    click.echo(plain(text), err=err)


def show(text: str) -> None:
    """Text of any number of lines on standard output, as it is but for what a terminal would obey."""
    click.echo(passage(text), nl=False)


def say_serving(serving: "Iterable[Serving]") -> None:
    """The command for each engine, or why there is none."""
    for each in serving:
        say(each.where + ":" * bool(each.argv))
        for line in each.lines:
            say(f"  {line}")


def print_json(data: Any) -> None:
    """JSON on standard output; NaN and Infinity never occur in it."""
    print_json_text(json.dumps(data, indent=2, allow_nan=False) + "\n")


def print_json_text(text: str) -> None:
    """JSON on standard output, in ASCII: other characters are escaped, as JSON may have them."""
    click.echo(re.sub(r"[^\x00-\x7e]", lambda c: json.dumps(c[0])[1:-1], text), nl=False)


def table(rows: list[tuple[Any, ...]], header: tuple[str, ...], right: str = "") -> None:
    """A table on standard output, as wide as the terminal; ``right``: digits of right-aligned columns."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        grid.add_column(name, justify="right" if str(i) in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(f"{cell:,}" if isinstance(cell, int) else plain(cell) for cell in row))
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160  # a file or pipe: no terminal sets the width
    console.print(grid)

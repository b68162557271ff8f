"""The command line, a thin layer over the Python API. Verbs are loaded on use: ``--help`` stays quick."""

import importlib
import os
from typing import Any

import click

from nemoquant._version import __version__

VERBS = {
    "inspect": "Show what a checkpoint or config.json is.",
    "plan": "Show what a recipe would do, before it is done.",
    "quantize": "Quantize a bf16 checkpoint to FP8, MXFP8 or NVFP4.",
    "verify": "Check a quantized checkpoint, file by file and byte by byte.",
    "convert": "Write a quantized checkpoint for transformers, or decode it to bf16.",
    "diff": "Measure how far quantized checkpoints are from their source.",
    "export": "Export ONNX graphs over the packed bytes, and engines.",
    "plugins": "Build the TensorRT plugins and their kernels.",
    "generate": "Generate text with a checkpoint, through any engine.",
    "demo": "Quantize, verify and compare a small trained model, as a show.",
    "doctor": "Show which engines can run here, and why the others can't.",
    "recipes": "List and show the shipped recipes.",
}
MAKING = ("quantize", "convert", "export", "plugins", "demo")  # after an interrupt these say what is kept


class Verbs(click.Group):
    """Loads ``nemoquant.cli.<verb>`` when the verb is used; errors become one line and their exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"nemoquant.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        import difflib

        if args and args[0] not in VERBS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], VERBS, 1)
            hint = f" Did you mean '{close[0]}'?" if close else f" Commands are {', '.join(VERBS)}."
            raise click.UsageError(f"No such command '{args[0]}'.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):  # without loading the verbs
            formatter.write_dl(list(VERBS.items()))

    def main(self, args: Any = None, *rest: Any, **extra: Any) -> Any:
        from nemoquant.cli.ending import Ending, open_streams

        if args is None:
            open_streams()
        with Ending(program=args is None) as ending:
            return super().main(args, *rest, obj=ending, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        from nemoquant.errors import NemoquantError

        # torch's threads would spin for milliseconds while they wait; with other work on the machine this
        # costs many times what it saves. Some ten microseconds are enough from one operation to the next, and
        # a fifth faster than sleeping at once (measured). OpenMP reads both once, when torch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        # oneDNN keeps 1,024 compiled products, a quarter of a megabyte each on a CPU with AMX. Each count of
        # tokens that reach an expert is another one: the cache would grow with the experts, for nothing.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            ctx.obj.interrupted(error, makes=ctx.invoked_subcommand in MAKING)
        except NemoquantError as error:
            ctx.obj.failed(str(error), error.exit_code)
        except OSError as error:  # an unforeseen error of disk or permissions: one line, not exit code 1
            if ctx.obj.signal is not None:  # such as of a terminal that is gone
                ctx.obj.interrupted(error, makes=ctx.invoked_subcommand in MAKING)
            ctx.obj.failed(str(error), 2)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise  # click's own ends: of usage, and of --help
        except Exception as error:
            if ctx.obj.signal is not None:  # what a library makes of it
                ctx.obj.interrupted(error, makes=ctx.invoked_subcommand in MAKING)
            ctx.obj.unforeseen(error)


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "-V", "--version", message="nemoquant %(version)s")
def main() -> None:
    """Quantize and deploy NVIDIA Nemotron-H models.

    \b
    Examples:
      nemoquant inspect MODEL
      nemoquant plan MODEL --fmt nvfp4
      nemoquant quantize MODEL OUT --fmt fp8
      nemoquant verify OUT --against MODEL
      nemoquant diff MODEL OUT --html report.html

    \b
    Exit codes: 0 ok, 1 a check failed, 2 usage or bad input, 3 a missing extra, 70 an error of nemoquant's own, 130 interrupted (SIGTERM 143, SIGHUP 129; `quantize --resume` goes on).
    """  # noqa: E501  a paragraph of the help that click does not wrap

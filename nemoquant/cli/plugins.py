"""``nemoquant plugins``: the TensorRT plugins and their kernels."""

from pathlib import Path

import click

from nemoquant.bars import progress_bars
from nemoquant.cli.shared import PATH, THREADS, json_option, print_json, say
from nemoquant.units import size


@click.group("plugins")
def command() -> None:
    """Build the operators that TensorRT lacks: the Mamba-2 scan, its convolution, the routed experts.

    \b
    Examples:
      nemoquant plugins build                         for sm_80, sm_90a, sm_100f and sm_120f
      nemoquant plugins build --arch sm_90a           for one GPU: quicker
    """


@command.command("build")
@click.option(
    "--arch",
    "archs",
    multiple=True,
    metavar="SM",
    help="Architecture, such as sm_90a; may be repeated, or a list with commas.",
)
@click.option(
    "--gemm-arch",
    "gemm_archs",
    multiple=True,
    metavar="SM",
    help="Build CUTLASS's grouped products of the experts too, for these of the architectures (sm_90a, "
    "sm_100f); default: none.",
)
@click.option("--jobs", type=THREADS, help="Compilers at once; default: the CPUs of this process.")
@click.option(
    "--out",
    type=PATH,
    help="Folder for the libraries; default: where nemoquant looks for them.",
)
@click.option("--host", is_flag=True, help="For the CPU, by an emulator: slow, for tests.")
@click.option("--kernels-only", is_flag=True, help="Without the TensorRT plugins: needs no TensorRT headers.")
@click.option("--strict", is_flag=True, help="Warnings of the compilers are errors.")
@json_option
def build_command(
    archs: tuple[str, ...],
    gemm_archs: tuple[str, ...],
    jobs: int | None,
    out: Path | None,
    host: bool,
    kernels_only: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Compile the plugin library for TensorRT and the kernel library for torch. No GPU is needed.

    Needs nvcc, CMake and the headers of TensorRT 10 or 11; the extra `plugins` has a wheel with them. The log
    beside the libraries has everything that the compilers said.

    \b
    Examples:
      nemoquant plugins build --jobs 4
      nemoquant plugins build --arch sm_100f,sm_120f --out build/plugins
      nemoquant plugins build --kernels-only
      nemoquant plugins build --arch sm_90a --gemm-arch sm_90a
    """
    from dataclasses import asdict

    from nemoquant.errors import UsageError
    from nemoquant.ops import build

    if host and (archs or gemm_archs):
        raise UsageError(
            "got --host with --arch or --gemm-arch; expected one or the other: the host build has no "
            "architectures"
        )
    architectures = build.parse_architectures(archs) if archs else build.ARCHITECTURES
    gemm = build.parse_architectures(gemm_archs)
    folder = out or build.default_folder()
    with progress_bars(as_json) as progress:
        built = build.build(
            out,
            architectures,
            gemm=gemm,
            jobs=jobs,
            host=host,
            faces=not kernels_only,
            strict=strict,
            progress=progress,
        )
    if as_json:
        print_json({"folder": str(folder), **asdict(built)})
        return
    target = "the CPU (emulated, for tests)" if host else ", ".join(f"sm_{a}" for a in built.architectures)
    for name in built.libraries:
        what = f"TensorRT {built.tensorrt} plugins" if "plugins" in name else "kernels"
        say(f"{folder / name}: {size((folder / name).stat().st_size)}, {what} for {target}")
    if "libnemoquant_plugins.so" in built.libraries:
        say(
            f"load it by trtexec --dynamicPlugins={folder / 'libnemoquant_plugins.so'}, or the registry's "
            f"load_library"
        )
    say(f"log, with the registers of every kernel: {folder / ('build_host.log' if host else 'build.log')}")

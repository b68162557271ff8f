"""Build the plugins and their kernels with CMake: find tools and headers, compile, install the libraries.

OUT/libnemoquant_kernels.so        kernels with a C interface, for torch and others
OUT/libnemoquant_plugins.so        TensorRT plugins: trtexec --dynamicPlugins, or the registry's load_library
OUT/libnemoquant_host.so,
OUT/libnemoquant_plugins_host.so   the same sources run by an emulator on the CPU, for tests
OUT/build.json (build_host.json)   what the libraries were built from, and for what
OUT/build.log (build_host.log)     the compilers' output, with the registers and spills of every kernel
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from nemoquant._version import __version__
from nemoquant.errors import BuildError, OutputError, UsageError
from nemoquant.files import copy_again, rename, replace_text
from nemoquant.machine import usable_threads
from nemoquant.ops.built import Built
from nemoquant.ops.sources import sources_hash
from nemoquant.progress import Progress, no_progress
from nemoquant.shipped import plugin_folder

ARCHITECTURES = ("80", "90a", "100f", "120f")
"""What is built by default, as in ``sm_90a``: for 8.x, 9.0, 10.x (B200, B300) and 12.x (RTX, DGX Spark)."""


def default_folder() -> Path:
    """Where ``nemoquant plugins build`` puts the libraries, and where they are looked for.

    Raises:
        BuildError: this user has no home folder. No place for temporary files is taken instead: what lies
            there could be another user's, and would be executed.
    """
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise BuildError(
            "this user has no home folder, in which the plugins would be; set XDG_CACHE_HOME, or name the "
            "files: `plugins build --out`, NEMOQUANT_KERNELS, NEMOQUANT_PLUGINS"
        ) from None
    return caches / "nemoquant/plugins"


def tensorrt_headers() -> Path | None:
    """The folder of NvInferRuntime.h: in TENSORRT_ROOT, else in an installed kernel-lens; else None.

    Raises:
        BuildError: TENSORRT_ROOT is set and has no such file.
    """
    return _headers("NvInferRuntime.h", "TENSORRT_ROOT", "kernel_lens", "include/tensorrt")


def cutlass_headers() -> Path | None:
    """The folder of cutlass/cutlass.h: in CUTLASS_ROOT, else in an installed nvidia-cutlass; else None.

    Raises:
        BuildError: CUTLASS_ROOT is set and has no such file.
    """
    return _headers("cutlass/cutlass.h", "CUTLASS_ROOT", "cutlass_library", "source/include")


def _headers(name: str, variable: str, package: str, inside: str) -> Path | None:
    root = os.environ.get(variable)
    if root:
        folder = next((at for at in (Path(root), Path(root) / "include") if (at / name).is_file()), None)
        if folder is None:
            raise BuildError(
                f"{variable}={root}: no {name} there, nor in its include; expected a folder that has it, or "
                f"no {variable}"
            )
        return folder
    spec = importlib.util.find_spec(package)
    places = [Path(at) / inside for at in (spec.submodule_search_locations or [])] if spec else []
    return next((at for at in places if (at / name).is_file()), None)


def tensorrt_version(headers: Path) -> str:
    """The version that the headers define, such as ``10.14.1``; ``?`` for a part that they lack."""
    text = (headers / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    numbers = [
        re.search(rf"#define (?:TRT_{part}_ENTERPRISE|NV_TENSORRT_{part}) (\d+)", text)
        for part in ("MAJOR", "MINOR", "PATCH")
    ]
    return ".".join(match[1] if match else "?" for match in numbers)


def parse_architectures(names: Sequence[str]) -> tuple[str, ...]:
    """``sm_90a`` or ``90a`` -> ``90a``; one string may hold several names, separated by commas.

    Raises:
        UsageError: a name that is not an architecture's.
    """
    parsed = [part.strip().removeprefix("sm_") for name in names for part in name.split(",")]
    for part in parsed:
        if not re.fullmatch(r"\d{2,3}[af]?", part):
            raise UsageError(
                f"--arch {part}: expected names as nvcc has them, such as sm_90a; the default is "
                f"{', '.join(ARCHITECTURES)}"
            )
    return tuple(dict.fromkeys(parsed))


def unknown_to_nvcc(architectures: Sequence[str]) -> str | None:
    """Why the nvcc on the PATH can't compile for one of these, as a sentence; None if it can for all."""

    def said(option: str) -> str:
        return subprocess.run(["nvcc", option], check=False, capture_output=True, text=True).stdout

    release = re.search(r"release (\d+)\.(\d+)", said("--version"))
    version = (int(release[1]), int(release[2])) if release else (0, 0)
    known = re.findall(r"sm_(\d+)", said("--list-gpu-code"))
    for name in architectures:
        why = (
            f"its code is for {', '.join(f'sm_{number}' for number in known)}"
            if name.rstrip("af") not in known
            else "names with f are known from 12.9 on"
            if name.endswith("f") and version < (12, 9)
            else None
        )
        if why and release:
            return (
                f"--arch sm_{name}: nvcc {release[1]}.{release[2]} does not know it: {why}; name others with "
                f"--arch, or install a later CUDA toolkit"
            )
    return None


def gemm_families() -> tuple[int, ...]:
    """The families, such as 90, for which an operator has CUTLASS's grouped products."""
    names = {path.stem.removeprefix("grouped_sm") for path in plugin_folder().glob("*/grouped_sm*.cu")}
    return tuple(sorted(map(int, names)))


def in_family(architecture: str, family: int) -> bool:
    """Whether an architecture has a family's instructions: 100a, 100f and 103a those of 100, 100 not."""
    number = int(architecture.rstrip("af"))
    return architecture[-1] in "af" and number // 10 == family // 10 and number >= family


def build(
    out: Path | None = None,
    architectures: Sequence[str] = ARCHITECTURES,
    *,
    gemm: Sequence[str] = (),
    jobs: int | None = None,
    host: bool = False,
    faces: bool = True,
    strict: bool = False,
    progress: Progress = no_progress,
) -> Built:
    """Compile the libraries, and put them into ``out``.

    Args:
        out: folder; default :func:`default_folder`. Intermediate files stay in ``out/work``, so that a second
            build is quick.
        architectures: as of :func:`parse_architectures`; not used for the host.
        gemm: which of them get CUTLASS's grouped products; of a family in :func:`gemm_families`.
        jobs: number of compilers at once; default: the CPUs of this process.
        host: build for the emulator on the CPU, instead of for GPUs.
        faces: build the TensorRT plugins too, which needs TensorRT's headers.
        strict: warnings are errors.
    Raises:
        BuildError: a tool or headers are missing, or the build failed.
        OutputError: ``out`` can't be written.
        UsageError: ``gemm`` has an architecture that is not built, or of no such family.
    """
    families = gemm_families()
    known = [name for name in architectures if any(in_family(name, family) for family in families)]
    if not set(gemm) <= set(known):
        raise UsageError(
            f"--gemm-arch {', '.join(gemm)}: expected some of those that are built, "
            f"{', '.join(architectures)}, and of the families that CUTLASS's products are written for, "
            f"{', '.join(f'sm_{family}' for family in families)}: {', '.join(known) or 'here none'}"
        )
    out = (out or default_folder()).absolute()
    lacking = missing(host, faces, gemm=bool(gemm))
    if not (lacking or host):
        lacking = unknown_to_nvcc(architectures)
    if lacking:
        raise BuildError(lacking)
    cmake, folder = shutil.which("cmake") or "cmake", plugin_folder()
    headers, cutlass = tensorrt_headers() if faces else None, cutlass_headers() if gemm else None
    ninja = shutil.which("ninja")
    options = {
        "NQ_HOST": _on(host),
        "NQ_FACES": _on(faces),
        "NQ_WERROR": _on(strict),
        "NQ_ARCHS": ";".join(architectures),
        "NQ_GEMM_ARCHS": ";".join(gemm),
        "TENSORRT_ROOT": headers or "",
        "CUTLASS_ROOT": cutlass or "",
        "Python3_EXECUTABLE": sys.executable,
    }
    work, log = out / "work" / _stem(host), out / f"{_stem(host)}.log"
    try:
        _prepare(
            work, "\n".join(map(str, (folder, cmake, ninja, shutil.which("nvcc"), os.environ.get("CXX"))))
        )
        log.write_text("", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out}: {error.strerror or error}; choose another folder with --out") from None
    sources = sources_hash()
    progress("configure", 0, 1, "")
    defined = [f"-D{name}={value}" for name, value in options.items()]
    _run([cmake, "-S", str(folder), "-B", str(work), *(["-G", "Ninja"] if ninja else []), *defined], log)
    progress("configure", 1, 1, "")
    _run([cmake, "--build", str(work), "--parallel", str(jobs or usable_threads())], log, progress)
    return _install(
        work,
        out,
        sources,
        host=host,
        architectures=() if host else tuple(architectures),
        gemm=() if host else tuple(gemm),
        headers=headers,
    )


def _on(value: bool) -> str:
    return "ON" if value else "OFF"


def _prepare(work: Path, made_with: str) -> None:
    """Make the folder in which CMake works.

    The folder of the last build is kept if it had the same source folder and tools: then only changes are
    compiled.
    """
    note = work / "made_with.txt"
    if work.exists() and not (note.is_file() and note.read_text(encoding="utf-8") == made_with):
        shutil.rmtree(work)  # CMake would refuse it, or continue with the old tools
    work.mkdir(parents=True, exist_ok=True)
    note.write_text(made_with, encoding="utf-8")


def _stem(host: bool) -> str:
    return "build_host" if host else "build"


def missing(host: bool = False, faces: bool = True, gemm: bool = False) -> str | None:
    """What a build on this machine lacks, as a sentence with the remedy; None if nothing is missing.

    Raises:
        BuildError: TENSORRT_ROOT or CUTLASS_ROOT is set and has no headers.
    """
    if shutil.which("cmake") is None:
        return (
            "cmake was not found on the PATH; expected CMake 3.22 or later: "
            "pip install cmake ninja, or the system's package"
        )
    if shutil.which("nvcc") is None:
        why = (
            "its headers of bfloat16 and half are needed on the host too"
            if host
            else "it compiles the kernels"
        )
        return (
            f"nvcc was not found on the PATH; {why}: "
            "install the CUDA toolkit, 12.9 or later, and add its bin to PATH"
        )
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
        return "no C++ compiler was found; expected g++ or clang++ on the PATH, or its name in CXX"
    if faces and tensorrt_headers() is None:
        return (
            "TensorRT's headers were not found; the plugins need those of TensorRT 10 or 11: pip install "
            "'nemoquant[plugins]' (its wheel "
            "kernel-lens has them; --no-deps kernel-lens installs no more), or set TENSORRT_ROOT to a "
            "TensorRT; --kernels-only builds "
            "what torch uses, which needs none"
        )
    if gemm and cutlass_headers() is None:
        return (
            "CUTLASS's headers were not found; --gemm-arch needs them: pip install --no-deps nvidia-cutlass "
            "(a wheel that has them), "
            "or set CUTLASS_ROOT to a checkout of CUTLASS 4"
        )
    return None


def _run(command: list[str], log: Path, progress: Progress | None = None) -> None:
    """Run a command and write its output to the log; ``[3/7]`` at the start of a line is progress."""
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                step = re.match(r"\[(\d+)/(\d+)\] (?:.*?/)?([\w.]+/[\w.]+)\.o$", line.rstrip())
                if step and progress:
                    progress("compile", int(step[1]), int(step[2]), step[3])
        except BaseException:
            process.terminate()
            raise
    if process.returncode == 0:
        if progress:
            progress("compile", 1, 1, "")
        return
    lines = log.read_text(encoding="utf-8").splitlines()
    first = next(
        (
            i
            for i, line in enumerate(lines)
            if re.search(r"\berror\b|\bfatal\b|CMake Error", line, re.IGNORECASE)
        ),
        len(lines) - 1,
    )
    reason = " ".join(line.strip() for line in lines[first : first + 4])
    raise BuildError(f"the build failed: {reason[:600]}; the whole log is {log}")


def _install(
    work: Path,
    out: Path,
    sources: str,
    *,
    host: bool,
    architectures: tuple[str, ...],
    gemm: tuple[str, ...],
    headers: Path | None,
) -> Built:
    """Copy the libraries to ``out``, each under its name only once it is whole; write ``build.json``."""
    libraries = {}
    for library in sorted(work.glob("libnemoquant_*.so")):
        if headers is None and "plugins" in library.name:
            continue  # left by an earlier build
        partial = out / f"{library.name}.partial"
        copy_again(library, partial)
        shutil.copystat(library, partial)
        rename(partial, out / library.name)
        libraries[library.name] = hashlib.sha256((out / library.name).read_bytes()).hexdigest()
    version = tensorrt_version(headers) if headers else None
    built = Built(__version__, sources, host, architectures, gemm, tensorrt=version, libraries=libraries)
    replace_text(out / f"{_stem(host)}.json", json.dumps(asdict(built), indent=1) + "\n")
    return built

"""The host libraries for the tests of the plugins, built once and kept until a source changes."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from nemoquant.ops.build import build, tensorrt_headers, tensorrt_version
from nemoquant.ops.built import read_built
from nemoquant.ops.sources import sources_hash
from support.places import PLUGINS, TESTS

HERE = TESTS / "plugins"
OPERATORS = sorted(path.parent.name for path in PLUGINS.glob("*/plugin.cpp") if path.parent.name != "common")

needs_compiler = pytest.mark.skipif(
    not all(map(shutil.which, ("cmake", "nvcc", "g++"))),
    reason="needs g++, cmake, and the CUDA toolkit for its bfloat16 and half types",
)
needs_tensorrt_headers = pytest.mark.skipif(
    tensorrt_headers() is None,
    reason="needs TensorRT's headers: pip install --no-deps kernel-lens, or TENSORRT_ROOT",
)


@cache
def cuda_headers() -> Path:
    """The headers next to nvcc."""
    tried = subprocess.run(
        ["nvcc", "--dryrun", "-E", "-x", "cu", "/dev/null"], check=True, capture_output=True, text=True
    ).stderr
    return (
        Path(next(line.split("=", 1)[1] for line in tried.splitlines() if line.startswith("#$ TOP=")))
        / "include"
    )


def cache_folder() -> Path:
    """The folder for this user, these sources and these headers; any change gives a new one.

    Or the one that NQ_HOST_FOLDER names, in which what has changed alone is compiled again.
    """
    if named := os.environ.get("NQ_HOST_FOLDER"):
        return Path(named)
    headers = tensorrt_headers()
    faces = f"tensorrt-{tensorrt_version(headers)}" if headers else "kernels"
    return Path(tempfile.gettempdir()) / f"nemoquant-host-{os.getuid()}" / f"{sources_hash()[:16]}-{faces}"


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Only one process at a time compiles into a folder, which other sessions may use too."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def host_folder() -> Path:
    """The folder with libnemoquant_host.so and, if TensorRT's headers exist, libnemoquant_plugins_host.so."""
    folder = cache_folder()
    with building(folder):
        built = read_built(folder, host=True) if folder.is_dir() else None
        if built is None or built.sources != sources_hash():
            build(folder, host=True, faces=tensorrt_headers() is not None, strict=True)
    return folder


def harness() -> Path:
    """``tests/plugins/trt_caller.cpp``, compiled next to them."""
    source = HERE / "trt_caller.cpp"
    library = host_folder() / "trt_caller.so"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    compile_once(
        [*command, f"-isystem{tensorrt_headers()}", f"-isystem{cuda_headers()}", source], library, source
    )
    return library


def compile_once(command: list[str | Path], library: Path, source: Path) -> None:
    """Runs a compiler for a library, unless the library exists and is newer than its source."""
    with building(library.parent):
        if not library.is_file() or library.stat().st_mtime < source.stat().st_mtime:
            unfinished = library.with_suffix(".unfinished")
            subprocess.run([*command, "-o", unfinished], check=True)
            unfinished.replace(library)

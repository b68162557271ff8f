"""What the tests of the plugins share: the host libraries, built once and kept while the sources are the
same."""

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

from nemoquant.ops.build import build, read_built, tensorrt_headers, tensorrt_version
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
    """Beside nvcc."""
    tried = subprocess.run(
        ["nvcc", "--dryrun", "-E", "-x", "cu", "/dev/null"], check=True, capture_output=True, text=True
    ).stderr
    return (
        Path(next(line.split("=", 1)[1] for line in tried.splitlines() if line.startswith("#$ TOP=")))
        / "include"
    )


def cache_folder() -> Path:
    """Of this user, these sources and these headers; a change of any makes a new one."""
    headers = tensorrt_headers()
    faces = f"tensorrt-{tensorrt_version(headers)}" if headers else "kernels"
    return Path(tempfile.gettempdir()) / f"nemoquant-host-{os.getuid()}" / f"{sources_hash()[:16]}-{faces}"


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """One process at a time compiles into a folder, which may be another session's too."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def host_folder() -> Path:
    """With libnemoquant_host.so and, where TensorRT's headers are, libnemoquant_plugins_host.so."""
    folder = cache_folder()
    with building(folder):
        built = read_built(folder, host=True) if folder.is_dir() else None
        if built is None or built.sources != sources_hash():
            build(folder, host=True, faces=tensorrt_headers() is not None, strict=True)
    return folder


def harness() -> Path:
    """``tests/plugins/trt_caller.cpp``, compiled beside them."""
    source = HERE / "trt_caller.cpp"
    library = host_folder() / "trt_caller.so"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    compile_once(
        [*command, f"-isystem{tensorrt_headers()}", f"-isystem{cuda_headers()}", source], library, source
    )
    return library


def compile_once(command: list[str | Path], library: Path, source: Path) -> None:
    """Run a compiler for a library, unless it is there and newer than its source."""
    with building(library.parent):
        if not library.is_file() or library.stat().st_mtime < source.stat().st_mtime:
            unfinished = library.with_suffix(".unfinished")
            subprocess.run([*command, "-o", unfinished], check=True)
            unfinished.replace(library)

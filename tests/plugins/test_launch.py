"""Launching on a device: what platform.cuh asks of CUDA's runtime, which a stand-in records and lets fail."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from support.plugin_build import HERE, PLUGINS, needs_compiler

pytestmark = [needs_compiler, pytest.mark.slow]

KERNELS = """
#include "common/platform.cuh"
struct Params { float* out; int value; };
namespace {
template <class T, int step>
__global__ void kernel(const __grid_constant__ Params p, bool twice) {
    NQ_DYNAMIC_SHARED(float, shared);
    shared[threadIdx.x] = T(p.value * step * (twice ? 2 : 1));
    p.out[threadIdx.x] = shared[threadIdx.x];
}
}  // namespace
extern "C" int one(size_t bytes) {
    return NQ_LAUNCH((kernel<float, 1>), dim3(2), dim3(32), bytes, nullptr, Params{}, true);
}
extern "C" int two(size_t bytes) {
    return NQ_LAUNCH((kernel<float, 2>), dim3(2), dim3(32), bytes, nullptr, Params{}, true);
}
extern "C" size_t most() { return nq::shared_limit(); }
"""


class Runtime:
    """The launcher over the stand-in, freshly loaded."""

    def __init__(self, library: Path) -> None:
        self.all = ctypes.CDLL(str(library))
        for name in ("fake_take", "nemoquant_last_error"):
            getattr(self.all, name).restype = ctypes.c_char_p
        self.all.most.restype = ctypes.c_size_t

    def fail(self, name: str) -> None:
        """The next call of that name fails."""
        self.all.fake_fail(name.encode())

    def launch(self, name: str = "one", size: int = 0) -> tuple[int, list[str]]:
        """The code, and what was asked of the runtime."""
        code = getattr(self.all, name)(ctypes.c_size_t(size))
        assert self.all.fake_mode() == 0  # as before
        assert self.all.fake_last() == 0  # no error is left for another's next launch
        return code, self.all.fake_take().decode().split()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    (folder / "kernels.cu").write_text(KERNELS, encoding="utf-8")
    options = ["-std=c++17", "-O1", "-Werror", "all-warnings", "-Xcompiler=-fPIC,-Wall,-Wextra"]
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-I", PLUGINS]
    linked = [
        "-shared",
        "-cudart",
        "none",
        "-Xlinker",
        "-Bsymbolic",
    ]  # the stand-in's, whatever else is loaded
    sources = [folder / "kernels.cu", HERE / "fake_cudart.cpp", PLUGINS / "common/last_error.cpp"]
    subprocess.run(["nvcc", *options, *target, *linked, *sources, "-o", folder / "ours.so"], check=True)
    return folder / "ours.so"


@pytest.fixture
def runtime(built: Path, tmp_path: Path) -> Runtime:
    """Each test has a process-wide state of its own: a copy of the library."""
    return Runtime(Path(shutil.copy(built, tmp_path)))


LOADED = ["load(relaxed)", "limit=199984"]  # 200000 less the 16 bytes that the kernel declares itself


def test_code_is_loaded_once_for_each_kernel_and_device_at_its_first_launch(runtime: Runtime) -> None:
    """In relaxed mode, since that launch may be captured; later ones are in the caller's mode."""
    assert runtime.launch() == (0, [*LOADED, "launch=0(relaxed)"])
    assert runtime.launch(size=100_000) == (0, ["launch=100000"])
    assert runtime.launch("two", 60_000) == (0, [*LOADED, "launch=60000(relaxed)"])
    runtime.all.fake_device(1)
    assert runtime.launch() == (0, [*LOADED, "launch=0(relaxed)"])
    runtime.all.fake_device(0)
    assert runtime.launch() == (0, ["launch=0"])
    runtime.all.fake_device(64)  # beyond those whose state is kept
    for _ in range(2):
        assert runtime.launch() == (0, [*LOADED, "launch=0(relaxed)"])


@pytest.mark.parametrize(
    ("fails", "call", "calls"),
    [
        ("load", "cudaFuncGetAttributes", LOADED[:1]),
        ("limit", "cudaFuncSetAttribute", LOADED),
        ("launch", "cudaLaunchKernel", [*LOADED, "launch=512(relaxed)"]),
    ],
)
def test_a_call_that_fails_is_said_and_leaves_nothing_behind(
    fails: str, call: str, calls: list[str], runtime: Runtime
) -> None:
    """Neither its error, which the next launch would report, nor a kernel that counts as loaded."""
    runtime.fail(fails)
    assert runtime.launch(size=512) == (3, calls)
    assert f"(kernel<float, 1>), grid 2 x 1 x 1, 512 bytes of shared memory: {call}: a reason" in (
        runtime.all.nemoquant_last_error().decode()
    )
    assert runtime.launch(size=512) == (0, [*LOADED, "launch=512(relaxed)"])


def test_after_a_launch_that_failed_everything_is_made_anew(runtime: Runtime) -> None:
    """The context may be another one than it was, in which the limit is not raised."""
    runtime.launch()
    runtime.fail("launch")
    assert runtime.launch(size=60_000) == (3, ["launch=60000"])
    assert runtime.launch(size=60_000) == (0, [*LOADED, "launch=60000(relaxed)"])


def test_without_a_device_nothing_is_left_behind_either(runtime: Runtime) -> None:
    runtime.fail("cudaGetDevice")
    assert runtime.all.most() == 0
    assert runtime.all.fake_last() == 0
    runtime.fail("cudaGetDevice")
    assert runtime.launch() == (3, ["cudaGetDevice", "cudaGetDevice"])

"""The host emulator of CUDA: kernels with known results, and wrong kernels that it must refuse."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.plugin_build import HERE, PLUGINS, cuda_headers
from support.scan_call import aligned

COMMON = PLUGINS / "common"
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(
    NVCC is None or shutil.which("g++") is None,
    reason="needs g++ and the CUDA toolkit's headers (bfloat16 and half types)",
)

Run = Callable[..., tuple[int, NDArray[np.float32], str]]


@pytest.fixture(scope="module", params=["own switch", "ucontext"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a kernel of ``emulator_kernels.cu`` by the first letter of its name -> error code, output, reason.

    Stacks are switched by hand-written code on x86-64, and by the C library elsewhere.
    """
    library = tmp_path_factory.mktemp("emulator") / "emulator.so"
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fPIC",
            "-shared",
            "-DNQ_HOST",
            *(["-DNQ_UCONTEXT"] if request.param == "ucontext" else []),
            f"-isystem{cuda_headers()}",
            "-x",
            "c++",
            HERE / "emulator_kernels.cu",
            COMMON / "last_error.cpp",
            "-o",
            library,
        ],
        check=True,
    )
    loaded = ctypes.CDLL(str(library))
    loaded.nemoquant_last_error.restype = ctypes.c_char_p

    def call(
        name: str,
        given: NDArray[np.float32],
        size: int,
        count: int = 0,
        order: tuple[int, int, int] = (0, 0, 0),
    ) -> tuple[int, NDArray[np.float32], str]:
        loaded.schedule(*order)
        out = np.zeros(size, np.float32)
        pointers: list[Any] = [array.ctypes.data_as(ctypes.c_void_p) for array in (given, out)]
        code = loaded.run(name.encode(), *pointers, count, None)
        return code, out, loaded.nemoquant_last_error().decode() if code else ""

    return call


def whole_numbers(*shape: int) -> NDArray[np.float32]:
    """Whole numbers: their sums are exact in any order."""
    return np.random.default_rng(0).integers(-50, 50, shape).astype(np.float32)


def test_barriers_shared_memory_and_atomics(run: Run) -> None:
    given = whole_numbers(1000)
    code, out, _ = run("sum", given, 2, 1000)
    assert (code, out.tolist()) == (0, [given.sum(), given[0]])


def test_warp_exchanges(run: Run) -> None:
    given = whole_numbers(64)
    code, out, _ = run("warps", given, 64 * 6)
    rows = out.reshape(2, 32, 6)
    warps = given.reshape(2, 32)
    assert code == 0
    for row, warp in zip(rows, warps, strict=True):
        expected = np.zeros((32, 6), np.float32)
        expected[:, 0] = warp.sum()
        expected[:, 1] = warp.cumsum()
        expected[:, 2] = [warp[i + 1] if i % 8 < 7 else warp[i] for i in range(32)]
        expected[:, 3] = warp[3::4].repeat(4)
        expected[:, 4] = (warp > 0).sum()
        expected[:16, 5] = warp[:16].reshape(8, 2)[:, ::-1].ravel()
        assert np.array_equal(row, expected)


def test_threads_that_left_are_not_waited_for(run: Run) -> None:
    given = whole_numbers(64)
    code, out, _ = run("early", given, 64)
    warps = np.zeros((2, 32), np.float32)
    warps[:, :20] = given.reshape(2, 32)[:, 19:20]
    assert (code, out.tolist()) == (0, warps.ravel().tolist())


def test_asynchronous_copies_happen_when_waited_for(run: Run) -> None:
    given = aligned(whole_numbers(256))
    halves = given.reshape(2, 128)
    second = np.where(np.arange(128) // 4 % 2 == 0, halves[1], 0.0)
    code, out, _ = run("async", given, 256, 0)
    assert code == 0
    assert np.array_equal(out.reshape(2, 128), [halves[0][::-1], second])
    _, never, _ = run("async", given, 256, 1)
    assert np.isnan(never).all()
    _, older, _ = run("async", given, 256, 2)
    assert np.array_equal(older[:128], halves[0][::-1])
    assert np.isnan(older[128:]).all()
    code, early, _ = run("async", given, 256, 1, (1, 0, 0))
    assert code == 0
    assert np.array_equal(early.reshape(2, 128), [halves[0][::-1], second])


def test_a_place_that_is_overwritten_too_early_shows_where_copies_happen_at_once(run: Run) -> None:
    given = aligned(np.arange(16, dtype=np.float32))
    code, late, _ = run("overwrites", given, 64, 4, (0, 0, 0))
    assert code == 0
    assert np.array_equal(late.reshape(2, 32)[:, :16], [given, given])
    code, early, _ = run("overwrites", given, 64, 4, (1, 0, 0))
    assert code == 0
    assert np.array_equal(early.reshape(2, 8, 4)[:, :2], [given.reshape(4, 4)[2:]] * 2)


def test_blocks_warps_and_lanes_may_take_turns_downwards(run: Run) -> None:
    turns = np.arange(128)
    for order, expected in (((0, 0, 0), turns), ((0, 1, 0), turns[::-1])):
        code, out, _ = run("turns", whole_numbers(1), 129, 0, order)
        assert code == 0
        assert np.array_equal(out[:128], expected)
    code, out, _ = run("turns", whole_numbers(1), 129, 0, (0, 0, 1))
    assert code == 0
    assert np.array_equal(out[:128], np.concatenate([np.zeros(64), turns[:64]]))


def test_grids_and_blocks_of_three_dimensions(run: Run) -> None:
    code, out, _ = run("coordinates", whole_numbers(1), 12 * 24)
    assert code == 0
    assert np.array_equal(out.reshape(12, 24), 1 + np.arange(24) + 100 * np.arange(12)[:, None])


@pytest.mark.parametrize(
    ("kernel", "count", "reason"),
    [
        pytest.param("vain", 0, "block (0, 0, 0) waits at", id="threads at different barriers"),
        pytest.param(
            "behind", 4, "wrote behind its 16 bytes of shared memory", id="a write behind shared memory"
        ),
        pytest.param("most", 0, "more shared memory than the 232448 bytes", id="too much shared memory"),
        pytest.param("x", 0, "1025 threads in a block, expected 1 to 1024", id="too many threads"),
    ],
)
def test_wrong_kernels_are_errors_and_the_next_one_runs(
    kernel: str, count: int, reason: str, run: Run
) -> None:
    code, _, said = run(kernel, whole_numbers(64), 64, count)
    assert code == 3
    assert reason in said
    assert run("sum", whole_numbers(100), 2, 100)[0] == 0

"""The math that all kernels share, in the host build.

Random words, rounding, exp and softplus, packed formats, matrix products.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from support.plugin_build import HERE, PLUGINS, cuda_headers

COMMON = PLUGINS / "common"
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(
    NVCC is None or shutil.which("g++") is None,
    reason="needs g++ and the CUDA toolkit's headers (bfloat16 and half types)",
)

Array = NDArray[Any]
EXP, LOG1P, SOFTPLUS, BY_CHANCE, TO_E4M3, TO_E2M1, PAIR, FROM_E4M3, FROM_E2M1, BYTES, PHILOX = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    100,
)
OUTPUT = {BY_CHANCE: np.uint16, TO_E4M3: np.uint8, TO_E2M1: np.uint8, PAIR: np.uint32, BYTES: np.uint32}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("numeric") / "numeric.so"
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O2",
            "-ffp-contract=off",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fPIC",
            "-shared",
            "-DNQ_HOST",
            f"-isystem{cuda_headers()}",
            "-x",
            "c++",
            HERE / "numeric_kernels.cu",
            COMMON / "last_error.cpp",
            "-o",
            path,
        ],
        check=True,
    )
    return ctypes.CDLL(str(path))


def pointer(array: Array | None) -> Any:
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


@pytest.fixture(scope="module")
def numbers(library: ctypes.CDLL) -> Callable[..., Array]:
    """Calls a function on an array."""

    def call(mode: int, given: Array, more: Array | None = None) -> Array:
        given = np.ascontiguousarray(given)
        count = len(given)
        out = (
            np.zeros((count, 4), np.uint32)
            if mode >= PHILOX
            else np.zeros(count, OUTPUT.get(mode, np.float32))
        )
        assert (
            library.run_numbers(
                pointer(given), pointer(more), pointer(out), ctypes.c_int64(count), mode, None
            )
            == 0
        )
        return out

    return call


# Philox. The published vectors are from Random123, tests/kat_vectors, the lines "philox4x32 7" and
# "philox4x32 10".

DIGITS = "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0"  # of pi
PUBLISHED = [
    (7, "00000000 " * 6, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff " * 6, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, DIGITS, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 " * 6, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff " * 6, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, DIGITS, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> NDArray[np.uint32]:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


def philox(row: NDArray[np.uint32], rounds: int) -> list[int]:
    """The definition in Python integers: four words of counter, two of key."""
    c, key = [int(w) for w in row[:4]], [int(w) for w in row[4:]]
    for _ in range(rounds):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (second >> 32) ^ c[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ c[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize(("rounds", "given", "expected"), PUBLISHED)
def test_philox_published_vectors(
    rounds: int, given: str, expected: str, numbers: Callable[..., Array]
) -> None:
    assert philox(words(given), rounds) == words(expected).tolist()
    assert numbers(PHILOX + rounds, words(given)[None])[0].tolist() == words(expected).tolist()


def test_philox_of_five_rounds_is_the_definition(numbers: Callable[..., Array]) -> None:
    given = np.random.default_rng(0).integers(0, 2**32, (1000, 6), np.uint32)
    assert numbers(PHILOX + 5, given).tolist() == [philox(row, 5) for row in given]


# Stochastic rounding to float16.


def test_rounding_by_chance_is_unbiased(numbers: Callable[..., Array]) -> None:
    """A million values of all sizes: the mean error, in float16 ulps, is within three standard errors of 0.

    Also in each decade alone, subnormals too.
    """
    g = np.random.default_rng(1)
    x = (g.standard_normal(1_000_000) * np.exp2(g.uniform(-26, 14, 1_000_000))).astype(np.float32)
    random = g.integers(0, 2**32, x.size, np.uint32)
    rounded = numbers(BY_CHANCE, x, random).view(np.float16).astype(np.float64)
    ulp = np.exp2(np.maximum(np.floor(np.log2(np.abs(x.astype(np.float64)))), -14) - 10)
    error = (rounded - x) / ulp
    assert np.abs(error).max() < 1
    sizes = [
        np.abs(x) < 2.0**-24,
        *[(np.abs(x) >= 2.0**low) & (np.abs(x) < 2.0 ** (low + 4)) for low in range(-24, 16, 4)],
    ]
    for chosen in [np.full(x.size, True), *sizes]:
        assert abs(error[chosen].mean()) < 3 * error[chosen].std() / np.sqrt(chosen.sum())


def test_rounding_by_chance_goes_up_as_often_as_it_is_far(numbers: Callable[..., Array]) -> None:
    """The exact boundary between up and down: up where fraction + random / 2^32 reaches 1."""
    for x, ulp in [
        (1.0 + 2.0**-12, 2.0**-10),
        (2.0**-26, 2.0**-24),
        (-(3.0 + 2.0**-11), 2.0**-9),
        (65504.0 + 8, 32.0),
    ]:
        low = np.trunc(x / ulp) * ulp
        fraction = abs(x - low) / ulp
        bound = int((1 - fraction) * 2**32)
        random = np.array([0, bound - 1, bound, 2**32 - 1], np.uint32)
        found = numbers(BY_CHANCE, np.full(4, x, np.float32), random).view(np.float16)
        away = low + np.copysign(ulp, x) if abs(low) < 65504 else np.copysign(np.inf, x)
        assert found.tolist() == [low, low, away, away]


def test_rounding_by_chance_leaves_what_is_exact(numbers: Callable[..., Array]) -> None:
    codes = np.arange(2**16, dtype=np.uint16)
    x = codes.view(np.float16).astype(np.float32)
    for random in (0, 2**32 - 1):
        found = numbers(BY_CHANCE, x, np.full(x.size, random, np.uint32))
        number = ~np.isnan(x)
        assert np.array_equal(found[number], codes[number])
        assert np.isnan(found.view(np.float16)[~number]).all()
    assert numbers(BY_CHANCE, np.array([70000, -1e30], np.float32), np.zeros(2, np.uint32)).tolist() == [
        0x7C00,
        0xFC00,
    ]


# Functions with the same bits on every device: error against float64, in units in the last place.


@pytest.mark.parametrize(
    ("mode", "low", "high", "function", "most"),
    [
        pytest.param(EXP, -87.0, 88.7, np.exp, 2, id="exp"),
        pytest.param(LOG1P, 0.0, 1.0, np.log1p, 2, id="log1p"),
        pytest.param(SOFTPLUS, -87.0, 100.0, lambda x: np.logaddexp(0, x), 3, id="softplus"),
    ],
)
def test_function_is_accurate(
    mode: int,
    low: float,
    high: float,
    function: Callable[[Array], Array],
    most: int,
    numbers: Callable[..., Array],
) -> None:
    """Each rounds a few times: exp and log1p err by less than two units, softplus, of both, by three."""
    x = np.concatenate(
        [np.linspace(low, high, 400_001), np.random.default_rng(2).uniform(-1, 1, 100_000) * min(1, high)]
    )
    x = np.clip(x, low, high).astype(np.float32)
    found, truth = numbers(mode, x).astype(np.float64), function(x.astype(np.float64))
    unit = np.spacing(np.abs(truth).astype(np.float32)).astype(np.float64)
    assert (np.abs(found - truth) / unit).max() < most


def test_ends_of_exp(numbers: Callable[..., Array]) -> None:
    x = np.array([-np.inf, -1000, -104.5, -100, 0, 88.8, 1000, np.inf, np.nan], np.float32)
    found = numbers(EXP, x)
    with np.errstate(over="ignore"):
        expected = np.exp(x.astype(np.float64)).astype(np.float32)
    assert np.array_equal(found, expected, equal_nan=True)


# Packed formats, against ml_dtypes.


def test_e4m3(numbers: Callable[..., Array]) -> None:
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(numbers(FROM_E4M3, codes), values, equal_nan=True)
    finite = np.sort(values[~np.isnan(values)].astype(np.float64))
    middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    x = np.concatenate(
        [middle, np.nextafter(middle, np.float32(1e9)), np.nextafter(middle, np.float32(-1e9)), [1e9, -1e9]]
    )
    x = x.astype(np.float32)
    expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(numbers(TO_E4M3, x), expected)


def test_e2m1(numbers: Callable[..., Array]) -> None:
    codes = np.arange(16, dtype=np.uint8)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert numbers(FROM_E2M1, codes).tolist() == magnitudes + [-m for m in magnitudes]
    middle = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    even, above, below = [0, 2, 2, 4, 4, 6, 6], [1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6]
    x = np.concatenate(
        [middle, np.nextafter(middle, np.float32(9)), np.nextafter(middle, np.float32(0)), [100.0]]
    )
    x = x.astype(np.float32)
    expected = [*even, *above, *below, 7]
    assert numbers(TO_E2M1, x).tolist() == expected
    assert numbers(TO_E2M1, -x).tolist() == [8 + code for code in expected]
    assert numbers(TO_E2M1, np.array([0.0, -0.0], np.float32)).tolist() == [0, 0]


def test_pairs_have_the_first_in_the_low_half(numbers: Callable[..., Array]) -> None:
    assert numbers(PAIR, np.array([1.0], np.float32)).tolist() == [0xBF803F80]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "code"), [(np.float16, 1), (ml_dtypes.bfloat16, 2)])
def test_matrix_product(dtype: Any, code: int, transposed: bool, library: ctypes.CDLL) -> None:
    """Whole numbers give exact products.

    D [16, 8] += A [16, 16] B, where B is stored by columns or by rows.
    """
    g = np.random.default_rng(3)
    a, b = (g.integers(-8, 9, (16, 16)).astype(dtype) for _ in range(2))
    d = g.integers(-100, 100, (16, 8)).astype(np.float32)
    right = b[:, :8] if transposed else b[:8].T
    expected = d + a.astype(np.float32) @ right.astype(np.float32)
    assert library.run_product(pointer(a), pointer(b), pointer(d), code, int(transposed), None) == 0
    assert np.array_equal(d, expected)


@pytest.mark.parametrize("mode", range(4))
def test_product_of_scaled_blocks(mode: int, library: ctypes.CDLL) -> None:
    """D [16, 8] += A [16, 64] B with every E2M1 code; E4M3 scales are powers of two, so sums are exact.

    The modes are the lanes that provide the scales; the values in other lanes must not matter.
    """
    g = np.random.default_rng(4)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
    values = np.concatenate([values, -values])
    codes = g.integers(0, 16, (24, 64), np.uint8)
    scales = (2.0 ** g.integers(-3, 4, (24, 4))).astype(ml_dtypes.float8_e4m3fn)
    full = values[codes] * scales.astype(np.float64).repeat(16, 1)
    d = g.integers(-100, 100, (16, 8)).astype(np.float32)
    expected = d + full[:16] @ full[16:].T
    a, b = np.ascontiguousarray(codes[:16]), np.ascontiguousarray(codes[16:])
    assert library.run_scaled_product(pointer(a), pointer(b), pointer(scales), pointer(d), mode, None) == 0
    assert np.array_equal(d, expected)


def test_a_scale_with_a_sign_is_refused(library: ctypes.CDLL) -> None:
    """The instruction's scales have no sign, so a kernel that passes one is wrong."""
    codes, d = np.zeros((16, 64), np.uint8), np.zeros((16, 8), np.float32)
    scales = np.full((24, 4), 0x80, np.uint8)
    library.nemoquant_last_error.restype = ctypes.c_char_p
    assert (
        library.run_scaled_product(pointer(codes), pointer(codes), pointer(scales), pointer(d), 0, None) != 0
    )
    assert b"a block scale with its top bit set" in library.nemoquant_last_error()


def test_bytes_by_their_numbers(numbers: Callable[..., Array]) -> None:
    found = numbers(BYTES, np.array([0x3210, 0x7654, 0x5140, 0x7362], np.uint32))
    assert found.tolist() == [0x33221100, 0x77665544, 0x55114400, 0x77336622]


@pytest.mark.parametrize(
    ("arch", "option", "used"), [("100a", True, True), ("100a", False, False), ("120a", True, False)]
)
def test_the_conversion_instruction_is_an_option_of_sm100(
    arch: str, option: bool, used: bool, tmp_path: Path
) -> None:
    """Compiled and assembled only: no device with this instruction was at hand."""
    source = tmp_path / "pair.cu"
    source.write_text(
        '#include "numeric.cuh"\n'
        "__global__ void pair(const float* x, const uint32_t* r, uint32_t* y) {\n"
        "    y[0] = nq::half_pair_by_chance(x[0], x[1], r[0], r[1]);\n}\n",
        encoding="utf-8",
    )
    command = [
        NVCC,
        "-std=c++17",
        "-Werror",
        "all-warnings",
        "-keep",
        "-keep-dir",
        tmp_path,
        "-cubin",
        f"-I{COMMON}",
    ]
    defined = ["-DNQ_CVT_RS"] if option else []
    subprocess.run(
        [
            *command,
            *defined,
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            source,
            "-o",
            tmp_path / "pair.cubin",
        ],
        check=True,
    )
    assert ("cvt.rs" in (tmp_path / "pair.ptx").read_text()) == used

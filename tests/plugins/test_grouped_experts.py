"""Grouped products of RoutedExperts on the host: all code around CUTLASS.

Plain loops replace CUTLASS (grouped_products.cpp). CUTLASS itself does not run here, nor anywhere without a
GPU: see plugins/routed_experts/README.md.
"""

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.expert_call import (
    BASE,
    NUMPY,
    ROWS,
    Case,
    Given,
    arguments,
    exact_numbers,
    given,
    mixture,
    replace_tokens,
)
from support.norms import relative_error as distance
from support.plugin_build import HERE, PLUGINS, compile_once, cuda_headers, host_folder, needs_compiler
from support.scan_call import aligned

from nemoquant.errors import EngineError
from nemoquant.ops.build import cutlass_headers
from nemoquant.ops.library import Kernels
from nemoquant.ops.sources import sources_hash

pytestmark = [needs_compiler, pytest.mark.slow]

AUTO, DECODED, GROUPED = 0, 1, 3  # enum nemoquant_experts_products
SM90, SM100 = 90, 100
FORMATS = {
    "bf16": ("bfloat16",),
    "fp8": ("float32", "bfloat16", "float16"),
    "nvfp4": ("float32", "bfloat16", "float16"),
}  # dtypes of x
WAYS = [("bf16", SM90), ("fp8", SM90), ("bf16", SM100), ("fp8", SM100), ("nvfp4", SM100)]
SOURCES = ("launch.cu", "native_sm120.cu", "plain.cu")
Array = np.ndarray[Any, Any]


class Device:
    """The kernels with both architectures' products; either device can be emulated."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self._library = ctypes.CDLL(str(kernels.path))

    def be(self, capability: int) -> None:
        """Sets the device's compute capability; 0: the emulator's own."""
        self._library.nemoquant_host_capability(capability)

    def grouped_calls(self) -> int:
        """Grouped products since the last call, two a slab."""
        return int(self._library.test_grouped_calls())


@pytest.fixture(scope="session")
def library() -> Kernels:
    """The host library, built as if both architectures' products were there; the stand-in provides them."""
    path = host_folder() / f"libnemoquant_grouped_host_{sources_hash()[:8]}.so"
    ours = [HERE / "grouped_products.cpp", PLUGINS / "common/emulator.cpp", PLUGINS / "common/last_error.cpp"]
    options = [
        "-std=c++17",
        "-O2",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-DNQ_HOST",
        f"-isystem{cuda_headers()}",
    ]
    sources = [PLUGINS / "routed_experts" / name for name in SOURCES]
    runs_on = {"GROUPED_SM90": (90, 90), "GROUPED_SM100": (100, 109), "NATIVE_SM120": (120, 129)}
    built = [  # as CMake finds for 90a, 100f and 120f
        word
        for name, (first, last) in runs_on.items()
        for word in (f"-DNQ_HAVE_{name}", f"-DNQ_{name}_FIRST={first}", f"-DNQ_{name}_LAST={last}")
    ]
    compile_once(["g++", *options, *built, *ours, "-x", "c++", *sources], path, ours[0])
    return Kernels(path)


@pytest.fixture
def device(library: Kernels) -> Iterator[Device]:
    made = Device(library)
    made.grouped_calls()
    yield made
    made.be(0)


def run(device: Device, a: Given, products: int = GROUPED, **more: Any) -> Array:
    """y; the workspace is full of NaN and has guard bytes after it."""
    y = aligned(np.full(a.x.shape, 99, a.x.dtype))
    plain = arguments(a, y) | {"products": products} | more
    size = device.kernels.workspace("routed_experts", **plain)
    workspace = aligned(np.full(size + 64, 0xFF, np.uint8))
    workspace[size:] = 0x5A
    device.kernels.call("routed_experts", **plain | {"workspace": workspace.ctypes.data})
    assert (workspace[size:] == 0x5A).all()
    return y


def firm_tokens(a: Given, exact: Array) -> Array:
    """Tokens whose hidden codes don't depend on a change of 1e-6.

    A sum in another order may change the others, a twentieth at most.
    """
    firm = np.ones(len(exact), bool)
    if a.format == "bf16":
        return firm
    for nudge in (1e-6, -1e-6):
        firm &= (np.abs(mixture(a, nudge=nudge) - exact) < 1e-6 * np.abs(exact).max()).all(1)
    assert (~firm).sum() <= max(1, len(firm) // 20)
    return firm


NAMES = [
    "the base",
    "one token",
    "one expert a token",
    "every expert for every token",
    "one expert of all",
    "experts without tokens, the first and the last among them",
    "all tokens on one expert",
    "65 tokens an expert, tile 64",
    "three tiles of 64 and 5",
    "pairs of two sorting blocks",
    "pairs of three sorting blocks, more experts than threads",
    "the least sizes",
    "one chunk",
    "rows of two wide blocks",
    "more chunks than are under way, up",
]
CASES = {name: replace(ROWS[name], tile=0) for name in NAMES} | {
    "128 tokens an expert, as many as a tile of scales has": replace(ROWS["one expert of all"], tokens=128),
    "129 tokens an expert, and more of others": Case(tokens=270, chosen=1, experts=2, input=96, width=64),
    "scales of half a tile, both": replace(BASE, input=32, width=96),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("format", "capability"), WAYS)
def test_against_float64(format: str, capability: int, name: str, device: Device) -> None:
    """The stand-in's sums are exact: only the roundings of the hidden values and of y remain.

    bf16: hidden values are rounded to bfloat16 once. The others: y to 2% more than rounding the exact result
    once.
    """
    a = given(format, replace(CASES[name], dtype="bfloat16"))
    device.be(capability)
    y = run(device, a).astype(np.float64)
    assert device.grouped_calls() == 2
    exact = mixture(a)
    firm = firm_tokens(a, exact)
    if firm.any():
        limit = (
            2.0**-8
            if format == "bf16"
            else 1.02 * distance(exact[firm].astype(ml_dtypes.bfloat16), exact[firm])
        )
        assert distance(y[firm], exact[firm]) <= limit


@pytest.mark.parametrize(("format", "dtype"), [(f, d) for f, dtypes in FORMATS.items() for d in dtypes])
def test_the_decoded_products_give_the_same(format: str, dtype: str, device: Device) -> None:
    """Codes are equal, and sums differ by float32's rounding.

    So do float32 results. 16-bit results may differ in a last bit here and there.
    """
    a = given(format, Case(tokens=70, chosen=4, experts=9, input=160, width=224, dtype=dtype))
    device.be(SM100)
    grouped, decoded = (run(device, a, products).astype(np.float64) for products in (GROUPED, DECODED))
    assert device.grouped_calls() == 2
    exact = mixture(a)
    firm = firm_tokens(a, exact)
    rounding = {"float32": 1e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    assert distance(grouped[firm], decoded[firm]) <= rounding
    if dtype == "bfloat16":
        assert (grouped[firm] == decoded[firm]).mean() > 0.95


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("format", "capability"), [way for way in WAYS if way[0] != "bf16"])
def test_numbers_that_are_exact_come_out_exact(
    format: str, capability: int, dtype: str, device: Device
) -> None:
    """Like the test of the same name for the other products.

    Small integers, powers of two as scales, inputs that saturate.
    """
    case = Case(tokens=150, chosen=2, experts=5, input=160, width=96, dtype=dtype)
    a, exact = exact_numbers(format, case)
    device.be(capability)
    assert (run(device, a) == exact.astype(NUMPY[dtype])).all()


@pytest.mark.parametrize(("format", "capability"), WAYS)
def test_ids_that_are_no_experts_add_nothing(format: str, capability: int, device: Device) -> None:
    """Also if no id is an expert: then there are no groups at all."""
    device.be(capability)
    case = replace(BASE, dtype="bfloat16", tokens=40)
    a, wanted = given(format, case), given(format, case)
    for token, j, id in (
        (0, 1, -1),
        (2, 0, 6),
        (2, 2, 1 << 40),
        (5, 0, -(1 << 63)),
        (5, 1, 7),
        (5, 2, (1 << 32) + 1),
        (39, 2, 6),
    ):
        a.ids[token, j], a.factors[token, j] = id, np.nan
        wanted.factors[token, j] = 0
    y = run(device, a)
    assert (y == run(device, wanted)).all()
    assert (y[5] == 0).all()
    a.ids[:] = -1
    assert (run(device, a) == 0).all()


@pytest.mark.parametrize(("format", "capability"), WAYS)
def test_a_token_alone_gives_the_bits_that_it_gives_among_others(
    format: str, capability: int, device: Device
) -> None:
    device.be(capability)
    whole = given(format, replace(BASE, dtype="bfloat16", tokens=21))
    y = run(device, whole)
    for token in (0, 20):
        assert run(device, replace_tokens(whole, [token])).tobytes() == y[token : token + 1].tobytes()


@pytest.mark.parametrize(("format", "capability"), WAYS)
def test_tokens_in_several_passes_give_the_same_bits(format: str, capability: int, device: Device) -> None:
    device.be(capability)
    a = given(format, replace(BASE, dtype="bfloat16", tokens=20))
    y = run(device, a)
    device.grouped_calls()
    assert run(device, a, slab=23).tobytes() == y.tobytes()
    assert device.grouped_calls() == 2 * 3  # passes of 7, 7 and 6 tokens


@pytest.mark.parametrize(("format", "capability"), WAYS)
def test_what_is_not_finite_stays_with_its_token(format: str, capability: int, device: Device) -> None:
    device.be(capability)
    clean, dirty = (given(format, replace(BASE, dtype="bfloat16")) for _ in range(2))
    dirty.x[4, 7] = np.nan
    y, spoilt = run(device, clean), run(device, dirty)
    assert np.isnan(spoilt[4].astype(np.float32)).all()
    others = np.arange(9) != 4
    assert spoilt[others].tobytes() == y[others].tobytes()


# The choice of products, and refusals.


@pytest.mark.parametrize(
    ("format", "capability", "runs"),
    [
        ("bf16", 90, True),
        ("fp8", 100, True),
        ("nvfp4", 100, True),
        ("nvfp4", 103, True),  # of the family of 100
        ("nvfp4", 90, False),
        ("bf16", 120, False),
        ("bf16", 110, False),
        ("bf16", 80, False),
    ],
)
def test_they_run_when_asked_for_on_the_devices_of_a_family(
    format: str, capability: int, runs: bool, device: Device
) -> None:
    a = given(format, Case(tokens=192, chosen=1, experts=3, input=32, width=32, dtype="bfloat16"))
    device.be(capability)
    run(device, a, AUTO)
    assert device.grouped_calls() == 0  # never by themselves
    if not runs:
        with pytest.raises(EngineError, match="which this library does not have for format"):
            run(device, a)
        return
    run(device, a)
    assert device.grouped_calls() == 2


@pytest.mark.parametrize(
    ("format", "dtype", "capability", "change", "says"),
    [
        (
            "bf16",
            "float32",
            SM90,
            {},
            "with format 0, dtype 0 and tile 0; expected format 0 with dtype 2, or 2 or 4, and tile 0",
        ),
        ("w4a16", "bfloat16", SM100, {}, "with format 3, dtype 2 and tile 0; expected format 0"),
        ("fp8", "bfloat16", SM90, {"tile": 32}, "with format 2, dtype 2 and tile 32; expected"),
        (
            "nvfp4",
            "bfloat16",
            SM90,
            {},
            "which this library does not have for format 4 and compute capability 9.0; expected 0 or 1",
        ),
        ("bf16", "bfloat16", 120, {}, "for format 0 and compute capability 12.0"),
    ],
)
def test_refusals(
    format: str, dtype: str, capability: int, change: dict[str, int], says: str, device: Device
) -> None:
    device.be(capability)
    a = given(format, replace(BASE, dtype=dtype))
    y = aligned(np.full(a.x.shape, 99, a.x.dtype))
    workspace = aligned(np.zeros(1 << 22, np.uint8))
    with pytest.raises(EngineError, match="routed_experts: products is 3, CUTLASS, ") as error:
        device.kernels.call("routed_experts", **arguments(a, y, workspace) | {"products": GROUPED} | change)
    assert says in str(error.value)
    assert (y == 99).all()


def test_a_library_without_them_says_so(kernels: Kernels) -> None:
    a = given("bf16", replace(BASE, dtype="bfloat16"))
    y = aligned(np.full(a.x.shape, 99, a.x.dtype))
    workspace = aligned(np.zeros(kernels.workspace("routed_experts", **arguments(a, y)), np.uint8))
    with pytest.raises(
        EngineError,
        match="CUTLASS, which this library was built without for format 0; expected 0 or 1, or a build with "
        "--gemm-arch",
    ):
        kernels.call("routed_experts", **arguments(a, y, workspace) | {"products": GROUPED})


def test_the_workspace_grows_with_every_size(device: Device, kernels: Kernels) -> None:
    """On any device; without the products, and for formats that have none, the size is unchanged."""
    base = {"tokens": 4096, "chosen": 22, "experts": 512, "input": 1024, "width": 2688, "dtype": 2}
    for format in range(5):
        for products in (AUTO, GROUPED):
            for name in ("tokens", "chosen", "experts", "input", "width"):
                many = [
                    base | {"format": format, "products": products, name: value}
                    for value in (32, 64, 96, 1024, 4064, 4096)
                ]
                sizes = [device.kernels.workspace("routed_experts", **one) for one in many]
                assert sizes == sorted(sizes)
                without = [kernels.workspace("routed_experts", **one | {"products": AUTO}) for one in many]
                assert (sizes == without) == (products == AUTO or format in (1, 3))


# The order of block scales.

LAYOUT = """
#include <cstdio>
#include <cstdlib>
#include <cute/layout.hpp>
#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/detail/sm100_blockscaled_layout.hpp>

int main(int, char** given) {
    const int rows = std::atoi(given[1]), inputs = std::atoi(given[2]);
    using Config = cutlass::detail::Sm1xxBlockScaledConfig<16>;
    const auto layout = Config::tile_atom_to_shape_SFA(cute::make_shape(rows, 1, inputs, 1));
    for (int row = 0; row < rows; ++row)
        for (int block = 0; block < inputs / 16; ++block)
            std::printf("%d\\n", int(layout(row, block * 16, 0)));
    std::printf("%d\\n", int(cute::cosize(layout)));
}
"""


@pytest.mark.skipif(
    cutlass_headers() is None,
    reason="needs CUTLASS's headers: pip install --no-deps nvidia-cutlass, or CUTLASS_ROOT",
)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 32), (128, 64), (129, 160), (300, 1024), (2688, 96)])
def test_block_scales_stand_where_cutlass_looks_for_them(
    rows: int, inputs: int, layout: Callable[[int, int], Array]
) -> None:
    """CUTLASS's own layout, compiled for the host, against our formula.

    grouped_layer.cuh and the stand-in use this formula.
    """
    row, block = np.divmod(np.arange(rows * (inputs // 16)), inputs // 16)
    across = -(-inputs // 64)
    formula = (row // 128 * across + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
    *offsets, size = layout(rows, inputs)
    assert (offsets == formula).all()
    assert size == -(-rows // 128) * across * 512


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Array]:
    folder = tmp_path_factory.mktemp("layout")
    (folder / "layout.cpp").write_text(LAYOUT)
    command = [
        "g++",
        "-std=c++17",
        "-O0",
        "-w",
        f"-isystem{cutlass_headers()}",
        f"-isystem{cuda_headers()}",
        f"-isystem{cuda_headers()}/cccl",
    ]
    subprocess.run([*command, folder / "layout.cpp", "-o", folder / "layout"], check=True)

    def of(rows: int, inputs: int) -> Array:
        done = subprocess.run(
            [folder / "layout", str(rows), str(inputs)], check=True, capture_output=True, text=True
        )
        return np.array(done.stdout.split(), np.int64)

    return of

import dataclasses
from typing import get_args

import numpy as np
import pytest
from support.processes import run_python

from nemoquant.formats import FORMATS, FormatName, ScaleMethod
from nemoquant.formats.arithmetic import round_trip
from nemoquant.formats.registry import ARITHMETIC


def test_fp8_tensors() -> None:
    assert FORMATS["fp8"].packed_tensors((3, 50)) == (
        ("codes", "F8_E4M3", (3, 50)),
        ("global_scale", "F32", ()),
    )
    assert (FORMATS["fp8"].weight_bits, FORMATS["fp8"].block) == (8, None)


def test_nvfp4_tensors() -> None:
    assert FORMATS["nvfp4"].packed_tensors((3, 64)) == (
        ("codes", "U8", (3, 32)),
        ("block_scales", "F8_E4M3", (3, 4)),
        ("global_scale", "F32", ()),
    )
    assert (FORMATS["nvfp4"].weight_bits, FORMATS["nvfp4"].block) == (4, 16)


def test_mxfp8_tensors() -> None:
    assert FORMATS["mxfp8"].packed_tensors((3, 64)) == (
        ("codes", "F8_E4M3", (3, 64)),
        ("block_scales", "U8", (3, 2)),
    )
    assert (FORMATS["mxfp8"].weight_bits, FORMATS["mxfp8"].block) == (8, 32)


def test_both_tables_have_the_same_names() -> None:
    assert tuple(FORMATS) == tuple(ARITHMETIC) == get_args(FormatName)
    for name, arithmetic in ARITHMETIC.items():
        assert FORMATS[name].name == name
        assert arithmetic.format is FORMATS[name]


@pytest.mark.parametrize("name", FORMATS)
def test_the_shapes_are_those_that_the_kernels_write(name: FormatName) -> None:
    arithmetic = ARITHMETIC[name]
    kinds = {"codes": 0, "block_scales": 1}
    weight = np.ones((3, 64), np.float32)
    for encoded in (arithmetic.zeros((3, 64)), arithmetic.encode(weight, np.float32(1))):
        found = {kind: encoded[i].shape for kind, i in kinds.items() if encoded[i] is not None}
        assert found == {t.kind: t.shape for t in FORMATS[name].packed_tensors((3, 64)) if t.kind in kinds}


# (format, method): the amax whose scale of the tensor is 1.0
UNIT = {
    ("fp8", "max"): 448.0,
    ("mxfp8", "max"): 448.0,
    ("nvfp4", "max"): 6.0 * 448.0,
    ("nvfp4", "mse"): 6.0 * 448.0,
    ("nvfp4", "four_over_six"): 6.0 * 256.0,
}


def test_every_method_has_a_case() -> None:
    assert set(UNIT) == {(name, method) for name, number in FORMATS.items() for method in number.methods}


@pytest.mark.parametrize(("name", "method"), UNIT)
def test_round_trip(name: FormatName, method: ScaleMethod) -> None:
    """Values that every format holds exactly come back, of weights and of inputs."""
    arithmetic, amax = ARITHMETIC[name], UNIT[name, method]
    scale, degenerate = arithmetic.decode_scale(amax, method)
    assert (float(scale), degenerate) == (1.0, False)
    row = np.tile([6.0, -4.0, 3.0, 2.0, -1.5, 1.0, 0.5, 0.0], 8) * np.repeat([1.0, 2.0, 16.0, 64.0], 16)
    weight = np.stack([row, -row[::-1]]).astype(np.float32)
    encoded = arithmetic.encode(weight, scale, method)
    buffer = np.empty_like(weight)
    assert arithmetic.decode(encoded, scale, buffer) is buffer
    np.testing.assert_array_equal(buffer, weight)
    if encoded.block_scales is not None:
        assert arithmetic.bad_scales(encoded.block_scales) == 0
    assert arithmetic.limit(scale) >= 448
    buffer.fill(np.nan)
    round_trip(arithmetic, weight, scale, buffer)
    np.testing.assert_array_equal(buffer, weight)
    assert not arithmetic.decode(arithmetic.zeros((2, 64)), scale).any()


@pytest.mark.parametrize("name", FORMATS)
def test_an_amax_of_zero_is_degenerate(name: FormatName) -> None:
    assert ARITHMETIC[name].decode_scale(0.0) == (1.0, True)


@pytest.mark.parametrize("name", FORMATS)
def test_methods_are_those_of_the_row(name: FormatName) -> None:
    arithmetic, weight = ARITHMETIC[name], np.ones((1, 32), np.float32)
    for method in (*get_args(ScaleMethod), "least"):
        if method in FORMATS[name].methods:
            scale, _ = arithmetic.decode_scale(1.0, method)
            arithmetic.encode(weight, scale, method)
            continue
        message = f"method: got '{method}', expected one of {', '.join(FORMATS[name].methods)}"
        with pytest.raises(ValueError, match=message):
            arithmetic.decode_scale(1.0, method)
        with pytest.raises(ValueError, match=message):
            arithmetic.encode(weight, np.float32(1), method)


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("fp8", (3, 50), None),
        ("nvfp4", (3, 64), None),
        ("mxfp8", (3, 64), None),
        ("mxfp8", (3, 48), "input dimension 48 is not a multiple of mxfp8's block of 32"),
        ("nvfp4", (3, 72), "input dimension 72 is not a multiple of nvfp4's block of 16"),
        ("fp8", (64,), "shape [64] is not [out, in]"),
        ("nvfp4", (2, 3, 64), "shape [2, 3, 64] is not [out, in]"),
        ("fp8", (3, 0), "shape [3, 0] is not [out, in]"),
    ],
)
def test_indivisible(name: str, shape: tuple[int, ...], problem: str | None) -> None:
    assert FORMATS[name].indivisible(shape) == problem


def test_an_indivisible_shape_has_no_tensors() -> None:
    with pytest.raises(ValueError, match="format nvfp4: input dimension 24 is not a multiple"):
        FORMATS["nvfp4"].packed_tensors((2, 24))


def test_the_registry_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FORMATS["fp8"].name = "fp9"  # type: ignore[misc]  # wrong on purpose
    with pytest.raises(TypeError):
        FORMATS["fp9"] = FORMATS["fp8"]  # type: ignore[index]  # wrong on purpose


def test_the_registry_alone_loads_no_arrays() -> None:
    code = (
        "import sys, nemoquant.formats; sys.exit(any(m in sys.modules for m in ('numpy', 'numba', 'torch')))"
    )
    run_python(code)


def test_the_arithmetic_needs_no_triton() -> None:
    """On the CPU: kernels for a GPU are loaded when one is chosen."""
    run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import numpy as np\n"
        "from nemoquant.formats.registry import ARITHMETIC\n"
        "for one in ARITHMETIC.values():\n"
        "    one.decode(one.encode(np.ones((1, 32), np.float32), np.float32(1)), np.float32(1))\n"
    )

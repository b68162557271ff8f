import dataclasses

import pytest
from support.processes import run_python

from nemoquant.formats import FORMATS, fp8, nvfp4


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


def test_the_shapes_are_those_that_the_kernels_write() -> None:
    assert FORMATS["fp8"].packed_tensors((3, 64))[0].shape == fp8.zeros((3, 64)).shape
    assert [t.shape for t in FORMATS["nvfp4"].packed_tensors((3, 64))[:2]] == [
        a.shape for a in nvfp4.zeros((3, 64))
    ]


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("fp8", (3, 50), None),
        ("nvfp4", (3, 64), None),
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

"""RoutedExperts on the host: a token-by-token float64 sum as oracle, torch, the ONNX function, refusals.

torch computes in the same dtype.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.emulator import ORDERS, Device, emulated
from support.expert_call import (
    AUTO,
    BASE,
    DECODED,
    DTYPE_ROWS,
    FORMATS,
    GROUPED,
    NATIVE,
    NUMPY,
    POINTERS,
    ROWS,
    WHOLE,
    Case,
    arguments,
    exact_numbers,
    given,
    in_torch,
    mixture,
    natively,
    pack,
    replace_tokens,
    run,
)
from support.norms import relative_error as distance
from support.plugin_build import needs_compiler
from support.scan_call import aligned
from support.single_op import single_op

from nemoquant.errors import EngineError
from nemoquant.formats import fp8, nvfp4
from nemoquant.graph import ops
from nemoquant.graph.dialects import Dialect
from nemoquant.graph.tape import FLOAT
from nemoquant.ops.library import Kernels

pytestmark = [needs_compiler, pytest.mark.slow]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("format", WHOLE)
def test_float32_with_whole_inputs(format: str, name: str, kernels: Kernels) -> None:
    """Inputs are split into three bfloat16, so that products are exact.

    The error is within twice that of torch in float32, or within two float32 roundings.
    """
    a = given(format, ROWS[name])
    exact = mixture(a)
    assert 0 < distance(run(kernels, a), exact) <= max(2 * distance(in_torch(a).numpy(), exact), 2.0**-23)


@pytest.mark.parametrize("name", DTYPE_ROWS)
@pytest.mark.parametrize("format", WHOLE)
def test_16_bits_with_whole_inputs(format: str, name: str, kernels: Kernels) -> None:
    """Less error than torch in the same dtype; float16 within 2% of rounding the exact result once.

    Hidden values of bfloat16 are rounded once; the rounding of float16's is negligible.
    """
    a = given(format, DTYPE_ROWS[name])
    exact = mixture(a)
    limit = distance(in_torch(a).float().numpy(), exact)
    if a.case.dtype == "float16":
        limit = min(limit, 1.02 * distance(exact.astype(np.float16), exact))
    assert 0 < distance(run(kernels, a).astype(np.float32), exact) <= limit


@pytest.mark.parametrize("name", [*ROWS, *DTYPE_ROWS])
@pytest.mark.parametrize(("format", "products"), [("fp8", AUTO), ("nvfp4", DECODED), ("nvfp4", NATIVE)])
def test_rounded_inputs(format: str, products: int, name: str, kernels: Kernels) -> None:
    """Tokens whose hidden codes a change of 1e-6 flips are left out, a twentieth at most; the others agree.

    float32 to its own rounding, 16 bits to 2% more than rounding the exact result once.
    """
    case = (ROWS | DTYPE_ROWS)[name]
    a = given(format, natively(case) if products == NATIVE else replace(case, products=products))
    exact = mixture(a)
    firm = np.ones(len(exact), bool)
    for nudge in (1e-6, -1e-6):
        firm &= (np.abs(mixture(a, nudge=nudge) - exact) < 1e-6 * np.abs(exact).max()).all(1)
    assert (~firm).sum() <= max(1, len(firm) // 20)
    y = run(kernels, a).astype(np.float64)
    assert np.isfinite(y).all()
    if firm.any():
        rounded = exact.astype(NUMPY[a.case.dtype]).astype(np.float64)
        limit = 1e-6 if a.case.dtype == "float32" else 1.02 * distance(rounded[firm], exact[firm])
        assert distance(y[firm], exact[firm]) <= limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("format", "products", "tile"),
    [
        *(("fp8", AUTO, tile) for tile in (8, 32, 64)),
        *(("nvfp4", DECODED, tile) for tile in (8, 32, 64)),
        ("nvfp4", NATIVE, 32),
        ("nvfp4", NATIVE, 64),
    ],
)
def test_numbers_that_are_exact_come_out_exact(
    format: str, products: int, tile: int, dtype: str, kernels: Kernels
) -> None:
    case = Case(
        tokens=13, chosen=2, experts=5, input=160, width=96, dtype=dtype, tile=tile, products=products
    )
    a, exact = exact_numbers(format, case)
    assert (run(kernels, a) == exact.astype(NUMPY[dtype])).all()


def test_native_products_see_the_codes_of_the_decoded_ones(kernels: Kernels) -> None:
    """Any code and block scale in the weights, inputs that differ by 2^14 from block to block.

    Both give the same numbers, except for float32's sums, which are taken in another order. A code or scale
    in a wrong place would put tokens off by more than 1e-3.
    """
    for tile, tokens, sizes in ((32, 40, (672, 96)), (64, 70, (96, 672)), (64, 70, (352, 288))):
        case = Case(tokens=tokens, chosen=2, experts=3, input=sizes[0], width=sizes[1], tile=tile)
        a = given("nvfp4", case)
        g = np.random.default_rng(6)
        for projection in ("up", "down"):
            codes, blocks = (a.parts[f"{projection}_{part}"] for part in ("codes", "block_scales"))
            codes[:] = g.integers(0, 256, codes.shape)
            blocks[:] = g.integers(0, 0x7F, blocks.shape)  # signed scales and NaN do not occur
            a.decoded[projection] = np.stack(
                [
                    nvfp4.decode(c, b, s)
                    for c, b, s in zip(codes, blocks, a.parts[f"{projection}_global_scale"], strict=True)
                ]
            )
        a.x[:] *= np.exp2(g.uniform(-14, 0, (tokens, sizes[0] // 16))).astype(np.float32).repeat(16, 1)
        hidden = max(np.abs(np.maximum(a.x @ up.T, 0) ** 2).max() for up in a.decoded["up"])
        a.parts["down_input_scale"][:] = hidden / 2688
        ways = []
        for products in (DECODED, NATIVE):
            a.case = replace(case, products=products)
            ways.append(run(kernels, a))
        exact = mixture(a)
        firm = np.ones(tokens, bool)  # hidden codes that a change of 1e-6 flips: see test_rounded_inputs
        for nudge in (1e-6, -1e-6):
            firm &= (np.abs(mixture(a, nudge=nudge) - exact) < 1e-6 * np.abs(exact).max()).all(1)
        assert firm.sum() > 0.9 * tokens
        for y in ways:
            assert distance(y[firm], exact[firm]) < 1e-6
        assert distance(ways[1][firm], ways[0][firm].astype(np.float64)) < 1e-6


@pytest.mark.parametrize("capability", [80, 90, 100, 103, 120, 121])
def test_auto_is_decoded_products(capability: int, kernels: Kernels) -> None:
    """On every device, until the others have been seen to run. Sums in another order show what ran."""
    case = Case(tokens=40, chosen=1, experts=1, input=672, width=672)
    a = given("nvfp4", case)
    a.x[:] *= np.exp2(np.random.default_rng(7).uniform(-14, 0, (40, 42))).astype(np.float32).repeat(16, 1)
    blocks = a.parts["down_block_scales"]
    blocks[:] = np.random.default_rng(8).integers(0, 0x7F, blocks.shape)
    found = {}
    with emulated(kernels.path, Device(capability=capability)):
        for products in (AUTO, DECODED, NATIVE) if capability in (120, 121) else (AUTO, DECODED):
            a.case = replace(case, products=products)
            found[products] = run(kernels, a).tobytes()
    assert found[AUTO] == found[DECODED]
    assert found.get(NATIVE) != found[DECODED], "the test's own numbers must tell the ways apart"


@pytest.mark.parametrize(
    ("format", "products"), [*((format, DECODED) for format in FORMATS), ("nvfp4", NATIVE)]
)
def test_every_order_gives_the_same_bits(format: str, products: int, kernels: Kernels) -> None:
    """Copies early or late, threads upwards or downwards; more chunks than stages, more pairs than a block.

    In every tile, and in float32, whose inputs are three times as many.
    """
    size = 800 if products == NATIVE else 544  # of which a stage has two chunks, or one
    long = Case(tokens=24, chosen=2, experts=3, input=size, width=96, dtype="bfloat16", products=products)
    wide = replace(long, tokens=5, input=160, width=288, dtype="float32")
    cases = [replace(long, tile=tile) for tile in (8, 32, 64)] + [
        replace(wide, tile=tile) for tile in (8, 32)
    ]
    cases += [replace(long, tokens=300, input=32, width=32)]  # several blocks of the sort
    for case in cases:
        if products == NATIVE and case.tile == 8:
            continue
        a, found = given(format, case), []
        for order in ORDERS:
            with emulated(kernels.path, order):
                found.append(run(kernels, a).tobytes())
        assert found == [found[0]] * len(ORDERS), case


@pytest.mark.parametrize("format", ["w8a16", "w4a16"])
def test_every_code_is_decoded(format: str, kernels: Kernels) -> None:
    """Both projections pass one column each: y is (code * scale)^2, for every E4M3 code and block scale.

    These are all finite ones, subnormal codes included, which decoding must keep.
    """
    case = Case(tokens=1, chosen=1, experts=1, input=256, width=256)
    a = given(format, case)
    a.x[:], a.factors[:] = 0, 1
    a.x[0, 0] = 1
    byte = np.arange(256, dtype=np.uint8)
    if format == "w8a16":
        finite = np.where(byte & 0x7F == 0x7F, 0, byte).astype(np.uint8)
        up, down = np.zeros((1, 256, 256), np.uint8), np.zeros((1, 256, 256), np.uint8)
        up[0, :, 0] = finite
        np.fill_diagonal(down[0], 0x38)
        values = fp8.decode(finite, np.float32(1))
    else:
        up, down = np.zeros((1, 256, 128), np.uint8), np.zeros((1, 256, 128), np.uint8)
        up[0, :, 0] = byte & 7  # the even column is in the low half
        scales = np.where(byte & 0x7F == 0x7F, 0, byte & 0x7F).astype(np.uint8)
        for row in range(256):
            down[0, row, row // 2] = 2 << 4 * (row % 2)  # 1
        blocks = {
            "up": np.repeat(scales[None, :, None], 16, 2),
            "down": np.full((1, 256, 16), 0x38, np.uint8),
        }
        for projection, block in blocks.items():
            a.parts[f"{projection}_block_scales"] = aligned(block)
        magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        values = magnitudes[byte & 7] * fp8.decode(scales, np.float32(1))
    for projection, codes in (("up", up), ("down", down)):
        a.parts[f"{projection}_codes"] = aligned(codes)
        a.parts[f"{projection}_global_scale"] = aligned(np.ones(1, np.float32))
    assert (run(kernels, a)[0] == np.maximum(values, 0) ** 2).all()


@pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed (extra: ort)"
)
@pytest.mark.parametrize("name", ["the base", "33 tokens an expert, tile 32", "several experts, tile 64"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_onnx_function(format: str, name: str, kernels: Kernels) -> None:
    """The body in ``graph/dialects.py``, run by ONNX Runtime on the same arrays.

    The two are within 1e-6 of each other where no code flipped. At most a token in twenty has a flipped code
    (see test_rounded_inputs).
    """
    a = given(format, ROWS[name])
    helpers = [ops.nvfp4_dynamic_quant_dequant()] if format == "nvfp4" else []
    inputs = {"x": a.x, "expert_ids": a.ids, "expert_weights": a.factors}
    wanted = single_op(Dialect().routed_experts(format, FLOAT), inputs, a.parts, helpers, activation="relu2")(
        inputs
    )[0]
    y = run(kernels, a)
    apart = np.linalg.norm(y - wanted, axis=1) > 1e-6 * np.linalg.norm(wanted, axis=1)
    assert apart.sum() <= (0 if format in WHOLE else max(1, len(apart) // 20))


# Routing.


def test_ids_that_are_no_experts_add_nothing(kernels: Kernels) -> None:
    """Negative ids, E, and ids beyond 32 bits: the pair adds nothing, whatever its weight."""
    for format in FORMATS:
        a = given(format, BASE)
        bad = [
            (0, 1, -1),
            (2, 0, BASE.experts),
            (2, 2, 1 << 40),
            (5, 0, -(1 << 63)),
            (5, 1, BASE.experts + 1),
            (5, 2, (1 << 32) + 1),
        ]
        for token, j, id in bad:
            a.ids[token, j], a.factors[token, j] = id, np.nan
        wanted = given(format, BASE)
        for token, j, _ in bad:
            wanted.factors[token, j] = 0
        y = run(kernels, a)
        assert (y == run(kernels, wanted)).all()
        assert (y[5] == 0).all()


def test_ids_that_are_no_experts_are_counted(kernels: Kernels) -> None:
    """Their number is added to ``skipped`` in every pass, by the threads of one sorting block or of two.

    No other code changes it.
    """
    for tokens, slab in ((9, 0), (9, 6), (200, 0)):
        a = given("bf16", replace(BASE, tokens=tokens, input=32, width=32))
        y = aligned(np.zeros(a.x.shape, a.x.dtype))
        plain = arguments(a, y) | {"slab": slab}
        workspace = aligned(np.zeros(kernels.workspace("routed_experts", **plain), np.uint8))
        skipped = np.array([100, 7], np.int32)
        plain |= {"workspace": workspace.ctypes.data, "skipped": skipped.ctypes.data}
        kernels.call("routed_experts", **plain)
        assert skipped.tolist() == [100, 7]
        a.ids[:, 1], a.ids[3, 2], a.ids[4, 0] = -1, BASE.experts, (1 << 32) + 1
        kernels.call("routed_experts", **plain)
        assert skipped.tolist() == [100 + tokens + 2, 7]


@pytest.mark.parametrize(("factors", "total"), [((2.0**24, 1, 1), 2.0**24), ((1, 1, 2.0**24), 2.0**24 + 2)])
def test_results_are_added_in_the_order_of_the_choices(
    factors: tuple[float, ...], total: float, kernels: Kernels
) -> None:
    """Each expert gives 1, and 2^24 + 1 is 2^24 in float32."""
    a = given("bf16", Case(tokens=2, chosen=3, experts=3, input=32, width=32))
    ones = np.broadcast_to(np.eye(32, dtype=np.float32), (3, 32, 32))
    pack(a, {"up": ones, "down": ones}, dict.fromkeys(("up", "down"), np.ones(3, np.float32)), {})
    a.x[:], a.factors[:] = 1, factors
    a.ids[:] = [[0, 1, 2], [2, 0, 1]]
    assert (run(kernels, a) == np.float32(total)).all()


def test_results_beyond_32_bits(kernels: Kernels, tmp_path: Path) -> None:
    """A pass of 98,300 tokens of 32,768 values: the last block of each launch alone runs, in sparse files.

    What the other blocks would count is put into the workspace, which begins with it: 512 pairs a block of
    the sort, all of one expert. The last block writes a part of the last token's inputs; the tile of that
    token, its last rows of results, and the end of y follow. The rest of x and of the results is zero.
    """
    case = Case(tokens=98_300, chosen=1, experts=1, input=32_768, width=32, dtype="bfloat16", tile=64)
    last = given("bf16", replace(case, tokens=1))
    last.x[0, :-8192], last.factors[:] = 0, 1
    wanted = run(kernels, last)
    x, y = (
        np.memmap(tmp_path / name, np.uint16, "w+", shape=(case.tokens, case.input)) for name in ("x", "y")
    )
    x[-1, -8192:], y[-1, -1024:] = last.x[0, -8192:].view(np.uint16), 0xFFFF
    ids, factors = (
        aligned(np.zeros((case.tokens, 1), np.int64)),
        aligned(np.ones((case.tokens, 1), np.float32)),
    )
    plain = arguments(last, wanted) | {"tokens": case.tokens}
    size = kernels.workspace("routed_experts", **plain)
    workspace = np.memmap(tmp_path / "workspace", np.uint8, "w+", shape=(size,))
    workspace[: 192 * 4].view(np.int32)[:] = [*[512] * 191, case.tokens - 191 * 512]
    arrays = {"x": x, "y": y, "expert_ids": ids, "expert_weights": factors, "workspace": workspace}
    with emulated(kernels.path, Device(last_block_only=True)):
        kernels.call("routed_experts", **plain | {name: array.ctypes.data for name, array in arrays.items()})
    assert np.count_nonzero(y[-1, -256:]) > 200
    assert y[-1, -256:].tobytes() == wanted[0, -256:].tobytes()
    assert (y[-1, -1024:-256] == 0).all()


def test_outputs_that_overlap_anything_are_refused(kernels: Kernels) -> None:
    for format in ("bf16", "nvfp4"):
        a = given(format, BASE)
        y = aligned(np.full(a.x.shape, 99, a.x.dtype))
        workspace = aligned(np.zeros(kernels.workspace("routed_experts", **arguments(a, y)), np.uint8))
        plain = arguments(a, y, workspace)
        inputs = {"x": a.x, "expert_ids": a.ids, "expert_weights": a.factors}
        for part, array in a.parts.items():
            inputs[POINTERS[part.split("_", 1)[1]].format(part.split("_")[0])] = array
        for name, array in inputs.items():
            space = np.zeros(3 * 2**20, np.uint8)  # so that only this input is near
            place = (space.ctypes.data + 2**20) // 16 * 16
            for output in ("y", "workspace", "skipped"):
                for at in {place, (place + array.nbytes - 1) // 16 * 16}:
                    with pytest.raises(
                        EngineError, match=rf": {output} at .* overlaps {name} at .*; expected"
                    ):
                        kernels.call("routed_experts", **plain | {name: place, output: at})
        for output in ("skipped", "workspace"):
            with pytest.raises(EngineError, match=rf": {output} at .* overlaps y at"):
                kernels.call("routed_experts", **plain | {"y": place, output: place})
        assert (y == 99).all()


def test_an_expert_that_is_chosen_twice_counts_twice(kernels: Kernels) -> None:
    a = given("bf16", BASE)
    a.ids[:, 1] = a.ids[:, 0]
    once = given("bf16", BASE)
    once.factors[:, 0] += once.factors[:, 1]
    once.factors[:, 1] = 0
    assert distance(run(kernels, a), run(kernels, once).astype(np.float64)) < 2.0**-22


@pytest.mark.parametrize(
    ("format", "products"), [*((format, DECODED) for format in FORMATS), ("nvfp4", NATIVE)]
)
def test_a_token_alone_gives_the_bits_that_it_gives_among_others(
    format: str, products: int, kernels: Kernels
) -> None:
    """With the same tile, sums have one order, whatever other tokens are computed.

    So a repeated call gives the same bits.
    """
    for tile in (32, 64) if products == NATIVE else (8, 64):
        whole = given(format, replace(BASE, tile=tile, tokens=21, products=products))
        y = run(kernels, whole)
        assert run(kernels, whole).tobytes() == y.tobytes()
        for token in (0, 20):
            alone = replace_tokens(whole, [token])
            assert run(kernels, alone).tobytes() == y[token : token + 1].tobytes()


@pytest.mark.parametrize(
    ("format", "products", "tile"), [("bf16", AUTO, 8), ("nvfp4", AUTO, 8), ("nvfp4", NATIVE, 0)]
)
def test_tokens_in_several_passes_give_the_same_bits(
    format: str, products: int, tile: int, kernels: Kernels
) -> None:
    """``slab`` pairs bound the workspace.

    Passes have 7 tokens, or one token where the slab has room for no more.
    """
    a = given(format, replace(BASE, tokens=20, tile=tile, products=products))
    y = run(kernels, a)
    sizes = [kernels.workspace("routed_experts", **arguments(a, y))]
    for slab in (23, 1):
        again = aligned(np.full(a.x.shape, 99, a.x.dtype))
        plain = arguments(a, again) | {"slab": slab}
        sizes.append(kernels.workspace("routed_experts", **plain))
        workspace = aligned(np.full(sizes[-1], 0xFF, np.uint8))
        kernels.call("routed_experts", **plain | {"workspace": workspace.ctypes.data})
        assert again.tobytes() == y.tobytes()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_what_is_not_finite_stays_with_its_token(kernels: Kernels) -> None:
    for format, products in [*((format, AUTO) for format in FORMATS), ("nvfp4", NATIVE)]:
        for dtype in ("float32", "bfloat16"):
            clean, dirty = (given(format, replace(BASE, dtype=dtype, products=products)) for _ in range(2))
            dirty.x[4, 7] = np.nan
            y, spoilt = run(kernels, clean), run(kernels, dirty)
            assert np.isnan(spoilt[4].astype(np.float32)).all()
            others = np.arange(9) != 4
            assert spoilt[others].tobytes() == y[others].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_large_hidden_values_do_not_overflow(dtype: str, kernels: Kernels) -> None:
    """Hidden values of 1e8, beyond float16's range: they are never stored as float16, whatever x is."""
    a = given("bf16", replace(BASE, dtype=dtype))
    weights = {p: w.copy() for p, w in a.decoded.items()}
    weights["up"] *= 1e4
    weights["down"] *= 1e-8
    pack(a, weights, dict.fromkeys(weights, np.ones(6, np.float32)), {})
    exact = mixture(a)
    limit = {
        "float32": 5e-7,
        "float16": 1.02 * distance(exact.astype(np.float16), exact),
        "bfloat16": 2.0**-8,
    }[dtype]
    assert distance(run(kernels, a).astype(np.float32), exact) <= limit


# Refusals.


@pytest.mark.parametrize(
    ("format", "change", "says"),
    [
        ("bf16", {"tokens": 0}, "tokens is 0; expected 1 to "),
        ("bf16", {"tokens": 1 << 61}, "tokens; their inputs can't be addressed"),
        ("bf16", {"chosen": 0}, "chosen is 0; expected 1 to 4096"),
        ("bf16", {"chosen": 4097}, "chosen is 4097; expected 1 to 4096"),
        ("bf16", {"experts": 0}, "experts is 0; expected 1 to 4096"),
        ("bf16", {"experts": 4097}, "experts is 4097; expected 1 to 4096"),
        ("bf16", {"input": 0}, "input is 0; expected 32 to 1048576"),
        ("bf16", {"input": 48}, "input is 48; expected a multiple of 32"),
        ("bf16", {"width": 16}, "width is 16; expected 32 to 1048576"),
        ("bf16", {"width": 1000}, "width is 1000; expected a multiple of 32"),
        (
            "bf16",
            {"input": 1 << 16, "width": 1 << 15},
            "input 65536 x width 32768; expected a product of at most 2^30",
        ),
        ("bf16", {"slab": -1}, "slab is -1; expected 0 to 409600"),
        ("bf16", {"dtype": 3}, "dtype is 3; expected float32, float16 or bfloat16"),
        ("bf16", {"format": 5}, "format is 5; expected 0 to 4"),
        ("bf16", {"activation": 1}, "activation is 1; expected 0, relu squared"),
        ("bf16", {"tile": 16}, "tile is 16; expected 0, 8, 32 or 64"),
        ("bf16", {"products": 4}, "products is 4; expected 0 to 3"),
        (
            "w4a16",
            {"products": NATIVE},
            "products is 2, native FP4, with format 3 and tile 0; expected format 4 and tile 0, 32 or 64",
        ),
        (
            "nvfp4",
            {"products": NATIVE, "tile": 8},
            "native FP4, with format 4 and tile 8; expected format 4 and tile 0, 32 or 64",
        ),
        (
            "bf16",
            {"products": GROUPED},
            "products is 3, CUTLASS, with format 0, dtype 0 and tile 0; expected format 0",
        ),
        ("bf16", {"skipped": 6}, "skipped is at 0x6; expected a multiple of 4"),
        ("bf16", {"x": None}, "x is null; format 0 needs it"),
        ("bf16", {"workspace": None}, "workspace is null"),
        ("w8a16", {"down_global_scale": None}, "down_global_scale is null; format 1 needs it"),
        ("fp8", {"up_input_scale": None}, "up_input_scale is null; format 2 needs it"),
        ("w4a16", {"up_block_scales": None}, "up_block_scales is null; format 3 needs it"),
        ("nvfp4", {"down_input_scale": None}, "down_input_scale is null; format 4 needs it"),
        ("bf16", {"x": 8}, "x is at 0x8; expected a multiple of 16"),
    ],
    ids=lambda value: ", ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_before_anything_starts(
    format: str, change: dict[str, Any], says: str, kernels: Kernels
) -> None:
    a = given(format, BASE)
    y = aligned(np.full(a.x.shape, 99, a.x.dtype))
    workspace = aligned(np.zeros(kernels.workspace("routed_experts", **arguments(a, y)), np.uint8))
    with pytest.raises(EngineError, match=r"libnemoquant_host.so: routed_experts: ") as error:
        kernels.call("routed_experts", **arguments(a, y, workspace) | change)
    assert says in str(error.value)
    assert (y == 99).all()


def test_native_products_are_refused_by_other_devices(kernels: Kernels) -> None:
    a = given("nvfp4", replace(BASE, products=NATIVE))
    for other in (100, 110):
        with (
            emulated(kernels.path, Device(capability=other)),
            pytest.raises(
                EngineError, match=rf"device of compute capability {other // 10}\.0; expected 12\.x"
            ),
        ):
            run(kernels, a)


def test_the_workspace_grows_with_every_size(kernels: Kernels) -> None:
    """TensorRT needs this: it asks only for the largest shapes of a profile."""
    base = {"tokens": 4096, "chosen": 22, "experts": 512, "input": 1024, "width": 2688, "dtype": 2}
    for format in FORMATS.values():
        for name in ("tokens", "chosen", "experts", "input", "width"):
            values = [32, 64, 96, 1024, 2048, 4064, 4096]
            sizes = [
                kernels.workspace("routed_experts", **base | {name: value, "format": format})
                for value in values
            ]
            assert sizes == sorted(sizes)
            assert sizes[0] > 0
    assert kernels.workspace("routed_experts", **base | {"input": 33}) == 0

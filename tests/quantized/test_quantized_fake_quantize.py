"""Quantized weights and inputs as an engine computes them, against Model Optimizer's TensorQuantizer.

Also against themselves, in pieces and threads.

FP8. TensorQuantizer in real-quantize mode divides by amax / 448 and multiplies by it, as we and ONNX's
QuantizeLinear do: every bit is equal. Its fake mode multiplies by 448 / amax and by the inverse of that, so
that last bits differ, and sometimes a code.

MXFP8. Its fake mode needs CUDA. Real-quantize mode gives our bits, but for blocks of float32 inputs whose
scale it takes too small (formats/mxfp8.py says why); no block of bf16 is among them.

NVFP4. Its fake mode needs a CUDA tensor. Real-quantize mode uses its code for weights, which limits a block's
scale to at least 2^-9. Inputs at run time have no such limit, neither in its kernel (``fp8_quantize_scale``
in kernels/quantization/common/nvfp4_quant.py: "values below its rounding range may become zero") nor in
engines, nor here. So blocks that underflow are compared with zero instead. (That kernel, run in Triton's
interpreter with torch's cast to E4M3, gave our values for all of 1.6 million; but by its code it makes zeros
of any block whose decode scale is below 1e-5, which engines do not do.)
"""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import modelopt_run
from support.oracle_tensors import equal
from torch import Tensor

from nemoquant.formats import FORMATS, fp8, mxfp8, noise, nvfp4
from nemoquant.formats.arithmetic import Encoded
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.model import taps
from nemoquant.quantized import packed
from nemoquant.quantized.packed import PackedWeight, fake_quantize, rounded


def modelopt(test: Any) -> Any:
    for mark in modelopt_run.MARKS:
        test = mark(test)
    return test


FP8 = {"num_bits": (4, 3), "axis": None}
MXFP8 = {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
AMAX = [7.3, 1.0, 0.0371, 450.0, float(np.float32(2.0) / np.float32(3.0))]


def quantizer(amax: float, **settings: Any) -> Any:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    made = TensorQuantizer(QuantizerAttributeConfig(**settings))
    made.amax = torch.tensor(amax)
    return made


def real(x: Tensor, amax: float, **settings: Any) -> Tensor:
    """Encoded and decoded by TensorQuantizer."""
    made = quantizer(amax, **settings, fake_quant=False)
    result: Tensor = made(made(x))
    return result


def scale_of(amax: float, largest: float) -> np.float32:
    """``input_scale`` as a checkpoint has it."""
    return np.float32(amax) / np.float32(largest)


def inputs() -> dict[str, Tensor]:
    """GEMM inputs [2, 24, 320] with largest magnitude 1, of all kinds that are hard to quantize."""
    g = torch.Generator().manual_seed(0)
    shape = (2, 24, 320)
    normal = torch.randn(shape, generator=g)
    blocks = 2.0 ** torch.randint(-24, 1, (2, 24, 20, 1), generator=g)
    found = {
        "normal": normal,
        "squared relu, half of it zero": torch.relu(normal).square(),
        "outliers": normal * torch.where(torch.rand(shape, generator=g) < 0.01, 50, 1),
        "blocks of many magnitudes": (normal.view(2, 24, 20, 16) * blocks).reshape(shape),
        "all magnitudes": torch.sign(normal) * 2.0 ** (40 * torch.rand(shape, generator=g) - 40),
        "a lattice, rich in ties": torch.randint(-24, 25, shape, generator=g) / 24,
    }
    return {name: x / x.abs().max() for name, x in found.items()}


INPUTS = inputs()
every_input = pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS.keys())


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """Steps of float32 between values of the same sign."""
    return (bits(a).long() - bits(b).long()).abs()


# FP8 against Model Optimizer.


@modelopt
@every_input
@pytest.mark.parametrize("amax", AMAX)
def test_fp8_is_modelopts_real_quantizer_to_the_bit(x: Tensor, amax: float) -> None:
    """Values are within amax: it leaves saturation to torch's cast, which has not always saturated."""
    x = (x * amax).clamp(-amax, amax)
    found, _ = fake_quantize(x, "fp8", scale_of(amax, 448))
    assert torch.equal(bits(found), bits(real(x, amax, **FP8)))


@modelopt
@every_input
@pytest.mark.parametrize("exponent", [-9, 0, 5])
def test_fp8_is_modelopts_fake_quantizer_to_the_bit_where_its_inverse_is_exact(
    x: Tensor, exponent: int
) -> None:
    """The scale is a power of two; values up to three times amax, where both saturate."""
    amax = 448 * 2.0**exponent
    x = 3 * amax * x
    found, measured = fake_quantize(x, "fp8", scale_of(amax, 448))
    assert measured.saturated > 0
    assert torch.equal(bits(found), bits(quantizer(amax, **FP8)(x)))


@modelopt
def test_fp8_differs_from_modelopts_fake_quantizer_by_rounding_only() -> None:
    """Decoded values and codes differ no more than the number of roundings explains.

    Decoded values: ours have two roundings of 2^-24 (scale, product), theirs four (reciprocal, times 448, its
    inverse, product), so that they differ by less than 6 x 2^-24 of the value, which is at most six steps of
    float32. Measured: two.

    Codes: our quotient has two roundings and theirs three, so that a code may differ where the exact quotient
    lies within 3 x 2^-24 of a midpoint between two codes. There are eight midpoints in an octave: a share of
    8 x 2 x 3 x 2^-24 / ln 2 = 4.2e-6 of values that are spread evenly over octaves. Measured: 1 of 3.9
    million.
    """
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 128, 1024, generator=g) * 3
    midpoints = np.concatenate(
        [np.arange(17, 32, 2) * 2.0 ** (e - 4) for e in range(-6, 9)] + [np.arange(1, 16, 2) * 2.0**-10]
    )
    differing, total, most = 0, 0, 0
    for amax in torch.rand(30, generator=g) * 20 + 0.5:
        found, _ = fake_quantize(x, "fp8", scale_of(float(amax), 448))
        expected = quantizer(float(amax), **FP8)(x)
        distance = ulps(found, expected)
        other_code = distance > 100  # the next code is at least 2^20 steps away
        most = max(most, int(distance[~other_code].max()))
        quotients = x[other_code].double().abs().numpy() * 448 / float(amax)
        nearest = midpoints[np.abs(quotients[:, None] / midpoints - 1).argmin(1)]
        np.testing.assert_array_less(np.abs(quotients / nearest - 1), 3.01 * 2.0**-24)
        differing, total = differing + int(other_code.sum()), total + x.numel()
    print(f"{differing} codes of {total} differ, other values by {most} steps of float32 at most")
    assert most <= 6
    assert differing <= 4.2e-6 * total


@modelopt
def test_a_value_whose_fp8_code_differs() -> None:
    """The exact quotient is 68.0000035, past the midpoint of 64 and 72.

    Theirs is computed as 68.0, and the tie goes to 64.
    """
    amax, x = float.fromhex("0x1.154fd4p+4"), torch.tensor([[float.fromhex("0x1.50bc5ep+1")]])
    scale = scale_of(amax, 448)
    assert fake_quantize(x, "fp8", scale)[0].item() == np.float32(72) * scale
    assert quantizer(amax, **FP8)(x).item() == pytest.approx(64 * amax / 448, rel=1e-6)
    assert real(x, amax, **FP8).item() == np.float32(72) * scale


# MXFP8 against Model Optimizer.


def short_logarithm(x: Tensor) -> Tensor:
    """Marks values in a block for which log2(fp32(block_amax / 448)) in fp32 may be a whole number too early.

    That is where the quotient is 2^k (1 + d) with 0 < d < 2^-16: the logarithm is less than 1.443 d above k,
    and for k of 64 and more a step of float32 is 2^-17; rounding takes half a step, log2 itself up to one.
    """
    blocks = x.float().view(*x.shape[:-1], -1, 32)
    mantissa, _ = torch.frexp(blocks.abs().amax(-1, keepdim=True) / 448)
    short = (mantissa > 0.5) & (mantissa < 0.5 + 2.0**-17)
    return short.expand_as(blocks).reshape(x.shape)


@modelopt
@every_input
@pytest.mark.parametrize("amax", [*AMAX, 2.0**-126, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mxfp8_is_modelopts_real_quantizer_to_the_bit(x: Tensor, amax: float, dtype: torch.dtype) -> None:
    x = (x * amax).to(dtype)
    found, measured = fake_quantize(x.float(), "mxfp8", np.float32(1))
    assert not short_logarithm(x).any()
    assert equal(found.to(dtype), real(x, amax, **MXFP8))
    assert measured.saturated == 0


def at_the_edges_of_scales() -> Tensor:
    """Blocks [254, 99, 32] float32, the largest magnitude of each up to 2^16 steps of float32 from 448 * 2^k.

    For each k where that is a normal number, -134 to 119. Other values are ratios of it, -0.0 and ties among
    them.
    """
    g = torch.Generator().manual_seed(3)
    steps = [*range(-40, 41), *(sign * 2**n for sign in (-1, 1) for n in range(8, 17))]
    exponents = torch.arange(1, 255, dtype=torch.int32)[:, None]
    amax = (exponents << 23 | 0x600000) + torch.tensor(steps, dtype=torch.int32)
    ratios = torch.empty(*amax.shape, 32)
    ratios[..., :16] = torch.randn(*amax.shape, 16, generator=g).clamp(-1, 1)
    ratios[..., 16:28] = 2.0 ** -torch.randint(0, 24, (*amax.shape, 12), generator=g)
    ratios[..., 28:] = torch.tensor([17 / 28, -19 / 28, -0.0, 1.0])
    return ratios * amax.view(torch.float32)[..., None]


@modelopt
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mxfp8_at_the_edges_of_scales(dtype: torch.dtype) -> None:
    """Their scale is half ours in some blocks with a short logarithm, which only float32 has."""
    x = at_the_edges_of_scales().to(dtype)
    x = x[x.float().isfinite().all(-1)]
    found, _ = fake_quantize(x.float(), "mxfp8", np.float32(1))
    made = quantizer(1.0, **MXFP8, fake_quant=False)
    expected = made(made(x))
    doubled = torch.from_numpy(mxfp8.encode_activations(x.float().numpy())[1])[:, 0].int() - made._scale[:, 0]
    print(f"{dtype}: half our scale in {int(doubled.sum())} blocks of {len(x)}")
    assert doubled.unique().tolist() == ([0, 1] if dtype == torch.float32 else [0])
    assert short_logarithm(x)[doubled == 1].all()
    assert equal(found.to(dtype)[doubled == 0], expected[doubled == 0])


# NVFP4 against Model Optimizer.


def vanishing(x: Tensor, scale: np.float32) -> Tensor:
    """Marks values in a block whose scale rounds to zero: fp32(amax / (6 scale)) <= 2^-10.

    2^-10 is midway to the smallest scale.
    """
    blocks = x.view(*x.shape[:-1], -1, 16)
    low = blocks.abs().amax(-1, keepdim=True) / torch.tensor(np.float32(6) * scale) <= 2.0**-10
    return low.expand_as(blocks).reshape(x.shape)


@modelopt
@every_input
@pytest.mark.parametrize("amax", AMAX)
@pytest.mark.parametrize("beyond", [1.0, 4.0], ids=["within amax", "beyond amax: saturated"])
def test_nvfp4_is_modelopts_real_quantizer(x: Tensor, amax: float, beyond: float) -> None:
    """All bits are equal where the value is not zero.

    Code 8 is +0.0 in their table, and -0.0 for us, as in engines' tables.
    """
    x = x * (amax * beyond)
    scale = scale_of(amax, 2688)
    found, measured = fake_quantize(x, "nvfp4", scale)
    expected, vanished = real(x, amax, **NVFP4), vanishing(x, scale)
    assert torch.equal(bits(found + 0.0)[~vanished], bits(expected + 0.0)[~vanished])  # -0.0 + 0.0 is 0.0
    assert not found[vanished].any()
    assert (measured.saturated > 0) == (beyond > 1)


@modelopt
def test_the_inputs_have_blocks_that_vanish_and_modelopts_weights_keep_them() -> None:
    x, scale = INPUTS["blocks of many magnitudes"], scale_of(1.0, 2688)
    vanished = vanishing(x, scale)
    assert 0.01 < float(vanished.float().mean()) < 0.5
    assert real(x, 1.0, **NVFP4)[vanished].any()
    assert not fake_quantize(x, "nvfp4", scale)[0][vanished].any()


# Work in pieces gives the result of the whole.


def weight(format: str, shape: tuple[int, int], seed: int = 0) -> PackedWeight:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape).astype(np.float32)
    if format == "fp8":
        scale = fp8.decode_scale(np.abs(values).max())
        return PackedWeight("fp8", Encoded(fp8.encode(values, scale), None), scale)
    if format == "mxfp8":
        return PackedWeight("mxfp8", Encoded(*mxfp8.encode(values)), np.float32(1))
    scale = nvfp4.global_decode_scale(np.abs(values).max())
    return PackedWeight("nvfp4", Encoded(*nvfp4.encode(values, scale)), scale)


def decoded(w: PackedWeight) -> np.ndarray:
    """By the formats' own decoders."""
    codes, blocks = w.encoded
    if w.format == "fp8":
        return fp8.decode(codes, w.scale)
    return mxfp8.decode(codes, blocks) if w.format == "mxfp8" else nvfp4.decode(codes, blocks, w.scale)


def input_scale(format: str, amax: float) -> np.float32:
    """As a checkpoint has it, for an input whose largest magnitude in calibration is ``amax``."""
    return np.float32(1) if format == "mxfp8" else scale_of(amax, 448 if format == "fp8" else 2688)


every_format = pytest.mark.parametrize("format", ["fp8", "mxfp8", "nvfp4"])
LIKE = torch.empty(0)


@every_format
def test_a_packed_weight_decodes_to_what_its_format_says(format: str) -> None:
    w = weight(format, (24, 160))
    assert w.shape == (24, 160)
    assert w.numel() == 24 * 160
    assert w.dtype == torch.uint8
    np.testing.assert_array_equal(w.to(LIKE).numpy(), decoded(w))
    assert w.to(LIKE.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(w.to(LIKE.bfloat16()), torch.from_numpy(decoded(w)).bfloat16())


@every_format
@pytest.mark.parametrize("rows", [slice(0, 1), slice(5, 23), slice(23, 24), slice(20, 99), slice(0, 24)])
def test_rows_of_it_decode_to_the_same(format: str, rows: slice) -> None:
    w = weight(format, (24, 160))
    assert w[rows].shape == (len(range(24)[rows]), 160)
    np.testing.assert_array_equal(w[rows].to(LIKE).numpy(), decoded(w)[rows])


@every_format
@pytest.mark.parametrize("elements", [1, 160, 161, 500, 1 << 18])
def test_pieces_change_nothing(format: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are equal; float64 sums differ by rounding: 2^-53 for each of 3840 terms.

    There are as many sums as pieces.
    """
    w, x = weight(format, (24, 160)), INPUTS["outliers"]
    source = np.random.default_rng(0).standard_normal((24, 160)).astype(np.float32)
    scale = input_scale(format, 0.5)
    whole = fake_quantize(x, format, scale), w.noise(source), w.to(LIKE)
    monkeypatch.setattr(packed, "PIECE_ELEMENTS", elements)
    parts = fake_quantize(x, format, scale), w.noise(source), w.to(LIKE)
    assert torch.equal(bits(parts[0][0]), bits(whole[0][0]))
    assert torch.equal(bits(parts[2]), bits(whole[2]))
    for part, expected in ((parts[0][1], whole[0][1]), (parts[1], whole[1])):
        assert (part.saturated, part.flushed, part.count) == (
            expected.saturated,
            expected.flushed,
            expected.count,
        )
        assert part.signal == pytest.approx(expected.signal, rel=expected.count * 2.0**-53, abs=0)
        assert part.error == pytest.approx(expected.error, rel=expected.count * 2.0**-53, abs=0)


@every_format
def test_threads_change_nothing(format: str) -> None:
    """Even the sums are equal: pieces do not depend on threads, and are added up in order."""
    x = torch.randn(3, 100, 4096, generator=torch.Generator().manual_seed(2))  # five pieces
    w = weight(format, (300, 4096))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((*fake_quantize(x, format, input_scale(format, 4)), w.to(LIKE)))
    finally:
        torch.set_num_threads(threads)
    for values, measured, dense in found[1:]:
        assert torch.equal(bits(values), bits(found[0][0]))
        assert measured == found[0][1]
        assert torch.equal(bits(dense), bits(found[0][2]))


@every_format
def test_the_noise_is_that_of_what_comes_out(format: str) -> None:
    x, w = INPUTS["outliers"], weight(format, (24, 160))
    scale = input_scale(format, 0.5)
    limit = ARITHMETIC[format].limit
    found, measured = fake_quantize(x, format, scale)
    assert measured == noise.measure(x.flatten(0, 1).numpy(), found.flatten(0, 1).numpy(), limit(scale))
    assert int((x.abs() > 0.5).sum()) > 0
    assert measured.saturated == (0 if format == "mxfp8" else int((x.abs() > 0.5).sum()))
    source = np.random.default_rng(0).standard_normal((24, 160)).astype(np.float32)
    assert w.limit == limit(w.scale)
    assert w.noise(source) == noise.measure(source, decoded(w), limit(w.scale))
    assert w.noise(source).saturated == 0  # the encoded weight is this one, and the scale is that of its amax
    assert (
        w.noise(source).sqnr_db or 0
    ) > 17  # the floor of test_oracle_transformers.py; with another weight it is below zero


@every_format
def test_the_input_is_neither_changed_nor_shared(format: str) -> None:
    """q, k and v get the same tensor one after the other. A view with another layout is also accepted."""
    x = INPUTS["normal"].clone()
    scale = input_scale(format, 2)
    found, _ = fake_quantize(x, format, scale)
    assert torch.equal(x, INPUTS["normal"])
    assert found.data_ptr() != x.data_ptr()
    assert found.shape == x.shape
    strided = x.transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(fake_quantize(strided, format, scale)[0], found.transpose(0, 1))
    assert fake_quantize(x[:, :0], format, scale)[0].shape == (2, 0, 320)  # no token at all


@every_format
def test_a_product_in_slices_is_the_product(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes with a power-of-two scale times small integers: every sum is exact in float32, in any order."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (40, 64)).astype(np.uint8)
    values = np.array([0, 1, 2, 3, 4, 5, 6, 7, -0.0, -1, -2, -3, -4, -5, -6, -7], np.float32)[codes]
    if format == "fp8":
        w = PackedWeight("fp8", Encoded(fp8.encode(values, 1.0), None), np.float32(0.5))
    elif format == "mxfp8":
        blocks = np.full((40, 2), 126, np.uint8)  # 0.5
        w = PackedWeight("mxfp8", Encoded(fp8.encode(values, 1.0), blocks), np.float32(1))
    else:
        blocks = np.full((40, 4), 0x40, np.uint8)  # 2.0
        w = PackedWeight("nvfp4", Encoded(codes[:, 0::2] | codes[:, 1::2] << 4, blocks), np.float32(0.25))
    x = torch.from_numpy(rng.integers(-8, 9, (7, 64)).astype(np.float32))
    expected = F.linear(x, torch.from_numpy(decoded(w)))
    assert expected.abs().max() > 20
    seen, to = [], PackedWeight.to
    monkeypatch.setattr(PackedWeight, "to", lambda self, like: (seen.append(self.shape), to(self, like))[1])
    for elements, rows in ((1 << 24, [40]), (1000, [15, 15, 10]), (64, [1] * 40), (3, [1] * 40)):
        seen.clear()
        monkeypatch.setattr(taps, "CAST_ELEMENTS", elements)
        assert torch.equal(taps.product(x, w), expected)  # type: ignore[arg-type]
        assert seen == [(n, 64) for n in rows]


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_alone_gives_the_same(format) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 700, 256), np.float32))
    one = np.float32(1)  # the only scale of formats without one
    assert torch.equal(rounded(x, format, one), fake_quantize(x, format, one)[0])

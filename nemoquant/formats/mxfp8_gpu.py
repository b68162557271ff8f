"""MXFP8 on a GPU, in Triton; ``mxfp8`` has the definition, ``gpu`` the rest."""

from typing import Any, no_type_check

import triton
import triton.language as tl

from nemoquant.formats import gpu
from nemoquant.formats.rounding import Codes
from nemoquant.formats.triton_shared import e4m3_code, float_bits

_BLOCK = tl.constexpr(32)
_PROGRAM = 64  # blocks


@triton.jit
@no_type_check
def _power(code):
    """The value of an E8M0 code, see ``e8m0.value_bits``."""
    bits = tl.where(code == 0, 0x400000, code << 23)
    return tl.where(code == 0xFF, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def encode_kernel(weight, shift, codes, block_scales, count, LANES: tl.constexpr):
    """``count`` blocks of a weight -> ``codes`` [32 count], ``block_scales`` [count]."""
    block = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    offsets = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    mask = (offsets // _BLOCK) < count
    bits = float_bits(tl.load(weight + offsets, mask=mask, other=0), shift)
    amax = tl.max(bits & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    quotient = tl.div_rn(amax, tl.zeros_like(amax) + 448.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = (quotient >> 23) + ((quotient & 0x7FFFFF) != 0).to(tl.int32)  # see e8m0.ceil_code
    scale = tl.minimum(tl.where(quotient <= 0x400000, 0, scale), 254)
    scale = tl.where(quotient > 0x7F800000, 0xFF, scale)
    tl.store(block_scales + block, scale.to(tl.uint8), mask=block < count)
    factor = _power(tl.where(scale == 0xFF, 127, 254 - scale))[:, None]
    product = (bits.to(tl.float32, bitcast=True) * factor).to(tl.int32, bitcast=True)
    code = e4m3_code(product & 0x7FFFFFFF) | ((bits >> 24) & 0x80)
    tl.store(codes + offsets, code.to(tl.uint8), mask=mask)


@triton.jit
@no_type_check
def decode_kernel(codes, block_scales, table, values, count, LANES: tl.constexpr):
    """``count`` codes -> float32. ``table`` [256]: the value of each E4M3 code."""
    offsets = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = offsets < count
    scale = _power(tl.load(block_scales + offsets // _BLOCK, mask=mask, other=0).to(tl.int32))
    value = tl.load(table + tl.load(codes + offsets, mask=mask, other=0).to(tl.int32), mask=mask, other=0.0)
    tl.store(values + offsets, value * scale, mask=mask)


def encode(weight: gpu.OnGpu, codes: Codes, block_scales: Codes) -> None:
    """``mxfp8.encode`` of a weight on the GPU, into arrays on the host."""
    lane, size = weight.lane, codes.size
    encoded = lane.memory("codes", size + block_scales.size)
    with lane.running():
        launch_encode(weight.bits, weight.shift, encoded[:size], encoded[size:])
    lane.receive_into(encoded, codes, block_scales)


def decoded(codes: Codes, block_scales: Codes) -> Any:
    """``mxfp8.decode`` as a tensor on the GPU; only codes and block scales are copied there."""
    return _values(gpu.copied(codes), gpu.copied(block_scales)).view(codes.shape)


def rounded(values: Any) -> Any:
    """A float32 tensor [..., in] on the GPU through MXFP8 codes and back.

    As by ``mxfp8.encode_activations`` and ``decode``.
    """
    import torch

    bits = values.contiguous().view(torch.int32).view(-1)
    codes = torch.empty(bits.shape, dtype=torch.uint8, device=bits.device)
    block_scales = torch.empty(bits.numel() // _BLOCK.value, dtype=torch.uint8, device=bits.device)
    launch_encode(bits, 0, codes, block_scales)
    return _values(codes, block_scales).view(values.shape)


def launch_encode(bits: Any, shift: int, codes: Any, block_scales: Any) -> None:
    """Flat patterns on the GPU -> codes and block scales there, tensors of uint8."""
    gpu.launch(
        encode_kernel,
        block_scales.numel(),
        _PROGRAM,
        weight=bits,
        shift=shift,
        codes=codes,
        block_scales=block_scales,
    )


def _values(codes: Any, block_scales: Any) -> Any:
    return gpu.decoded_bytes(decode_kernel, codes, block_scales=block_scales)

"""FP8 on a GPU, in Triton; ``fp8`` has the definition, ``gpu`` the rest."""

from typing import Any, no_type_check

import numpy as np
import triton
import triton.language as tl

from nemoquant.formats import gpu
from nemoquant.formats.rounding import Codes
from nemoquant.formats.triton_shared import e4m3_code, float_bits


@triton.jit
@no_type_check
def encode_kernel(weight, shift, decode_scale, codes, count, LANES: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = offsets < count
    value = float_bits(tl.load(weight + offsets, mask=mask, other=0), shift).to(tl.float32, bitcast=True)
    quotient = tl.div_rn(value, tl.zeros_like(value) + decode_scale).to(tl.int32, bitcast=True)
    tl.store(
        codes + offsets,
        (e4m3_code(quotient & 0x7FFFFFFF) | ((quotient >> 24) & 0x80)).to(tl.uint8),
        mask=mask,
    )


@triton.jit
@no_type_check
def decode_kernel(codes, table, decode_scale, values, count, LANES: tl.constexpr):
    """``table`` [256] float32: the value of each code."""
    offsets = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = offsets < count
    value = tl.load(table + tl.load(codes + offsets, mask=mask, other=0).to(tl.int32), mask=mask, other=0.0)
    tl.store(values + offsets, value * decode_scale, mask=mask)


def encode(weight: gpu.OnGpu, decode_scale: np.float32, codes: Codes) -> None:
    """``fp8.encode`` of a weight on the GPU, into an array on the host."""
    lane = weight.lane
    encoded = lane.memory("codes", codes.size)
    with lane.running():
        gpu.launch(
            encode_kernel,
            codes.size,
            gpu.LANES,
            weight=weight.bits,
            shift=weight.shift,
            decode_scale=float(decode_scale),
            codes=encoded,
        )
    lane.receive_into(encoded, codes)


def decoded(codes: Codes, decode_scale: np.float32) -> Any:
    """``fp8.decode`` as a tensor on the GPU; only the codes are copied there."""
    return _values(gpu.copied(codes), decode_scale).view(codes.shape)


def rounded(values: Any, decode_scale: np.float32) -> Any:
    """A float32 tensor on the GPU through E4M3 codes and back, as by ``fp8.encode`` and ``decode``."""
    import torch

    bits = values.contiguous().view(torch.int32).view(-1)
    codes = torch.empty(bits.shape, dtype=torch.uint8, device=bits.device)
    gpu.launch(
        encode_kernel,
        bits.numel(),
        gpu.LANES,
        weight=bits,
        shift=0,
        decode_scale=float(decode_scale),
        codes=codes,
    )
    return _values(codes, decode_scale).view(values.shape)


def _values(codes: Any, decode_scale: np.float32) -> Any:
    return gpu.decoded_bytes(decode_kernel, codes, decode_scale=float(decode_scale))

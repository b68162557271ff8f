"""NVFP4 on a GPU, in Triton; ``nvfp4`` has the definition, ``gpu`` the rest.

What depends on a block scale alone comes from the CPU's own tables: ``reached``, the
``nvfp4_blocks.thresholds`` of float32, and ``scales``, d by E4M3 code. One lane computes a block of 16. The
search is plain: all 126 scales.
"""

from functools import lru_cache
from typing import Any, Literal, no_type_check

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from nemoquant.formats import ScaleMethod, e4m3, gpu, nvfp4_blocks
from nemoquant.formats.rounding import Codes
from nemoquant.formats.triton_shared import e4m3_code, float_bits, magnitude_bits

_METHODS: dict[ScaleMethod | Literal["activations"], int] = {
    "max": 0,
    "four_over_six": 1,
    "mse": 2,
    "activations": 3,
}
_FOUR_OVER_SIX = tl.constexpr(_METHODS["four_over_six"])
_MSE = tl.constexpr(_METHODS["mse"])
_ACTIVATIONS = tl.constexpr(_METHODS["activations"])
_PROGRAM = 128  # blocks


@triton.jit
@no_type_check
def _e2m1_value(code):
    """The magnitude of a code 0 to 7, as float32; see ``e2m1.value_bits``."""
    bits = tl.where(code < 2, code * 0x3F000000, (code << 22) + (126 << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _e2m1_code(magnitude, reached, scale_code, mask):
    """How many of the thresholds of this block scale the magnitude's bits reach."""
    code = tl.zeros_like(magnitude)
    for c in tl.static_range(1, 8):
        code += (magnitude >= tl.load(reached + scale_code * 8 + c, mask=mask, other=0)).to(tl.int32)
    return code


@triton.jit
@no_type_check
def _error(weight, first, shift, scale_code, reached, scales, mask):
    """The error of blocks under a scale, exactly as defined."""
    scale = tl.load(scales + scale_code, mask=mask, other=1.0).to(tl.float64)
    error = tl.zeros_like(scale)
    for i in tl.static_range(16):
        magnitude = magnitude_bits(tl.load(weight + first + i, mask=mask, other=0), shift)
        value = _e2m1_value(_e2m1_code(magnitude, reached, scale_code, mask)).to(tl.float64)
        difference = magnitude.to(tl.float32, bitcast=True).to(tl.float64) - value * scale
        error += difference * difference
    return error


@triton.jit
@no_type_check
def _scale_code(amax, onto):
    quotient = tl.div_rn(amax, tl.zeros_like(amax) + onto)
    return e4m3_code(tl.maximum(quotient, 0.001953125).to(tl.int32, bitcast=True))


@triton.jit
@no_type_check
def encode_kernel(
    weight,
    shift,
    onto,
    reached,
    scales,
    packed,
    block_scales,
    count,
    METHOD: tl.constexpr,
    LANES: tl.constexpr,
):
    """Blocks of a weight -> ``packed`` [8 count], ``block_scales`` [count]; ``onto`` is 6 global scales."""
    block = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = block < count
    first = block * 16
    largest = tl.zeros([LANES], tl.int32)
    for i in tl.static_range(16):
        largest = tl.maximum(largest, magnitude_bits(tl.load(weight + first + i, mask=mask, other=0), shift))
    amax = largest.to(tl.float32, bitcast=True)
    if METHOD == _ACTIVATIONS:  # no lower bound: a block may round to zero, and NaN makes its block NaN
        chosen = e4m3_code(
            tl.div_rn(amax, tl.zeros_like(amax) + onto).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        )
        empty = 0
    else:
        chosen = _scale_code(amax, onto)
        empty = 0x38
    if METHOD == _FOUR_OVER_SIX:
        four = _scale_code(amax * 1.5, onto)
        error = _error(weight, first, shift, chosen, reached=reached, scales=scales, mask=mask)
        chosen = tl.where(
            _error(weight, first, shift, four, reached=reached, scales=scales, mask=mask) < error,
            four,
            chosen,
        )
    if METHOD == _MSE:
        chosen = tl.zeros([LANES], tl.int32) + 1
        error = _error(weight, first, shift, chosen, reached=reached, scales=scales, mask=mask)
        for code in range(2, 127):
            candidate = tl.zeros([LANES], tl.int32) + code
            other = _error(weight, first, shift, candidate, reached=reached, scales=scales, mask=mask)
            chosen = tl.where(other < error, candidate, chosen)
            error = tl.where(other < error, other, error)
    chosen = tl.where(largest == 0, empty, chosen)
    tl.store(block_scales + block, chosen.to(tl.uint8), mask=mask)

    signed = tl.load(reached + chosen * 8, mask=mask, other=0)
    for i in tl.static_range(8):
        pair = tl.zeros([LANES], tl.int32)
        for half in tl.static_range(2):
            bits = float_bits(tl.load(weight + first + 2 * i + half, mask=mask, other=0), shift)
            magnitude = bits & 0x7FFFFFFF
            code = _e2m1_code(magnitude, reached, chosen, mask)
            code += tl.where((bits < 0) & (magnitude >= signed), 8, 0)
            pair += code << (4 * half)
        tl.store(packed + block * 8 + i, pair.to(tl.uint8), mask=mask)


@triton.jit
@no_type_check
def decode_kernel(packed, block_scales, scales, values, count, LANES: tl.constexpr):
    """``count`` bytes of codes -> float32 [2 count]. ``scales`` [256]: d by E4M3 code."""
    offsets = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = offsets < count
    pair = tl.load(packed + offsets, mask=mask, other=0).to(tl.int32)
    scale = tl.load(
        scales + tl.load(block_scales + offsets // 8, mask=mask, other=0).to(tl.int32), mask=mask, other=0.0
    )
    for half in tl.static_range(2):
        code = (pair >> (4 * half)) & 15
        bits = _e2m1_value(code & 7).to(tl.int32, bitcast=True) | ((code & 8) << 28)
        tl.store(values + 2 * offsets + half, bits.to(tl.float32, bitcast=True) * scale, mask=mask)


def encode(
    weight: gpu.OnGpu, global_scale: np.float32, method: ScaleMethod, packed: Codes, block_scales: Codes
) -> None:
    """``nvfp4.encode`` of a weight on the GPU, into arrays on the host."""
    lane, size = weight.lane, packed.size
    tables = _parts(lane.send("tables", _tables(global_scale)))
    encoded = lane.memory("codes", size + block_scales.size)
    with lane.running():
        launch_encode(
            method,
            weight.bits,
            weight.shift,
            global_scale,
            tables=tables,
            packed=encoded[:size],
            block_scales=encoded[size:],
        )
    lane.receive_into(encoded, packed, block_scales)


def launch_encode(
    method: ScaleMethod | Literal["activations"],
    bits: Any,
    shift: int,
    global_scale: np.float32,
    *,
    tables: tuple[Any, Any],
    packed: Any,
    block_scales: Any,
) -> None:
    """Flat patterns on the GPU -> packed codes and block scales there, tensors of uint8.

    ``tables`` are those of this scale, as :func:`tables_on_gpu` has them.
    """
    gpu.launch(
        encode_kernel,
        block_scales.numel(),
        _PROGRAM,
        weight=bits,
        shift=shift,
        onto=float(np.float32(6) * global_scale),
        reached=tables[0],
        scales=tables[1],
        packed=packed,
        block_scales=block_scales,
        METHOD=_METHODS[method],
    )


def _tables(global_scale: np.float32) -> NDArray[np.uint32]:
    """The kernel's tables, which depend on the scale alone, in one flat array.

    First ``nvfp4_blocks.thresholds`` [128, 8] without sign bits, because the kernel looks at signs itself,
    then d by E4M3 code [128] as bits.
    """
    reached = np.empty((128, 8), np.uint32)
    nvfp4_blocks.thresholds(np.uint32(0), global_scale, reached)
    scales = (e4m3.VALUES[:128] * global_scale).view(np.uint32)
    return np.concatenate([(reached & 0x7FFFFFFF).reshape(-1), scales])


def decoded(packed: Codes, block_scales: Codes, global_scale: np.float32) -> Any:
    """``nvfp4.decode`` as a tensor on the GPU; only codes and block scales are copied there."""
    return _values(gpu.copied(packed), gpu.copied(block_scales), global_scale).view(packed.shape[0], -1)


def rounded(values: Any, global_scale: np.float32) -> Any:
    """A float32 tensor [..., in] on the GPU through NVFP4 codes and back, with block scales of its own.

    As by ``nvfp4.encode_activations`` and ``decode``.
    """
    import torch

    bits = values.contiguous().view(torch.int32).view(-1)
    blocks = bits.numel() // nvfp4_blocks.BLOCK
    packed, scales = (torch.empty(n, dtype=torch.uint8, device=bits.device) for n in (8 * blocks, blocks))
    tables = tables_on_gpu(global_scale)
    launch_encode("activations", bits, 0, global_scale, tables=tables, packed=packed, block_scales=scales)
    return _values(packed, scales, global_scale).view(values.shape)


@lru_cache(maxsize=64)  # experts of a layer share the scale of their inputs
def tables_on_gpu(global_scale: np.float32) -> tuple[Any, Any]:
    """Both parts of :func:`_tables` on the GPU.

    For one stream only, the one that is current when the cache drops them.
    """
    import torch

    return _parts(torch.from_numpy(_tables(global_scale).view(np.int32)).to(gpu.torch_device("cuda")))


def _parts(tables: Any) -> tuple[Any, Any]:
    """:func:`_tables` on the GPU as int32 -> ``reached`` int32 [1024], ``scales`` float32 [128]."""
    import torch

    return tables[:1024], tables[1024:].view(torch.float32)


def _values(packed: Any, block_scales: Any, global_scale: np.float32) -> Any:
    import torch

    decoded = torch.empty(2 * packed.numel(), device=packed.device)
    scales = gpu.e4m3_values() * float(global_scale)
    gpu.launch(
        decode_kernel,
        packed.numel(),
        gpu.LANES,
        packed=packed,
        block_scales=block_scales,
        scales=scales,
        values=decoded,
    )
    return decoded

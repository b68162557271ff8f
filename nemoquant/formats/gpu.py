"""The formats' kernels on a GPU: arrays of the CPU in and out, the same bytes. Behind ``device="cuda"`` of ``fp8``, ``nvfp4`` and ``amax``.

With the variable TRITON_INTERPRET=1 in the environment the kernels run on the CPU, slowly and for tests alone.
(They were run in that interpreter only; no GPU was at hand so far.)
"""

import importlib.util
import os
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nemoquant.errors import MissingExtraError, UsageError
from nemoquant.formats import e4m3, nvfp4_blocks
from nemoquant.formats.rounding import Codes, Floats, Weight, weight_bits

Device: TypeAlias = Literal["cpu", "cuda"]

_METHODS = {"max": 0, "four_over_six": 1, "mse": 2}
_LANES, _BLOCK_LANES = 1024, 128


def chosen(device: str) -> bool:
    """Whether ``device`` is the GPU.

    Raises:
        ValueError: it is neither "cpu" nor "cuda".
        UsageError: "cuda", and torch finds no GPU.
        MissingExtraError: "cuda", and Triton is not installed.
    """
    if device == "cpu":
        return False
    if device != "cuda":
        raise ValueError(f"device: got {device!r}, expected cpu or cuda")
    _torch_device()
    if importlib.util.find_spec("triton") is None:
        raise MissingExtraError("device cuda needs Triton, which torch for CUDA brings along: pip install triton")
    return True


def _torch_device() -> str:
    import torch

    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        raise UsageError(
            "device: got cuda, but torch finds no CUDA GPU here; expected one; take device cpu, it writes the same bytes"
        )
    return "cuda"


def _to_device(array: NDArray[Any]) -> Any:
    """A copy on the GPU; unsigned integers as signed ones of the same bits, of which torch can do more."""
    import torch

    signed = {"u2": "i2", "u4": "i4"}.get(array.dtype.str[1:])
    array = array.view(signed) if signed else array
    return torch.from_numpy(array if array.flags.writeable and array.flags.aligned else array.copy()).to(_torch_device())


def _empty(count: int, dtype: str) -> Any:
    import torch

    return torch.empty(count, dtype=getattr(torch, dtype), device=_torch_device())


def _launch(kernel: Any, count: int, lanes: int, *arguments: Any, **constants: Any) -> None:
    """``lanes`` of ``count`` a program; never with fused multiply-add, which would round once where the definitions round twice."""
    if count:
        kernel[(-(-count // lanes),)](*arguments, count, LANES=lanes, enable_fp_fusion=False, **constants)


def amax(weight: Weight) -> np.float32:
    from nemoquant.formats import triton_kernels

    bits, shift = weight_bits(weight)
    largest = _to_device(np.zeros(1, np.int32))
    _launch(triton_kernels.amax_kernel, bits.size, _LANES, _to_device(bits), int(shift), largest)
    found: np.float32 = largest.cpu().numpy().view(np.float32)[0]
    return found


def fp8_encode(weight: Weight, decode_scale: np.float32, codes: Codes) -> None:
    from nemoquant.formats import triton_kernels

    bits, shift = weight_bits(weight)
    found = _empty(bits.size, "uint8")
    _launch(triton_kernels.fp8_encode_kernel, bits.size, _LANES, _to_device(bits), int(shift), float(decode_scale), found)
    codes[...] = found.cpu().numpy().reshape(codes.shape)


def fp8_decode(codes: Codes, decode_scale: np.float32, values: Floats) -> None:
    from nemoquant.formats import triton_kernels

    found = _empty(codes.size, "float32")
    row = np.ascontiguousarray(codes).reshape(-1)
    arguments = _to_device(row), _to_device(e4m3.VALUES), float(decode_scale), found
    _launch(triton_kernels.fp8_decode_kernel, row.size, _LANES, *arguments)
    values[...] = found.cpu().numpy().reshape(values.shape)


def nvfp4_encode(weight: Weight, global_scale: np.float32, method: str, packed: Codes, block_scales: Codes) -> None:
    from nemoquant.formats import triton_kernels

    bits, shift = weight_bits(weight)
    reached = np.empty((128, 8), np.uint32)
    nvfp4_blocks.thresholds(np.uint32(0), global_scale, reached)
    reached &= 0x7FFFFFFF  # the kernel looks at signs itself
    codes, scales = _empty(packed.size, "uint8"), _empty(block_scales.size, "uint8")
    _launch(
        triton_kernels.nvfp4_encode_kernel,
        block_scales.size,
        _BLOCK_LANES,
        _to_device(bits),
        int(shift),
        float(np.float32(6) * global_scale),
        _to_device(reached),
        _to_device(e4m3.VALUES[:128] * global_scale),
        codes,
        scales,
        METHOD=_METHODS[method],
    )
    packed[...], block_scales[...] = codes.cpu().numpy().reshape(packed.shape), scales.cpu().numpy().reshape(block_scales.shape)


def nvfp4_decode(packed: Codes, block_scales: Codes, global_scale: np.float32, values: Floats) -> None:
    from nemoquant.formats import triton_kernels

    found = _empty(values.size, "float32")
    rows = (np.ascontiguousarray(array).reshape(-1) for array in (packed, block_scales, e4m3.VALUES * global_scale))
    _launch(triton_kernels.nvfp4_decode_kernel, packed.size, _LANES, *(_to_device(row) for row in rows), found)
    values[...] = found.cpu().numpy().reshape(values.shape)

"""The operators for torch, ``torch.ops.nemoquant.*``: kernels on CUDA, on the CPU by the emulated host library where one was asked for.

Names and order of arguments are those of ``plugins/<op>/spec.yaml``. Each has a fake kernel (shapes and dtypes without data), so that
``torch.compile`` and ``torch.export`` trace it. None has a gradient.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from nemoquant.errors import BuildError
from nemoquant.ops.abi import DTYPES
from nemoquant.ops.library import Kernels, kernels

DEVICES = ("cpu", "cuda")


def dtype_number(dtype: torch.dtype) -> int:
    """As ``enum nemoquant_dtype`` has it.

    Raises:
        ValueError: it has none.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"no kernel knows {dtype}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def expect_shapes(op: str, sizes: dict[str, int], **given: tuple[Tensor | None, str]) -> None:
    """``given`` are tensors with the letters of their dimensions, "B L C"; a digit behind a letter is subtracted ("K1" is K - 1).

    Raises:
        ValueError: a rank or a dimension differs; names the tensor, its shape and what was expected.
    """
    for name, (tensor, letters) in given.items():
        if tensor is None:
            continue
        expected = tuple(sizes[word[0]] - int(word[1:] or 0) for word in letters.split())
        if tensor.shape != expected:
            raise ValueError(f"{op}: {name} is {list(tensor.shape)}; expected {list(expected)} ({letters})")


def library_for(device: torch.device) -> Kernels:
    """The library for tensors there.

    Raises:
        BuildError: there is none.
    """
    found = kernels(device.type)
    if found is None:
        how = (
            "nemoquant plugins build"
            if device.type == "cuda"
            else "nemoquant plugins build --host, then nemoquant.ops.library.use"
        )
        raise BuildError(f"no kernels for tensors on {device.type}; build them: {how}")
    return found


def call(op: str, device: torch.device, **arguments: Any) -> None:
    """Start a kernel on the current stream of ``device``; tensors stand for their addresses."""
    plain = {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        library_for(device).call(op, stream=stream, **plain)


@torch.library.custom_op("nemoquant::causal_conv1d", mutates_args=(), device_types=DEVICES)
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, state_in: Tensor, y_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time from a state on, then silu.

    Args:
        x: [batch, length, channels] float32, float16 or bfloat16; rows may lie apart (a slice of a wider tensor is not copied).
        weight: [channels, kernel] float32, kernel 2 to 4; the last tap meets the current position.
        bias: [channels] float32, or None.
        state_in: [batch, channels, kernel - 1] like ``x``: the inputs before it, oldest first.
        y_dtype: float32 (default) or that of ``x``.
    Returns:
        y [batch, length, channels] and the last ``kernel - 1`` inputs like ``state_in``.
    Raises:
        ValueError: shapes or dtypes that do not go together.
        BuildError: no library for the device.
        EngineError: the kernel refused.
    """
    batch, length, channels = x.shape
    kernel = weight.shape[-1]
    sizes = {"B": batch, "L": length, "C": channels, "K": kernel}
    expect_shapes("causal_conv1d", sizes, weight=(weight, "C K"), bias=(bias, "C"), state_in=(state_in, "B C K1"))
    if weight.dtype != torch.float32 or (bias is not None and bias.dtype != torch.float32) or state_in.dtype != x.dtype:
        raise ValueError(
            f"causal_conv1d: weight is {weight.dtype}, bias {bias.dtype if bias is not None else None}, state_in {state_in.dtype}; "
            f"expected float32 weight and bias, and a state like x, {x.dtype}"
        )
    stride = x.stride(1) if length > 1 else max(x.stride(0), channels)
    rows_apart = x.stride(2) == 1 and stride >= channels and (batch == 1 or x.stride(0) == length * stride)
    if not rows_apart:
        x, stride = x.contiguous(), channels
    y = torch.empty(batch, length, channels, dtype=y_dtype or torch.float32, device=x.device)
    state_out = torch.empty(state_in.shape, dtype=x.dtype, device=x.device)
    call(
        "causal_conv1d", x.device, x=x, weight=weight.contiguous(), bias=None if bias is None else bias.contiguous(),
        state_in=state_in.contiguous(), y=y, state_out=state_out, batch=batch, length=length, channels=channels, kernel=kernel,
        x_stride=stride, dtype=dtype_number(x.dtype), y_dtype=dtype_number(y.dtype),
    )  # fmt: skip
    return y, state_out


@causal_conv1d.register_fake
def _(
    x: Tensor,
    weight: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    state_in: Tensor,
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=y_dtype or torch.float32), x.new_empty(state_in.shape)

"""The operators for torch, ``torch.ops.nemoquant.*``.

On CUDA they run the kernels; on the CPU the emulated host library, if one was chosen by ``library.use``.

Names and order of arguments are those of ``plugins/<op>/spec.yaml``. Each has a fake kernel (shapes and
dtypes without data), so that ``torch.compile`` and ``torch.export`` can trace it. None has a gradient.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from nemoquant.errors import BuildError
from nemoquant.formats import DEVICES
from nemoquant.ops.abi import DTYPES
from nemoquant.ops.library import VARIABLE, Kernels, kernels


def dtype_number(dtype: torch.dtype) -> int:
    """The number of a dtype in ``enum nemoquant_dtype``.

    Raises:
        ValueError: it has none.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"no kernel knows {dtype}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def expect_shapes(op: str, sizes: dict[str, int], **given: tuple[Tensor | None, str]) -> None:
    """Check the shapes of an operator's tensors.

    Args:
        op: name of the operator, for the message.
        sizes: size of each dimension, by its letter.
        given: tensors with the letters of their dimensions, "B L C"; a digit after a letter is subtracted
            ("K1" is K - 1). None instead of a tensor is not checked.
    Raises:
        ValueError: a rank or a dimension differs; names the tensor, its shape and what was expected.
    """
    for name, (tensor, letters) in given.items():
        if tensor is None:
            continue
        expected = tuple(sizes[word[0]] - int(word[1:] or 0) for word in letters.split())
        if tensor.shape != expected:
            raise ValueError(f"{op}: {name} is {list(tensor.shape)}; expected {list(expected)} ({letters})")


def expect_device(op: str, x: Tensor, **given: Tensor | Sequence[Tensor] | None) -> None:
    """Check that an operator's tensors are where ``x`` is.

    A kernel takes addresses: one of another device's memory ends the process's CUDA context. The fake kernels
    check too, because torch sends a call with a tensor on "meta" there.

    Args:
        given: tensors, or lists of them, by name; None is not checked.
    Raises:
        ValueError: one is on another device; names the tensor and both devices.
    """
    for name, value in given.items():
        for tensor in [value] if isinstance(value, Tensor) else value or ():
            if tensor.device != x.device:
                raise ValueError(f"{op}: {name} is on {tensor.device}, x on {x.device}; move {name} to x's")


def laid_out(t: Tensor) -> Tensor:
    """Contiguous, at a multiple of 16 bytes, which the kernels read at once; copied if it is not.

    What torch allocates begins at such a multiple; a view need not: ``t[1:]`` of rows of an odd length.
    """
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def library_for(op: str, device: torch.device) -> Kernels:
    """The kernel library that computes ``op`` for tensors on ``device``.

    Raises:
        BuildError: there is none.
    """
    library = kernels(device.type)
    if library is None or not library.has(op):
        how = (
            f"nemoquant plugins build, and name the library: {VARIABLE}=PATH"
            if device.type == "cuda"
            else "nemoquant plugins build --host, then nemoquant.ops.library.use"
        )
        raise BuildError(f"{op}: no kernels for tensors on {device.type}; build them: {how}")
    return library


def call(op: str, device: torch.device, **arguments: Any) -> None:
    """Start a kernel on the current stream of ``device``; tensors are passed as their addresses."""
    library, on_cuda = library_for(op, device), device.type == "cuda"
    plain = {
        name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in arguments.items()
    }
    # the launcher asks the current device what it is and what it has
    with torch.cuda.device(device) if on_cuda else nullcontext():
        size = library.workspace(op, **plain)
        # The allocator does not reuse this memory before the kernel has finished on the stream.
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        if size:
            plain["workspace"] = workspace.data_ptr()
        library.call(op, stream=torch.cuda.current_stream(device).cuda_stream if on_cuda else None, **plain)


@torch.library.custom_op("nemoquant::causal_conv1d", mutates_args=(), device_types=DEVICES)
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, state_in: Tensor, y_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time, starting from a state, then silu.

    Args:
        x: [batch, length, channels] float32, float16 or bfloat16; rows may be strided (a slice of a wider
            tensor is not copied).
        weight: [channels, kernel] float32, kernel 2 to 4; the last tap multiplies the current position.
        bias: [channels] float32, or None.
        state_in: [batch, channels, kernel - 1] in the dtype of ``x``: the inputs before it, oldest first.
        y_dtype: float32 (default) or the dtype of ``x``.
    Returns:
        y [batch, length, channels] and the last ``kernel - 1`` inputs like ``state_in``.
    Raises:
        ValueError: shapes or dtypes that do not match, or tensors on different devices.
        BuildError: no library for the device.
        EngineError: the kernel returned an error.
    """
    expect_device("causal_conv1d", x, weight=weight, bias=bias, state_in=state_in)
    batch, length, channels = x.shape
    kernel = weight.shape[-1]
    sizes = {"B": batch, "L": length, "C": channels, "K": kernel}
    expect_shapes(
        "causal_conv1d", sizes, weight=(weight, "C K"), bias=(bias, "C"), state_in=(state_in, "B C K1")
    )
    if (
        weight.dtype != torch.float32
        or (bias is not None and bias.dtype != torch.float32)
        or state_in.dtype != x.dtype
    ):
        raise ValueError(
            f"causal_conv1d: weight is {weight.dtype}, bias {bias.dtype if bias is not None else None}, "
            f"state_in {state_in.dtype}; "
            f"expected float32 weight and bias, and a state like x, {x.dtype}"
        )
    stride = x.stride(1) if length > 1 else max(x.stride(0), channels)
    rows_fit = x.stride(2) == 1 and stride >= channels and (batch == 1 or x.stride(0) == length * stride)
    if not rows_fit:
        x, stride = x.contiguous(), channels
    y = torch.empty(batch, length, channels, dtype=y_dtype or torch.float32, device=x.device)
    state_out = torch.empty(state_in.shape, dtype=x.dtype, device=x.device)
    call(
        "causal_conv1d",
        x.device,
        x=x,
        weight=laid_out(weight),
        bias=None if bias is None else laid_out(bias),
        state_in=laid_out(state_in),
        y=y,
        state_out=state_out,
        batch=batch,
        length=length,
        channels=channels,
        kernel=kernel,
        x_stride=stride,
        dtype=dtype_number(x.dtype),
        y_dtype=dtype_number(y.dtype),
    )
    return y, state_out


@causal_conv1d.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, state_in: Tensor, y_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    expect_device("causal_conv1d", x, weight=weight, bias=bias, state_in=state_in)
    return x.new_empty(x.shape, dtype=y_dtype or torch.float32), x.new_empty(state_in.shape)


ROUNDINGS = {"nearest": 0, "stochastic": 1}  # enum nemoquant_rounding


@torch.library.custom_op("nemoquant::mamba2_scan", mutates_args=(), device_types=DEVICES)
def mamba2_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state_in: Tensor,
    seed: Tensor | None = None,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    rounding: str = "nearest",
    philox_rounds: int = 5,
    step: int = 0,
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The selective state-space scan of Mamba-2 over any number of positions, starting from a state.

    Args:
        x: [batch, length, heads, head_dim] float32, float16 or bfloat16; B and C have the same dtype.
            Positions may be strided.
        dt: [batch, length, heads], before bias and softplus; float32, float16 or bfloat16.
        A, D, dt_bias: [heads] float32; A is negative. None for D means no skip, None for dt_bias means 0.
        B, C: [batch, length, groups, state].
        state_in: [batch, heads, head_dim, state] float32, float16 or bfloat16.
        seed: int64 [1] with ``rounding`` "stochastic", which rounds a float16 state by
            Philox(counter = (index, step), key = seed); None with "nearest", which would not read it.
        dt_min, dt_max: bounds of dt after softplus; None: no upper bound.
        y_dtype: float32 (default), float16 or bfloat16.
    Returns:
        y [batch, length, heads, head_dim], and the state after the last position like ``state_in``.
    Raises:
        ValueError: shapes or dtypes that do not match, or tensors on different devices.
        BuildError: no library for the device.
        EngineError: the kernel returned an error.
    """
    expect_device("mamba2_scan", x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, state_in=state_in, seed=seed)
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    sizes = {"B": batch, "L": length, "H": heads, "P": width, "G": groups, "N": size}
    expect_shapes(
        "mamba2_scan",
        sizes,
        dt=(dt, "B L H"),
        A=(A, "H"),
        B=(B, "B L G N"),
        C=(C, "B L G N"),
        D=(D, "H"),
        dt_bias=(dt_bias, "H"),
        state_in=(state_in, "B H P N"),
    )
    if rounding not in ROUNDINGS:
        raise ValueError(f"mamba2_scan: rounding is {rounding!r}; expected one of {', '.join(ROUNDINGS)}")
    given = None if seed is None else (seed.dtype, tuple(seed.shape))
    if given != ((torch.int64, (1,)) if rounding == "stochastic" else None):
        got = None if seed is None else f"{seed.dtype} {list(seed.shape)}"
        raise ValueError(
            f"mamba2_scan: seed is {got}, rounding {rounding!r}; expected int64 [1] with 'stochastic', None "
            f"with 'nearest'"
        )
    floats = [t.dtype for t in (A, D, dt_bias) if t is not None]
    if {B.dtype, C.dtype} != {x.dtype} or set(floats) != {torch.float32}:
        raise ValueError(
            f"mamba2_scan: x is {x.dtype}, B {B.dtype}, C {C.dtype}, A, D and dt_bias {floats}; expected B "
            f"and C like x, the rest float32"
        )
    x, B, C = (with_contiguous_positions(t) for t in (x, B, C))
    dt = dt if dt.stride(2) == 1 or heads == 1 else dt.contiguous()
    y = torch.empty(x.shape, dtype=y_dtype or torch.float32, device=x.device)
    state_out = torch.empty(state_in.shape, dtype=state_in.dtype, device=x.device)
    arguments: dict[str, Any] = {
        "x": x,
        "b": B,
        "c": C,
        "dt": dt,
        "a": laid_out(A),
        "d": None if D is None else laid_out(D),
        "dt_bias": None if dt_bias is None else laid_out(dt_bias),
        "state_in": laid_out(state_in),
        "y": y,
        "state_out": state_out,
        "seed": seed,
        "step": step,
        "batch": batch,
        "length": length,
        "heads": heads,
        "head_dim": width,
        "groups": groups,
        "state": size,
        "dtype": dtype_number(x.dtype),
        "dt_dtype": dtype_number(dt.dtype),
        "y_dtype": dtype_number(y.dtype),
        "state_dtype": dtype_number(state_in.dtype),
        "rounding": ROUNDINGS[rounding],
        "philox_rounds": philox_rounds,
        "dt_min": dt_min,
        "dt_max": math.inf if dt_max is None else dt_max,
    }
    for name, tensor in (("x", x), ("b", B), ("c", C), ("dt", dt)):
        arguments |= {f"{name}_batch_stride": tensor.stride(0), f"{name}_position_stride": tensor.stride(1)}
    call("mamba2_scan", x.device, **arguments)
    return y, state_out


def with_contiguous_positions(t: Tensor) -> Tensor:
    """[batch, length, rows, size] in the layout that the scan needs, copied if it is another.

    Each position is contiguous, and starts at a multiple of 8 elements and 16 bytes.
    """
    fits = (
        t.stride(3) == 1
        and t.stride(2) == t.shape[3]
        and t.stride(0) % 8 == t.stride(1) % 8 == 0
        and t.data_ptr() % 16 == 0
    )
    return t if fits else laid_out(t)


@mamba2_scan.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state_in: Tensor,
    seed: Tensor | None = None,
    dt_min: float = 0.0,  # noqa: ARG001
    dt_max: float | None = None,  # noqa: ARG001
    rounding: str = "nearest",  # noqa: ARG001
    philox_rounds: int = 5,  # noqa: ARG001
    step: int = 0,  # noqa: ARG001
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    expect_device("mamba2_scan", x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, state_in=state_in, seed=seed)
    return x.new_empty(x.shape, dtype=y_dtype or torch.float32), state_in.new_empty(state_in.shape)


EXPERT_FORMATS: dict[str, tuple[int, tuple[str, ...]]] = {
    "bf16": (0, ("weight",)),
    "w8a16": (1, ("codes", "global_scale")),
    "fp8": (2, ("codes", "global_scale", "input_scale")),
    "w4a16": (3, ("codes", "block_scales", "global_scale")),
    "nvfp4": (4, ("codes", "block_scales", "global_scale", "input_scale")),
}
"""Number (``enum nemoquant_experts_format``) and parts of a projection, by the format's name."""

EXPERT_PRODUCTS = {"auto": 0, "decoded": 1, "native": 2, "grouped": 3}
"""``enum nemoquant_experts_products``."""


@torch.library.custom_op("nemoquant::routed_experts", mutates_args=("skipped",), device_types=DEVICES)
def routed_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    up: list[Tensor],
    down: list[Tensor],
    format: str,
    activation: str = "relu2",
    products: str = "auto",
    skipped: Tensor | None = None,
) -> Tensor:
    """The weighted sum of each token's experts, ``down(relu(up(x))^2)``.

    Args:
        x: [tokens, input] float32, float16 or bfloat16; bfloat16 is fastest. ``input`` and ``width`` are
            multiples of 32.
        expert_ids: [tokens, k] int64; an id that is no expert's index adds nothing to the result, see
            ``skipped``.
        expert_weights: [tokens, k] float32.
        up, down: the parts of all experts' weights [experts, width, input] and [experts, input, width], in
            the order of ``EXPERT_FORMATS[format]``: bfloat16 ``weight``; or ``codes`` (one byte each, or two
            E2M1 a byte), ``block_scales`` (E4M3 bytes [experts, out, in / 16]), ``global_scale`` and
            ``input_scale`` (float32 [experts]).
        format: bf16, w8a16, fp8, w4a16 or nvfp4.
        products: how they are multiplied; "auto" is "decoded", until a GPU has shown the others to be right:
            "decoded" (``mma.sync``, FP4 decoded to bfloat16), "native" (FP4 with block scales, format nvfp4
            on SM120), "grouped" (CUTLASS, where it was built).
        skipped: int32 [1] or None; the number of ids that are no expert's index is added to it, on the device
            and without waiting for it.
    Returns:
        [tokens, input] like ``x``; sums are float32.
    Raises:
        ValueError: shapes or dtypes that do not match, tensors on different devices, or an unknown name.
        BuildError: no library for the device.
        EngineError: the kernel returned an error, for example if it lacks these ``products`` on this device.
    """
    expect_device(
        "routed_experts",
        x,
        expert_ids=expert_ids,
        expert_weights=expert_weights,
        up=up,
        down=down,
        skipped=skipped,
    )
    if format not in EXPERT_FORMATS or activation != "relu2":
        raise ValueError(
            f"routed_experts: format is {format!r}, activation {activation!r}; expected one of "
            f"{', '.join(EXPERT_FORMATS)}, and relu2"
        )
    if products not in EXPERT_PRODUCTS:
        raise ValueError(
            f"routed_experts: products is {products!r}; expected one of {', '.join(EXPERT_PRODUCTS)}"
        )
    number, names = EXPERT_FORMATS[format]
    tokens, size = x.shape
    chosen = expert_ids.shape[-1]
    given = {"up": dict(zip(names, up, strict=False)), "down": dict(zip(names, down, strict=False))}
    if {len(up), len(down)} != {len(names)}:
        raise ValueError(
            f"routed_experts: up has {len(up)} parts, down {len(down)}; {format} has {', '.join(names)}"
        )
    experts, width = up[0].shape[:2]
    packed = 2 if "block_scales" in names else 1
    sizes = {"T": tokens, "k": chosen, "E": experts, "I": size, "M": width}
    expect_shapes(
        "routed_experts", sizes, expert_ids=(expert_ids, "T k"), expert_weights=(expert_weights, "T k")
    )
    if expert_ids.dtype != torch.int64 or expert_weights.dtype != torch.float32:
        raise ValueError(
            f"routed_experts: expert_ids is {expert_ids.dtype}, expert_weights {expert_weights.dtype}; "
            f"expected int64 and float32"
        )
    if skipped is not None and (skipped.dtype, skipped.shape) != (torch.int32, (1,)):
        raise ValueError(
            f"routed_experts: skipped is {skipped.dtype} {list(skipped.shape)}; expected int32 [1]"
        )
    arguments: dict[str, Tensor] = {}
    for projection, parts in given.items():
        out, into = (width, size) if projection == "up" else (size, width)
        shapes = {
            "weight": (experts, out, into),
            "codes": (experts, out, into // packed),
            "block_scales": (experts, out, into // 16),
            "global_scale": (experts,),
            "input_scale": (experts,),
        }
        for name, tensor in parts.items():
            label = f"routed_experts: {projection}'s {name} is {tensor.dtype} {list(tensor.shape)}"
            wanted = {"weight": "bfloat16", "codes": "bytes", "block_scales": "bytes"}.get(name, "float32")
            right = (
                tensor.dtype.itemsize == 1 if wanted == "bytes" else str(tensor.dtype) == f"torch.{wanted}"
            )
            if tensor.shape != shapes[name] or not right:
                raise ValueError(f"{label}; expected {wanted} {list(shapes[name])}")
            arguments[projection if name in ("weight", "codes") else f"{projection}_{name}"] = laid_out(
                tensor
            )
    y = torch.empty(tokens, size, dtype=x.dtype, device=x.device)
    if tokens:
        call(
            "routed_experts",
            x.device,
            x=laid_out(x),
            expert_ids=laid_out(expert_ids),
            expert_weights=laid_out(expert_weights),
            y=y,
            tokens=tokens,
            chosen=chosen,
            experts=experts,
            input=size,
            width=width,
            dtype=dtype_number(x.dtype),
            format=number,
            activation=0,
            products=EXPERT_PRODUCTS[products],
            skipped=skipped,
            **arguments,
        )
    return y


@routed_experts.register_fake
def _(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    up: list[Tensor],
    down: list[Tensor],
    format: str,  # noqa: ARG001
    activation: str = "relu2",  # noqa: ARG001
    products: str = "auto",  # noqa: ARG001
    skipped: Tensor | None = None,
) -> Tensor:
    expect_device(
        "routed_experts",
        x,
        expert_ids=expert_ids,
        expert_weights=expert_weights,
        up=up,
        down=down,
        skipped=skipped,
    )
    return x.new_empty(x.shape)

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


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOAT32, INT64, INT32 = (torch.float32,), (torch.int64,), (torch.int32,)
BYTES = (torch.uint8, torch.int8, torch.float8_e4m3fn)

MAY_BE_ZERO = "BLT"
"""Batch, length and tokens: where one is 0 there is nothing to compute, and no kernel is called."""


def expect(
    op: str, x: Tensor, given: dict[str, tuple[Tensor | None, str, Sequence[torch.dtype]]]
) -> dict[str, int]:
    """Check devices, dtypes and shapes of an operator's tensors.

    A kernel takes addresses: one of another device's memory ends the process's CUDA context. The operator and
    its fake kernel both check, so that what torch exports also runs; a call with a tensor on "meta" goes to
    the fake kernel alone.

    Args:
        op: name of the operator, for the message.
        x: the tensor whose device is expected of all.
        given: by name: the tensor, or None, which is not checked; the letters of its dimensions, "B L C",
            "C K-1" or "I/16", a letter alone before it is reckoned with, or 1; the dtypes it may have.
    Returns:
        The size of each letter, that of the first tensor with it.
    Raises:
        ValueError: one does not fit; names the tensor, what it is and what was expected.
    """
    sizes: dict[str, int] = {"1": 1}
    device = x.device
    for name, (tensor, letters, dtypes) in given.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x on {device}; expected one device")
        if tensor.dtype not in dtypes:
            beside = "" if tensor is x else f", x {x.dtype}"
            raise ValueError(f"{op}: {name} is {tensor.dtype}{beside}; expected {one_of(dtypes)}")
        shape, words = tensor.shape, letters.split()
        if len(shape) != len(words):
            raise ValueError(f"{op}: {name} is {list(shape)}; expected [{', '.join(words)}]")
        expected = []
        for word, got in zip(words, shape, strict=True):
            letter, change = word[0], word[1:]
            if letter not in sizes:
                if letter not in MAY_BE_ZERO and got < 1:
                    raise ValueError(f"{op}: {name} is {list(shape)} ({letters}); expected {letter} >= 1")
                sizes[letter] = got
            size = sizes[letter]
            if change:
                number = int(change[1:])
                size = size - number if change[0] == "-" else size // number
            expected.append(size)
        if shape != tuple(expected):
            raise ValueError(f"{op}: {name} is {list(shape)}; expected {expected} ({letters})")
    return sizes


def expect_y(op: str, y_dtype: torch.dtype | None, dtypes: Sequence[torch.dtype]) -> None:
    """Check the dtype that the result is to have; None is the default.

    Raises:
        ValueError: it is none of ``dtypes``.
    """
    if y_dtype is not None and y_dtype not in dtypes:
        raise ValueError(f"{op}: y_dtype is {y_dtype}; expected {one_of(dtypes)}")


def one_of(dtypes: Sequence[torch.dtype]) -> str:
    """Dtypes as the end of a message."""
    names = ", ".join(dict.fromkeys(map(str, dtypes)))
    return f"one of {names}" if "," in names else names


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


def check_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state_in: Tensor, y_dtype: torch.dtype | None
) -> dict[str, int]:
    """The checks of :func:`causal_conv1d` and its fake kernel; as :func:`expect`."""
    expect_y("causal_conv1d", y_dtype, (torch.float32, x.dtype))
    return expect(
        "causal_conv1d",
        x,
        {
            "x": (x, "B L C", FLOATS),
            "weight": (weight, "C K", FLOAT32),
            "bias": (bias, "C", FLOAT32),
            "state_in": (state_in, "B C K-1", (x.dtype,)),
        },
    )


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
        y [batch, length, channels] and the last ``kernel - 1`` inputs like ``state_in``; a batch or length of
        0 gives an empty y, and a copy of ``state_in``.
    Raises:
        ValueError: shapes or dtypes that do not match, or tensors on different devices.
        BuildError: no library for the device.
        EngineError: the kernel returned an error.
    """
    sizes = check_conv(x, weight, bias, state_in, y_dtype)
    batch, length, channels, kernel = (sizes[letter] for letter in "BLCK")
    y = torch.empty(batch, length, channels, dtype=y_dtype or torch.float32, device=x.device)
    state_out = torch.empty(state_in.shape, dtype=x.dtype, device=x.device)
    if not batch or not length:
        return y, state_out.copy_(state_in)
    stride = x.stride(1) if length > 1 else max(x.stride(0), channels)
    rows_fit = x.stride(2) == 1 and stride >= channels and (batch == 1 or x.stride(0) == length * stride)
    if not rows_fit:
        x, stride = x.contiguous(), channels
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
    check_conv(x, weight, bias, state_in, y_dtype)
    return x.new_empty(x.shape, dtype=y_dtype or torch.float32), x.new_empty(state_in.shape)


ROUNDINGS = {"nearest": 0, "stochastic": 1}  # enum nemoquant_rounding


def check_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    dt_bias: Tensor | None,
    state_in: Tensor,
    seed: Tensor | None,
    rounding: str,
    y_dtype: torch.dtype | None,
) -> dict[str, int]:
    """The checks of :func:`mamba2_scan` and its fake kernel; as :func:`expect`."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"mamba2_scan: rounding is {rounding!r}; expected one of {', '.join(ROUNDINGS)}")
    stochastic = rounding == "stochastic"
    if (seed is not None) != stochastic:
        raise ValueError(
            f"mamba2_scan: seed is {'given' if seed is not None else None}, rounding {rounding!r}; expected "
            f"int64 [1] with 'stochastic', None with 'nearest'"
        )
    if stochastic and state_in.dtype != torch.float16:
        raise ValueError(
            f"mamba2_scan: state_in is {state_in.dtype}, rounding 'stochastic'; expected torch.float16"
        )
    expect_y("mamba2_scan", y_dtype, FLOATS)
    return expect(
        "mamba2_scan",
        x,
        {
            "x": (x, "B L H P", FLOATS),
            "dt": (dt, "B L H", FLOATS),
            "A": (A, "H", FLOAT32),
            "B": (B, "B L G N", (x.dtype,)),
            "C": (C, "B L G N", (x.dtype,)),
            "D": (D, "H", FLOAT32),
            "dt_bias": (dt_bias, "H", FLOAT32),
            "state_in": (state_in, "B H P N", FLOATS),
            "seed": (seed, "1", INT64),
        },
    )


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
        y [batch, length, heads, head_dim], and the state after the last position like ``state_in``; a batch
        or length of 0 gives an empty y, and a copy of ``state_in``.
    Raises:
        ValueError: shapes or dtypes that do not match, or tensors on different devices.
        BuildError: no library for the device.
        EngineError: the kernel returned an error.
    """
    sizes = check_scan(
        x, dt, A, B, C, D, dt_bias=dt_bias, state_in=state_in, seed=seed, rounding=rounding, y_dtype=y_dtype
    )
    batch, length, heads, width, groups, size = (sizes[letter] for letter in "BLHPGN")
    y = torch.empty(x.shape, dtype=y_dtype or torch.float32, device=x.device)
    state_out = torch.empty(state_in.shape, dtype=state_in.dtype, device=x.device)
    if not batch or not length:
        return y, state_out.copy_(state_in)
    x, B, C = (with_contiguous_positions(t) for t in (x, B, C))
    dt = dt if dt.stride(2) == 1 or heads == 1 else dt.contiguous()
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
    rounding: str = "nearest",
    philox_rounds: int = 5,  # noqa: ARG001
    step: int = 0,  # noqa: ARG001
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    check_scan(
        x, dt, A, B, C, D, dt_bias=dt_bias, state_in=state_in, seed=seed, rounding=rounding, y_dtype=y_dtype
    )
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


def check_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    up: list[Tensor],
    down: list[Tensor],
    *,
    format: str,
    activation: str,
    products: str,
    skipped: Tensor | None,
) -> dict[str, int]:
    """The checks of :func:`routed_experts` and its fake kernel; as :func:`expect`."""
    if format not in EXPERT_FORMATS or activation != "relu2":
        raise ValueError(
            f"routed_experts: format is {format!r}, activation {activation!r}; expected one of "
            f"{', '.join(EXPERT_FORMATS)}, and relu2"
        )
    if products not in EXPERT_PRODUCTS:
        raise ValueError(
            f"routed_experts: products is {products!r}; expected one of {', '.join(EXPERT_PRODUCTS)}"
        )
    names = EXPERT_FORMATS[format][1]
    if {len(up), len(down)} != {len(names)}:
        raise ValueError(
            f"routed_experts: up has {len(up)} parts, down {len(down)}; {format} has {', '.join(names)}"
        )
    given: dict[str, tuple[Tensor | None, str, Sequence[torch.dtype]]] = {
        "x": (x, "T I", FLOATS),
        "expert_ids": (expert_ids, "T k", INT64),
        "expert_weights": (expert_weights, "T k", FLOAT32),
        "skipped": (skipped, "1", INT32),
    }
    two_a_byte = "/2" if "block_scales" in names else ""
    for projection, parts, out, into in (("up", up, "M", "I"), ("down", down, "I", "M")):
        kinds: dict[str, tuple[str, Sequence[torch.dtype]]] = {
            "weight": (f"E {out} {into}", (torch.bfloat16,)),
            "codes": (f"E {out} {into}{two_a_byte}", BYTES),
            "block_scales": (f"E {out} {into}/16", BYTES),
            "global_scale": ("E", FLOAT32),
            "input_scale": ("E", FLOAT32),
        }
        for name, tensor in zip(names, parts, strict=True):
            given[f"{projection}'s {name}"] = (tensor, *kinds[name])
    return expect("routed_experts", x, given)


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
            E2M1 a byte; uint8, int8 or float8_e4m3fn), ``block_scales`` (E4M3 bytes, as those
            [experts, out, in / 16]), ``global_scale`` and
            ``input_scale`` (float32 [experts]).
        format: bf16, w8a16, fp8, w4a16 or nvfp4.
        products: how they are multiplied; "auto" is "decoded", until a GPU has shown the others to be right:
            "decoded" (``mma.sync``, FP4 decoded to bfloat16), "native" (FP4 with block scales, format nvfp4
            on SM120), "grouped" (CUTLASS, where it was built).
        skipped: int32 [1] or None; the number of ids that are no expert's index is added to it, on the device
            and without waiting for it.
    Returns:
        [tokens, input] like ``x``; sums are float32. Empty without tokens.
    Raises:
        ValueError: shapes or dtypes that do not match, tensors on different devices, or an unknown name.
        BuildError: no library for the device.
        EngineError: the kernel returned an error, for example if it lacks these ``products`` on this device.
    """
    sizes = check_experts(
        x,
        expert_ids,
        expert_weights,
        up,
        down,
        format=format,
        activation=activation,
        products=products,
        skipped=skipped,
    )
    tokens, chosen, experts, size, width = (sizes[letter] for letter in "TkEIM")
    y = torch.empty(tokens, size, dtype=x.dtype, device=x.device)
    if not tokens:
        return y
    number, names = EXPERT_FORMATS[format]
    arguments = {
        projection if name in ("weight", "codes") else f"{projection}_{name}": laid_out(tensor)
        for projection, parts in (("up", up), ("down", down))
        for name, tensor in zip(names, parts, strict=True)
    }
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
    format: str,
    activation: str = "relu2",
    products: str = "auto",
    skipped: Tensor | None = None,
) -> Tensor:
    check_experts(
        x,
        expert_ids,
        expert_weights,
        up,
        down,
        format=format,
        activation=activation,
        products=products,
        skipped=skipped,
    )
    return x.new_empty(x.shape)

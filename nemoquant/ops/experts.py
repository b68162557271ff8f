"""RoutedExperts for torch, ``torch.ops.nemoquant.routed_experts``: as ``functional.py`` has the others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemoquant.graph.spec import spec
from nemoquant.ops.functional import DEVICES, call, dtype_number

FORMATS = ("bf16", "fp8", "w8a16", "nvfp4", "w4a16")  # enum nemoquant_experts_format
DTYPES = {"weight": torch.bfloat16, "codes": torch.uint8, "block_scales": torch.uint8, "global_scale": torch.float32, "input_scale": torch.float32}  # fmt: skip


def parts(format: str, projection: str, given: Sequence[Tensor], shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """The tensors of a projection [experts, out, in] by the names of their parts, contiguous.

    Raises:
        ValueError: their number, a shape or a dtype is not the format's.
    """
    names = spec("routed_experts").formats[format]
    if len(given) != len(names):
        raise ValueError(f"routed_experts: {projection} has {len(given)} tensors; expected {len(names)} for {format}: {', '.join(names)}")
    experts, out, size = shape
    packed = 2 if "block_scales" in names else 1
    shapes = {
        "weight": shape, "codes": (experts, out, size // packed), "block_scales": (experts, out, size // 16),
        "global_scale": (experts,), "input_scale": (experts,),
    }  # fmt: skip
    found = {}
    for name, tensor in zip(names, given, strict=True):
        if tensor.shape != shapes[name] or tensor.dtype != DTYPES[name]:
            raise ValueError(
                f"routed_experts: {projection} {name} is {tensor.dtype} {list(tensor.shape)}; expected {DTYPES[name]} {list(shapes[name])}"
            )
        found[name] = tensor.contiguous()
    return found


@torch.library.custom_op("nemoquant::routed_experts", mutates_args=("skipped",), device_types=DEVICES)
def routed_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    format: str = "bf16",
    skipped: Tensor | None = None,
) -> Tensor:
    """The weighted sum of each token's experts, ``down(relu(up(x))^2)``.

    Args:
        x: [tokens, input] float32, float16 or bfloat16.
        expert_ids: [tokens, k] int64. An id that is out of range adds nothing.
        expert_weights: [tokens, k] float32.
        up, down: the parts of the weights [experts, width, input] and [experts, input, width] in the order of the format's row in
            ``plugins/routed_experts/spec.yaml``: bfloat16 weights, or codes and block scales as uint8; scales float32 [experts].
        format: bf16, fp8, w8a16, nvfp4 or w4a16.
        skipped: int32 [1] that gets the number of ids out of range, or None.
    Returns:
        y [tokens, input] like ``x``.
    Raises:
        ValueError: shapes or dtypes that do not go together.
        BuildError: no library for the device.
        EngineError: the kernel refused.
    """
    if format not in FORMATS:
        raise ValueError(f"routed_experts: format is {format!r}; expected one of {', '.join(FORMATS)}")
    tokens, size = x.shape
    if expert_ids.shape != expert_weights.shape or expert_ids.ndim != 2 or expert_ids.shape[0] != tokens:
        raise ValueError(
            f"routed_experts: expert_ids is {list(expert_ids.shape)}, expert_weights {list(expert_weights.shape)}; expected [{tokens}, k] both"
        )
    if expert_ids.dtype != torch.int64 or expert_weights.dtype != torch.float32 or (
        skipped is not None and (skipped.dtype != torch.int32 or skipped.numel() != 1)
    ):  # fmt: skip
        raise ValueError(
            f"routed_experts: expert_ids is {expert_ids.dtype}, expert_weights {expert_weights.dtype}, skipped "
            f"{skipped.dtype if skipped is not None else None}; expected int64, float32, and int32 [1] or None"
        )
    if not up or up[0].ndim != 3:
        raise ValueError("routed_experts: up is empty, or its first part no [experts, width, input]")
    experts, width = up[0].shape[:2]
    sizes = {"tokens": tokens, "top_k": expert_ids.shape[1], "experts": experts, "input": size, "width": width}
    given = {}
    for projection, tensors, shape in (("up", up, (experts, width, size)), ("down", down, (experts, size, width))):
        for name, tensor in parts(format, projection, tensors, shape).items():
            given[projection if name in ("weight", "codes") else f"{projection}_{name}"] = tensor
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    call(
        "routed_experts", x.device, x=x.contiguous(), expert_ids=expert_ids.contiguous(), expert_weights=expert_weights.contiguous(),
        y=y, skipped=skipped, **given, **sizes, dtype=dtype_number(x.dtype), format=FORMATS.index(format),
    )  # fmt: skip
    return y


@routed_experts.register_fake
def _(
    x: Tensor,
    expert_ids: Tensor,  # noqa: ARG001
    expert_weights: Tensor,  # noqa: ARG001
    up: Sequence[Tensor],  # noqa: ARG001
    down: Sequence[Tensor],  # noqa: ARG001
    format: str = "bf16",  # noqa: ARG001
    skipped: Tensor | None = None,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(x.shape)

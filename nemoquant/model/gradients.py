"""Backwards through one layer: the gradient at its input, and at the output of each of its matrix products.

The reference model works in place and without autograd, to be fast and small. So what it computes between two
products stands here again, in torch's operators that have derivatives; a test compares both. Products have no
gradient of their weights, and keep nothing.

The choice of experts has no gradient: a token's factors have one, as in training.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemoquant.model import names
from nemoquant.model.attention import attend
from nemoquant.model.config import LayerKind, NemotronHConfig
from nemoquant.model.kinds.mamba import CHUNK
from nemoquant.model.moe import route
from nemoquant.model.taps import CAST_ELEMENTS, Scope, Weights, product

Seen = Callable[[str, Tensor], None]
"""Receives the gradient [tokens, out] at the output of a product, by the name of its module."""


def layer_gradient(
    config: NemotronHConfig, kind: LayerKind, weights: Weights, x: Tensor, gradient: Tensor, seen: Seen
) -> Tensor:
    """The gradient at a layer's input.

    Args:
        config, weights: as in :func:`nemoquant.model.reference.layer_forward`.
        x: the input [batch, length, hidden], in the compute dtype. Not changed.
        gradient: at the output, the same shape and dtype. Not changed.
        seen: called with names relative to the layer, such as ``mixer.in_proj``, in no particular order; for
            a routed expert with the rows of its tokens in ascending order.
    Returns:
        [batch, length, hidden] in the dtype of ``x``, a new tensor.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = layer_output(config, kind, weights, leaf, seen)
    (found,) = torch.autograd.grad(output, [leaf], [gradient])
    return found


def layer_output(config: NemotronHConfig, kind: LayerKind, weights: Weights, x: Tensor, seen: Seen) -> Tensor:
    """What ``layer_forward`` computes of ``x`` but for rounding, with derivatives; arguments as above."""

    def multiply(name: str, x: Tensor) -> Tensor:
        found: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, lambda: mixer[f"{name}.weight"], lambda g: seen(names.MIXER + name, g)
        )
        return found

    mixer = Scope(weights, names.MIXER)
    normed = rms_norm(x, weights["norm.weight"], config.norm_eps)
    return x + MIXERS[kind](config, mixer, normed, multiply)


class _Product(torch.autograd.Function):
    """``x @ weight.T``, which shows its output's gradient; see :func:`nemoquant.model.taps.product`.

    The weight is looked up once more on the way back: a layer's folded weights would take gigabytes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor], seen: Callable[[Tensor], None]) -> Tensor:
        ctx.weight, ctx.seen = weight, seen
        return product(x, weight())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen(gradient)
        weight = ctx.weight()
        if weight.dtype == gradient.dtype and weight.device == gradient.device:
            # Of bf16 matrices that are laid out otherwise, torch's product on a CPU is many times slower.
            found = gradient.new_empty(len(gradient), weight.shape[1])
            for part in _steps(weight.shape[1], len(weight)):
                found[:, part] = product(gradient, weight[:, part].mT.contiguous())
            return found, None, None
        found = gradient.new_zeros(len(gradient), weight.shape[1])
        for part in _steps(len(weight), weight.shape[1]):
            found.addmm_(gradient[:, part], weight[part].to(gradient.device).to(gradient.dtype))
        return found, None, None


def _steps(length: int, other: int) -> list[slice]:
    """Parts of a side of a weight, so that what is copied of it at a time stays small."""
    step = max(1, CAST_ELEMENTS // other)
    return [slice(start, start + step) for start in range(0, length, step)]


Multiply = Callable[[str, Tensor], Tensor]
"""The product of a module of the mixer, by its relative name, with [tokens, in]."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As :func:`nemoquant.model.norm.rms_norm`."""
    return (_unit(x.float(), eps) * weight.to(x.device).float()).to(x.dtype)


def _unit(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _mlp(multiply: Multiply, prefix: str, x: Tensor) -> Tensor:
    return multiply(f"{prefix}down_proj", torch.relu(multiply(f"{prefix}up_proj", x)).square())


def mlp(config: NemotronHConfig, weights: Weights, x: Tensor, multiply: Multiply) -> Tensor:  # noqa: ARG001
    """As ``model/mlp.py``; x [batch, length, hidden], normalised, and so it is below."""
    return _mlp(multiply, "", x.flatten(0, 1)).view_as(x)


def attention(
    config: NemotronHConfig,
    weights: Weights,  # noqa: ARG001
    x: Tensor,
    multiply: Multiply,
) -> Tensor:
    """As ``model/attention.py``, from the first position on."""
    flat = x.flatten(0, 1)
    query, key, value = (
        multiply(name, flat).view(*x.shape[:2], -1, config.head_dim).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    return multiply("o_proj", attend(query, key, value).transpose(1, 2).flatten(2).flatten(0, 1)).view_as(x)


def moe(config: NemotronHConfig, weights: Weights, x: Tensor, multiply: Multiply) -> Tensor:
    """As ``model/moe.py``."""
    flat = x.flatten(0, 1)
    ids, factors = route(config, weights, flat)
    y = multiply("fc1_latent_proj", flat) if config.moe_latent_size else flat
    total = torch.zeros_like(y, dtype=torch.float32)
    order = torch.argsort(ids.flatten(), stable=True)
    start = 0
    for expert, count in enumerate(torch.bincount(ids.flatten()).tolist()):
        if count:
            places = order[start : start + count]
            rows = places // ids.shape[1]
            reached = _mlp(multiply, names.expert(expert), y[rows]) * factors.flatten()[places, None]
            total = total.index_add(0, rows, reached.float())
            start += count
    y = total.to(x.dtype)
    if config.moe_latent_size:
        y = multiply("fc2_latent_proj", y)
    if config.n_shared_experts:
        y = y + _mlp(multiply, "shared_experts.", flat)
    return y.view_as(x)


def mamba(config: NemotronHConfig, weights: Weights, x: Tensor, multiply: Multiply) -> Tensor:
    """As ``model/mamba2.py``, from the first position on."""
    batch, length, _ = x.shape
    groups, heads = config.n_groups, config.mamba_num_heads
    inner, bc = config.mamba_inner, groups * config.ssm_state_size
    projected = multiply("in_proj", x.flatten(0, 1)).view(batch, length, -1)
    z, xbc, dt = torch.split(projected.float(), [inner, config.conv_channels, heads], -1)
    taps, a_log, d, dt_bias = (
        weights[name].to(x.device).float() for name in ("conv1d.weight", "A_log", "D", "dt_bias")
    )
    bias = weights["conv1d.bias"].to(x.device).float() if config.use_conv_bias else None
    convolved = F.conv1d(xbc.mT, taps, bias, padding=taps.shape[-1] - 1, groups=len(taps))
    xs, b, c = torch.split(F.silu(convolved[..., :length]).mT, [inner, bc, bc], -1)
    dt = F.softplus(dt + dt_bias).clamp(*config.time_step_limit).view(batch, length, groups, -1)
    xs = xs.reshape(*dt.shape, config.mamba_head_dim)
    y = scan(xs, dt, -a_log.exp().view(groups, -1), *(t.reshape(batch, length, groups, -1) for t in (b, c)))
    y = (y + xs * d.view(groups, -1, 1)).flatten(2) * F.silu(z)
    y = _unit(y.view(batch * length, groups, -1), config.norm_eps).flatten(1)
    y = (y * weights["norm.weight"].to(x.device).float()).to(x.dtype)
    return multiply("out_proj", y).view_as(x)


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The recurrence of ``model/mamba2.py`` from the first position on, without the skip; all in float32.

    Args:
        x: [batch, length, groups, h, head_dim].
        dt: [batch, length, groups, h], final.
        a: [groups, h].
        b, c: [batch, length, groups, state].
    Returns:
        like ``x``.
    """
    x, dt = x.permute(0, 2, 3, 1, 4), dt.permute(0, 2, 3, 1)  # [batch, groups, h, length, ...]
    b, c = b.transpose(1, 2)[:, :, None], c.transpose(1, 2)[:, :, None]  # [batch, groups, 1, length, state]
    state: Tensor | None = None
    found: list[Tensor] = []
    for start in range(0, x.shape[3], CHUNK):
        part = slice(start, start + CHUNK)
        moved = x[..., part, :] * dt[..., part, None]
        b_part, c_part = b[..., part, :], c[..., part, :]
        decay = (dt[..., part].double() * a.double()[..., None]).cumsum(-1)
        future = torch.ones(2 * decay.shape[-1:], dtype=torch.bool, device=x.device).triu_(1)
        apart = (decay[..., :, None] - decay[..., None, :]).float().masked_fill(future, -torch.inf)
        y = (apart.exp() * (c_part @ b_part.mT)) @ moved
        left = (decay[..., -1:] - decay).exp().float()[..., None]
        added = (moved * left).mT @ b_part  # [batch, groups, h, head_dim, state]
        if state is not None:
            y = y + c_part @ state.mT * decay.exp().float()[..., None]
            added = added + state * decay[..., -1:].exp().float()[..., None]
        state = added
        found.append(y)
    return torch.cat(found, 3).permute(0, 3, 1, 2, 4)


MIXERS: Mapping[LayerKind, Callable[[NemotronHConfig, Weights, Tensor, Multiply], Tensor]] = MappingProxyType(
    {"mamba": mamba, "moe": moe, "attention": attention, "mlp": mlp}
)

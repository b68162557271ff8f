"""The Mamba-2 block: projection, causal convolution, selective state-space scan, gated norm, projection.

For each head with its group's B and C (Dao and Gu 2024, arXiv:2405.21060):

    dt_t = clamp(softplus(dt_t + dt_bias), dt_min, dt_max)
    state_t = exp(dt_t * A) * state_{t-1} + dt_t * x_t (outer) B_t           A = -exp(A_log)
    y_t = state_t @ C_t + D * x_t

Several positions at once are computed in chunks by matrix products (section 6 of the paper): within a chunk
as masked attention, across chunks by carrying the state. The states of a group's heads are the rows of one
matrix, so that one product with the group's B or C serves them all, and B and C are never repeated. Memory
follows batch * heads * CHUNK^2.

Between the two projections everything is float32, but the running sums of dt * A are float64: the products
use differences of these sums, and after one strong decay a float32 sum would lose the weak ones that follow.

On CUDA, kernels built by `nemoquant plugins build` compute the convolution and the scan, where they exist
(``ops/library.py`` prints once which library is used).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemoquant.model.config import NemotronHConfig
from nemoquant.model.kinds.mamba import CHUNK
from nemoquant.model.norm import gated_group_norm
from nemoquant.model.taps import Tap, Weights, linear
from nemoquant.ops.library import serves


@dataclass(frozen=True)
class MambaState:
    """The state of a Mamba-2 layer.

    ``conv`` [batch, channels, conv_kernel - 1]: the last inputs of the convolution, in the compute dtype,
    oldest first. ``ssm`` [batch, heads, head_dim, state]: float32.
    """

    conv: Tensor
    ssm: Tensor


def empty_state(config: NemotronHConfig, batch: int, like: Tensor) -> MambaState:
    """The state before the first position: zeros, with the compute dtype and device of ``like``."""
    sizes = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
    return MambaState(
        like.new_zeros(batch, config.conv_channels, config.conv_kernel - 1),
        like.new_zeros(batch, *sizes, dtype=torch.float32),
    )


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time, then silu.

    Args:
        x: [batch, length, channels], any floating dtype.
        weight: [channels, 1, kernel]; the last tap multiplies the current position.
        bias: [channels] or None.
        state: [batch, channels, kernel - 1], the inputs before ``x``.
    Returns:
        y [batch, length, channels] float32, and the last ``kernel - 1`` inputs, in the dtype of ``x``.
    """
    if serves("causal_conv1d", x.device.type):
        from nemoquant.ops.functional import causal_conv1d

        floats = (None if t is None else t.to(x.device, torch.float32) for t in (weight[:, 0], bias))
        convolved: tuple[Tensor, Tensor] = causal_conv1d(x, *floats, state.to(x))
        return convolved
    length, kernel = x.shape[1], weight.shape[-1]
    taps = weight.to(x.device).float()[:, 0].mT.contiguous()  # [kernel, channels]
    full = torch.cat([state.to(x).mT, x], 1)
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    # All in float32, in blocks that fit the caches: six times as fast as bf16 times float32.
    for start in range(0, length, CHUNK):
        part = y[:, start : start + CHUNK]
        block = full[:, start : start + part.shape[1] + kernel - 1].float()
        torch.mul(block[:, : part.shape[1]], taps[0], out=part)
        for j in range(1, kernel):
            part.addcmul_(block[:, j : j + part.shape[1]], taps[j])
        if bias is not None:
            part += bias.to(x.device).float()
        F.silu(part, inplace=True)
    return y, full[:, length:].mT.clone(memory_format=torch.contiguous_format)


def scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    *,
    dt_bias: Tensor,
    limit: tuple[float, float],
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The recurrence above over any length >= 1, starting from ``state``.

    Args:
        x: [batch, length, heads, head_dim].
        dt: [batch, length, heads], before bias and softplus.
        a, d, dt_bias: [heads] float32; ``a`` is negative.
        b, c: [batch, length, groups, state]; head h belongs to group h // (heads // groups).
        limit: bounds of dt after softplus.
        state: [batch, heads, head_dim, state] float32; not changed.
    Returns:
        y [batch, length, heads, head_dim] and the state after the last position, both float32.
    """
    if serves("mamba2_scan", x.device.type):
        from nemoquant.ops.functional import mamba2_scan

        scanned: tuple[Tensor, Tensor] = mamba2_scan(
            x, dt, a, b, c, d, dt_bias=dt_bias, state_in=state, dt_min=limit[0], dt_max=limit[1]
        )
        return scanned
    dt = F.softplus(dt.float() + dt_bias).clamp(*limit)
    if x.shape[1] == 1:
        return step(x, dt, a, b, c, d, state=state)
    batch, length, heads, width = x.shape
    groups, size = b.shape[2:]
    y = torch.empty(batch, length, groups, heads // groups, width, dtype=torch.float32, device=x.device)
    x, dt = x.reshape(y.shape), dt.view(y.shape[:-1])
    a, d = a.view(groups, -1, 1), d.view(groups, -1, 1)
    state = state.view(batch, groups, -1, size)
    for start in range(0, length, CHUNK):
        part = slice(start, start + CHUNK)
        x_part, dt_part = x[:, part].float(), dt[:, part].movedim(1, -1)
        b_part, c_part = (t[:, part].transpose(1, 2).float().contiguous() for t in (b, c))
        decay = (dt_part.double() * a.double()).cumsum(-1)
        y_part, state = chunk(x_part, dt_part, decay, b_part, c_part, state)
        torch.addcmul(y_part, x_part, d, out=y[:, part])
    return y.view(batch, length, heads, width), state.view(batch, heads, width, size)


def chunk(x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of q positions by matrix products; h is the number of heads in a group.

    1. Within the chunk: y_t = sum over s <= t of (C_t . B_s) * exp(decay_t - decay_s) * dt_s * x_s.
    2. From the state before the chunk: y_t += exp(decay_t) * state @ C_t.
    3. The state after the chunk: exp(decay_q) * state
       + sum over s of exp(decay_q - decay_s) * dt_s * x_s (outer) B_s.

    No exponent is positive, whatever the decays are: for s > t it is set to -inf before exp.

    Args:
        x: [batch, q, groups, h, head_dim] float32.
        dt: [batch, groups, h, q] float32.
        decay: like ``dt``, float64, running sum of dt * A within the chunk.
        b, c: [batch, groups, q, state] float32.
        state: [batch, groups, h * head_dim, state] float32.
    Returns:
        y like ``x`` (without the skip D * x), and the new state.
    """
    batch, q, groups, h, width = x.shape
    future = torch.ones(q, q, dtype=torch.bool, device=x.device).triu_(1)
    mixing = (decay[..., :, None] - decay[..., None, :]).float().masked_fill_(future, -torch.inf).exp_()
    mixing.mul_((c @ b.mT)[:, :, None])  # [batch, groups, h, t, s]
    heads_first = torch.mul(
        x.permute(0, 2, 3, 1, 4), dt[..., None], out=x.new_empty(batch, groups, h, q, width)
    )
    within = (mixing @ heads_first).permute(0, 3, 1, 2, 4)
    before = (c @ state.mT).view(batch, groups, q, h, width).transpose(1, 2)
    y = torch.addcmul(within, before, decay.exp().float().movedim(-1, 1)[..., None])

    left = (dt * (decay[..., -1:] - decay).exp().float()).transpose(2, 3)[..., None]
    groups_first = torch.mul(x.transpose(1, 2), left, out=x.new_empty(batch, groups, q, h, width))
    added = groups_first.view(batch, groups, q, -1).mT @ b
    kept = decay[..., -1:].exp().float().expand(-1, -1, -1, width).reshape(batch, groups, -1, 1)
    return y, added.addcmul_(state, kept)


def step(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """``scan`` for one position, computed as the recurrence is written; ``dt`` [batch, 1, heads] is final."""
    batch, heads, width, size = state.shape
    groups = b.shape[2]
    x, dt = x[:, 0].float(), dt[:, 0]
    # [batch, groups, rows, state]
    written = (x * dt[..., None]).view(batch, groups, -1, 1) * b[:, 0].float()[:, :, None]
    state = torch.addcmul(written.view_as(state), state, torch.exp(dt * a)[..., None, None])
    y = (state.view(batch, groups, -1, size) @ c[:, 0].float()[..., None]).view(batch, heads, width)
    return torch.addcmul(y, x, d[:, None])[:, None], state


def forward(
    config: NemotronHConfig, weights: Weights, x: Tensor, state: MambaState | None, tap: Tap
) -> tuple[Tensor, MambaState]:
    """x [batch, length, hidden], already normalised -> (y of that shape, state after the last position)."""
    batch, length, _ = x.shape
    state = state or empty_state(config, batch, x)
    projected = linear("in_proj", x.flatten(0, 1), weights, tap).view(batch, length, -1)
    inner, bc = config.mamba_inner, config.n_groups * config.ssm_state_size
    z, xbc, dt = torch.split(projected, [inner, config.conv_channels, config.mamba_num_heads], -1)
    bias = weights["conv1d.bias"] if config.use_conv_bias else None
    xbc, conv = causal_conv(xbc, weights["conv1d.weight"], bias, state.conv)
    xs, b, c = torch.split(xbc, [inner, bc, bc], -1)
    a_log, d, dt_bias = (weights[name].to(x.device).float() for name in ("A_log", "D", "dt_bias"))
    y, ssm = scan(
        xs.view(batch, length, config.mamba_num_heads, -1),
        dt,
        -torch.exp(a_log),
        b.view(batch, length, config.n_groups, -1),
        c.view(batch, length, config.n_groups, -1),
        d,
        dt_bias=dt_bias,
        limit=config.time_step_limit,
        state=state.ssm,
    )
    y = gated_group_norm(y.flatten(2), z, weights["norm.weight"], config.n_groups, config.norm_eps)
    return linear("out_proj", y.flatten(0, 1), weights, tap).view_as(x), MambaState(conv, ssm)

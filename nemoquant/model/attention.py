"""Causal attention with grouped queries and no position embedding."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemoquant.model.config import NemotronHConfig
from nemoquant.model.names import KV_PROJECTIONS, OUTPUT
from nemoquant.model.taps import Tap, Weights, linear


@dataclass(frozen=True)
class KVState:
    """The state of an attention layer.

    Attributes:
        key, value: [batch, kv_heads, past, head_dim], as the taps returned them.
    """

    key: Tensor
    value: Tensor


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of the last ``length`` positions over all ``total`` ones, scaled by head_dim ** -0.5.

    Args:
        query: [batch, heads, length, head_dim].
        key, value: [batch, kv_heads, total, head_dim], total >= length; heads is a multiple of kv_heads.
    Returns:
        [batch, heads, length, head_dim].
    """
    length, total = query.shape[2], key.shape[2]
    mask = None
    if 1 < length < total:
        mask = torch.ones(length, total, dtype=torch.bool, device=query.device).tril_(total - length)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=length == total > 1, enable_gqa=True
    )


def forward(
    config: NemotronHConfig, weights: Weights, x: Tensor, state: KVState | None, tap: Tap
) -> tuple[Tensor, KVState]:
    """x [batch, length, hidden], already normalised -> (y of that shape, state after the last position)."""
    batch, length, _ = x.shape
    flat = x.flatten(0, 1)

    def heads(name: str) -> Tensor:
        return linear(name, flat, weights, tap).view(batch, length, -1, config.head_dim).transpose(1, 2)

    query = heads("q_proj")
    key, value = (tap(f"{name}{OUTPUT}", heads(name)) for name in KV_PROJECTIONS)
    if state is not None:
        key, value = torch.cat([state.key, key], 2), torch.cat([state.value, value], 2)
    y = attend(query, key, value).transpose(1, 2).reshape(batch * length, -1)
    return linear("o_proj", y, weights, tap).view_as(x), KVState(key, value)

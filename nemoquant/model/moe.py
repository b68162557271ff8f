"""The mixture-of-experts block: a sigmoid router, routed experts, and a shared expert.

The router scores in float32. ``e_score_correction_bias`` takes part in the choice of experts, but not in
their weights (DeepSeek-V3's loss-free balancing, section 2.1.2 of arXiv:2412.19437). With ``n_group`` > 1 a
token can choose only from the best ``topk_group`` groups of experts, ranked by the sum of their two best
scores. The result is

    fc2_latent_proj(sum over chosen e of w_e * down_e(relu(up_e(fc1_latent_proj(x)))^2)) + shared_experts(x)

without fc1 and fc2 where the config has no latent size.

If a kernel library has the operator (``ops/library.py``), there is no tap, and all weights are bf16, then the
routed experts are copied to the device as stacks, as many as ``SLAB_BYTES`` hold, and computed in one call.
The copy takes most of the time either way (by estimate: 5.6 GB per layer of Super take hundreds of
milliseconds, its products about ten). What the one call saves is thousands of small launches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemoquant.model import names
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.kinds.moe import ROUTER_BIAS, ROUTER_WEIGHT
from nemoquant.model.mlp import mlp
from nemoquant.model.taps import Scope, Tap, Weights, identity, linear, prefixed
from nemoquant.ops.library import serves

SLAB_BYTES = 1 << 30  # of experts' weights that are on the device at once, for the operator
OPERATOR_STEP = 32  # the operator needs weights whose dimensions are multiples of this


def route(config: NemotronHConfig, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """The experts of each token, and the factors of their outputs.

    Args:
        weights: holds ``gate.weight`` [experts, hidden] and ``gate.e_score_correction_bias`` [experts].
        x: [tokens, hidden].
    Returns:
        ids [tokens, k] int64, distinct in a row and in no particular order, and factors [tokens, k] float32.
    """
    scores = torch.sigmoid(x.float() @ weights[ROUTER_WEIGHT].to(x.device).float().mT)
    choice = scores + weights[ROUTER_BIAS].to(x.device).float()
    if config.n_group > 1:
        choice = close_groups(choice, config.n_group, config.topk_group)
    ids = torch.topk(choice, config.num_experts_per_tok, dim=-1, sorted=False).indices
    chosen = scores.gather(1, ids)
    if config.norm_topk_prob:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return ids, chosen * config.routed_scaling_factor


def close_groups(choice: Tensor, groups: int, open_groups: int) -> Tensor:
    """``choice`` [tokens, experts], with -inf outside each token's best ``open_groups`` groups of experts."""
    grouped = choice.view(choice.shape[0], groups, -1)
    value = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    best = value.topk(open_groups, dim=-1, sorted=False).indices
    closed = torch.ones_like(value, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(closed[..., None], -torch.inf).flatten(-2)


def routed_experts(weights: Weights, x: Tensor, ids: Tensor, factors: Tensor, tap: Tap) -> Tensor:
    """The weighted sum of each token's experts; an expert that no token chose is neither read nor tapped.

    Args:
        weights: holds ``experts.E.up_proj.weight`` [width, in] and ``experts.E.down_proj.weight`` [in,
            width].
        x: [tokens, in]. An expert's tap gets its tokens' rows in ascending order.
        ids: [tokens, k] int64.
        factors: [tokens, k] float32.
    Returns:
        [tokens, in] in the dtype of ``x``, summed in float32 in ascending order of experts (by the operator:
            in the order of each token's choices).
    """
    counts = torch.bincount(ids.flatten()).tolist()
    if tap is identity and serves("routed_experts", x.device.type):
        reached = [expert for expert, count in enumerate(counts) if count]
        if reached and _all_fit(weights, reached):
            return _by_operator(weights, reached, x, ids, factors)
    order = torch.argsort(ids.flatten(), stable=True)
    tokens = order // ids.shape[1]
    factor = factors.flatten()[order, None]
    total = torch.zeros_like(x, dtype=torch.float32)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows, prefix = tokens[start : start + count], names.expert(expert)
            y = mlp(Scope(weights, prefix), x[rows], prefixed(tap, prefix))
            total.index_add_(0, rows, y * factor[start : start + count])
            start += count
    return total.to(x.dtype)


def _names(expert: int) -> tuple[str, str]:
    return f"{names.expert(expert)}up_proj.weight", f"{names.expert(expert)}down_proj.weight"


def _all_fit(weights: Weights, experts: Sequence[int]) -> bool:
    """Whether the operator takes the weights of all these experts; looking them up reads no weight data."""
    tensors = (weights[name] for expert in experts for name in _names(expert))
    return all(
        isinstance(w, Tensor) and w.dtype == torch.bfloat16 and not any(n % OPERATOR_STEP for n in w.shape)
        for w in tensors
    )


def _by_operator(weights: Weights, experts: Sequence[int], x: Tensor, ids: Tensor, factors: Tensor) -> Tensor:
    """As :func:`routed_experts`, for ``experts`` in slabs; a slab's sum is rounded to the dtype of ``x``."""
    from nemoquant.ops.functional import routed_experts as operator

    shapes = [weights[name].shape for name in _names(experts[0])]
    size = max(1, SLAB_BYTES // sum(2 * shape.numel() for shape in shapes))
    stacks = [
        torch.empty(min(size, len(experts)), *shape, dtype=torch.bfloat16, device=x.device)
        for shape in shapes
    ]
    total = torch.zeros_like(x, dtype=torch.float32)
    for start in range(0, len(experts), size):
        slab = experts[start : start + size]
        for place, expert in enumerate(slab):
            for stack, name in zip(stacks, _names(expert), strict=True):
                stack[place].copy_(weights[name])
        # The place of each expert in this slab; -1 for those of another slab, which then add nothing.
        places = torch.full((experts[-1] + 1,), -1, dtype=torch.int64)
        places[list(slab)] = torch.arange(len(slab))
        up, down = (stack[: len(slab)] for stack in stacks)
        total += operator(x, places.to(x.device)[ids], factors, [up], [down], "bf16")
    return total.to(x.dtype)


def forward(
    config: NemotronHConfig,
    weights: Weights,
    x: Tensor,
    state: None,
    tap: Tap,
) -> tuple[Tensor, None]:
    """x [batch, length, hidden], already normalised -> (y of that shape, no state)."""
    flat = x.flatten(0, 1)
    ids, factors = route(config, weights, tap(names.ROUTER, flat))
    latent = linear("fc1_latent_proj", flat, weights, tap) if config.moe_latent_size else flat
    y = routed_experts(weights, latent, ids, factors, tap)
    if config.moe_latent_size:
        y = linear("fc2_latent_proj", y, weights, tap)
    if config.n_shared_experts:
        y = y + mlp(Scope(weights, "shared_experts."), flat, prefixed(tap, "shared_experts."))
    return y.view_as(x), None

"""The mixture-of-experts layer; ``model/moe.py`` computes it."""

from collections.abc import Iterator

from nemoquant.model.config import NemotronHConfig
from nemoquant.model.kinds.record import Kind, MixerTensor, stateless, weight
from nemoquant.model.names import ROUTER, member, stack

ROUTER_WEIGHT, ROUTER_BIAS = f"{ROUTER}.weight", f"{ROUTER}.e_score_correction_bias"
UP, DOWN = stack("up_proj"), stack("down_proj")


def tensors(c: NemotronHConfig) -> Iterator[MixerTensor]:
    hidden, latent, width = c.hidden_size, c.expert_input, c.moe_intermediate_size
    yield MixerTensor(ROUTER_WEIGHT, "router", (c.n_routed_experts, hidden))
    yield MixerTensor(ROUTER_BIAS, "router.bias", (c.n_routed_experts,), dtype="F32")
    if c.moe_latent_size:
        yield weight("fc1_latent_proj", "latent.fc1", latent, hidden)
        yield weight("fc2_latent_proj", "latent.fc2", hidden, latent)
    if c.n_shared_experts:
        shared = c.moe_shared_expert_intermediate_size  # of all shared experts together, as in transformers
        yield weight("shared_experts.up_proj", "shared_experts.up_proj", shared, hidden)
        yield weight("shared_experts.down_proj", "shared_experts.down_proj", hidden, shared)
    for e in range(c.n_routed_experts):
        yield weight(member(UP, e), "experts.up_proj", width, latent, expert=e)
    for e in range(c.n_routed_experts):
        yield weight(member(DOWN, e), "experts.down_proj", latent, width, expert=e)


def projections(c: NemotronHConfig) -> tuple[str, ...]:
    latent = ("fc1_latent_proj", "fc2_latent_proj") if c.moe_latent_size else ()
    shared = ("shared_experts.up_proj", "shared_experts.down_proj") if c.n_shared_experts else ()
    return (UP, DOWN, *shared, *latent)


def batch_bytes(c: NemotronHConfig, item: int) -> tuple[int, int]:
    """A token; nothing a row.

    They are the router in float32, the choice, the sum over experts in float32, and the larger of one expert
    with every token and the shared expert.
    """
    latent = c.expert_input
    router = 4 * c.hidden_size + 3 * 4 * c.n_routed_experts + 40 * c.num_experts_per_tok
    expert = item * (2 * latent + c.moe_intermediate_size) + 4 * latent
    shared = item * c.moe_shared_expert_intermediate_size
    return router + latent * (2 * item + 4) + max(expert, shared + item * c.hidden_size), 0


MOE = Kind(
    letter="E",
    title="mixture of experts",
    spellings=(),
    sizes=(
        "n_routed_experts",
        "num_experts_per_tok",
        "n_shared_experts",
        "moe_latent_size",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "routed_scaling_factor",
        "norm_topk_prob",
        "n_group",
        "topk_group",
    ),
    linear={
        "experts.up_proj": "routed experts' up projection",
        "experts.down_proj": "routed experts' down projection",
        "shared_experts.up_proj": "shared experts' up projection",
        "shared_experts.down_proj": "shared experts' down projection",
        "latent.fc1": "the latent fc1",
        "latent.fc2": "the latent fc2",
    },
    groups={"experts": "routed experts", "shared_experts": "shared experts", "latent": "latent projections"},
    order=(
        ("latent.fc1",),
        ("experts.up_proj", "shared_experts.up_proj"),
        ("experts.down_proj",),
        ("latent.fc2",),
        ("shared_experts.down_proj",),
    ),
    other=("router", "router.bias"),
    tensors=tensors,
    projections=projections,
    states=stateless,
    batch_bytes=batch_bytes,
    live_values=lambda c: 2 * c.moe_shared_expert_intermediate_size + 4 * c.expert_input,
)

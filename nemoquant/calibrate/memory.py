"""Memory that a batch of rows takes in a layer, and the number of rows that may go through at once.

The figures count the tensors that the reference model holds at its peak, in bytes a token; tests compare
them with measured peaks. Mapped weights are not counted here: see ``weight_bytes``.
"""

from nemoquant.calibrate.batch import Batch
from nemoquant.checkpoint.weights import HELD_BYTES
from nemoquant.model.config import LayerKind, NemotronHConfig
from nemoquant.model.mamba2 import CHUNK
from nemoquant.model.taps import CAST_ELEMENTS

MOST_TOKENS = 1 << 15  # with more, products are no faster, and the page cache needs the memory


def batch_bytes(config: NemotronHConfig, kind: LayerKind, batch: Batch) -> int:
    """Peak bytes of a batch in a layer of ``kind``."""
    item = batch.item_size
    token, row = {"mamba": _mamba, "attention": _attention, "moe": _moe, "mlp": _mlp}[kind](config, item)
    # x, its norm, the block's output, their sum; one byte for the mask of finite values
    stream = config.hidden_size * (4 * item + 1)
    return batch.tokens * (token + stream) + batch.rows * row


def _mamba(c: NemotronHConfig, item: int) -> tuple[int, int]:
    """Bytes a token (projection, convolution, scan's result, gated norm); a row (a chunk of the scan)."""
    inner, heads = c.mamba_inner, c.mamba_num_heads
    projected = inner + c.conv_channels + heads
    token = projected * item + c.conv_channels * (item + 4) + inner * (4 + item) + heads * 8
    chunk = heads * CHUNK * CHUNK * 16 + 6 * CHUNK * inner * 4 + 3 * inner * c.ssm_state_size * 4
    return token, chunk


def _attention(c: NemotronHConfig, item: int) -> tuple[int, int]:
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return item * (4 * queries + 4 * keys), 0


def _mlp(c: NemotronHConfig, item: int) -> tuple[int, int]:
    return item * c.intermediate_size, 0


def _moe(c: NemotronHConfig, item: int) -> tuple[int, int]:
    """Bytes a token; none a row.

    They are the router in float32, the choice, the sum over experts in float32, and the larger of one expert
    with every token and the shared expert.
    """
    latent = c.moe_latent_size or c.hidden_size
    router = 4 * c.hidden_size + 3 * 4 * c.n_routed_experts + 40 * c.num_experts_per_tok
    expert = item * (2 * latent + c.moe_intermediate_size) + 4 * latent
    shared = item * (c.moe_shared_expert_intermediate_size if c.n_shared_experts else 0)
    return router + latent * (2 * item + 4) + max(expert, shared + item * c.hidden_size), 0


def weight_bytes(config: NemotronHConfig, item: int) -> int:
    """Bytes of weights that may be resident at once.

    These are mapped weights held between two releases, the largest matrix of a layer, and, where the compute
    dtype differs from the file's, the part that is converted at a time.
    """
    c = config
    sizes = [0]
    if c.count("mamba"):
        sizes.append((c.mamba_inner + c.conv_channels + c.mamba_num_heads) * c.hidden_size)
    if c.count("attention"):
        sizes.append(c.num_attention_heads * c.head_dim * c.hidden_size)
    if c.count("moe"):
        sizes.append(max(c.moe_shared_expert_intermediate_size, c.moe_latent_size or 0) * c.hidden_size)
        sizes.append(c.moe_intermediate_size * (c.moe_latent_size or c.hidden_size))
    if c.count("mlp"):
        sizes.append(c.intermediate_size * c.hidden_size)
    return HELD_BYTES + 2 * max(sizes) + (item * min(CAST_ELEMENTS, max(sizes)) if item != 2 else 0)


def pick_row_batch(config: NemotronHConfig, batch: Batch, limit: int) -> dict[str, int]:
    """Rows of ``batch`` at once for each kind of layer, at least 1; they take at most ``limit`` bytes."""
    most = max(1, min(batch.rows, MOST_TOKENS // batch.length))
    return {
        kind: max(1, min(most, limit // batch_bytes(config, kind, batch.of(1))))
        for kind in sorted(set(config.layers))
    }

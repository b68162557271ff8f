"""The reference model: what a Nemotron-H checkpoint computes, one layer's weights at a time.

``layer_forward`` is the unit for streaming: calibration keeps the rows' hidden states itself and runs them
through one layer after the other. ``ReferenceModel`` does the same for one batch of tokens. Compute is in one
dtype, float32 or bfloat16, on one device; norms, the router, and all of a Mamba-2 mixer between its
projections are always float32. Weights may have another dtype or be on another device: each is converted when
it is used, and the converted copy is dropped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, NoneType

import torch
import torch.nn.functional as F
from torch import Tensor

from nemoquant.model import attention, mamba2, mlp, moe, mtp, names
from nemoquant.model.attention import KVState
from nemoquant.model.config import LayerKind, NemotronHConfig
from nemoquant.model.mamba2 import MambaState
from nemoquant.model.norm import rms_norm
from nemoquant.model.taps import Scope, Tap, Weights, identity, linear, prefixed

LayerState = MambaState | KVState | None
WeightSource = Callable[[str], Weights]


@dataclass(frozen=True)
class State:
    """What generation keeps between calls: one entry for each layer, None for layers without a state."""

    layers: tuple[LayerState, ...]


@dataclass(frozen=True)
class Block:
    """What computes a kind of layer.

    Attributes:
        forward: (config, weights, normalised x, state, tap) -> (y, state); names are relative to the mixer.
        state: type of what it keeps between calls; its fields are the kind's ``states`` in their order.
    """

    forward: Callable[..., tuple[Tensor, LayerState]]
    state: type


BLOCKS: Mapping[LayerKind, Block] = MappingProxyType(
    {
        "mamba": Block(mamba2.forward, MambaState),
        "moe": Block(moe.forward, NoneType),
        "attention": Block(attention.forward, KVState),
        "mlp": Block(mlp.forward, NoneType),
    }
)


@torch.no_grad()
def layer_forward(
    config: NemotronHConfig,
    kind: LayerKind,
    weights: Weights,
    x: Tensor,
    state: LayerState = None,
    tap: Tap = identity,
) -> tuple[Tensor, LayerState]:
    """One layer: ``x + mixer(norm(x))``.

    Args:
        config: of this layer, where layers differ in size.
        weights: by names relative to the layer, as published: ``norm.weight``, ``mixer.in_proj.weight``,
            ``mixer.experts.3.up_proj.weight``. Read one at a time, and an expert's only if a token was routed
            to it.
        x: [batch, length, hidden] in the compute dtype, float32 or bfloat16. Not changed.
        state: of this layer, from the call on the positions before; None at the start of a sequence.
        tap: called with names relative to the layer, such as ``mixer.in_proj``.
    Returns:
        [batch, length, hidden] in the dtype of ``x``, and the layer's state; both are new tensors.
    """
    block, mixer = BLOCKS[kind], names.MIXER
    assert state is None or isinstance(state, block.state)
    normed = rms_norm(x, weights["norm.weight"], config.norm_eps)
    y, state = block.forward(config, Scope(weights, mixer), normed, state, prefixed(tap, mixer))
    return x + y, state


class ReferenceModel:
    """The whole model over a source of weights.

    Args:
        weights: called with a prefix (``backbone.embeddings.``, ``backbone.layers.3.``, ``backbone.norm_f.``,
            ``lm_head.``, ``mtp.layers.0.``), returns the tensors under it by their names relative to it.
            Called again in each forward; its result is dropped before the next call.
        dtype: the compute dtype, float32 or bfloat16.
        device: where the compute happens, wherever the weights are.
    """

    def __init__(
        self,
        config: NemotronHConfig,
        weights: WeightSource,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.weights, self.dtype, self.device = config, weights, dtype, torch.device(device)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [batch, length] int64 -> [batch, length, hidden]."""
        table = self.weights(f"{names.EMBEDDINGS}.")["weight"]
        return F.embedding(tokens.to(table.device), table).to(self.device, self.dtype)

    def hidden(
        self, tokens: Tensor, state: State | None = None, tap: Tap | None = None
    ) -> tuple[Tensor, State]:
        """The main model's output after norm_f, which is the input of lm_head and MTP.

        Arguments and state as in ``forward``.

        Returns:
            [batch, length, hidden] in the compute dtype, and the state after the last token.
        """
        layers = [
            (self.config.of_layer(i), kind, names.layer(i)) for i, kind in enumerate(self.config.layers)
        ]
        x, state = self._layers(layers, self.embed(tokens), state, tap)
        return rms_norm(x, self.weights(f"{names.FINAL_NORM}.")["weight"], self.config.norm_eps), state

    @torch.no_grad()
    def logits(self, hidden: Tensor, tap: Tap | None = None) -> Tensor:
        """hidden [batch, length, hidden] after norm_f -> logits [batch, length, vocabulary], same dtype.

        Taps ``lm_head``.
        """
        stored = self.weights(f"{names.head(self.config.tie_word_embeddings)}.")
        weights = {f"{names.HEAD}.weight": stored["weight"]}
        return linear(names.HEAD, hidden.flatten(0, 1), weights, tap or identity).view(*hidden.shape[:2], -1)

    def forward(
        self, tokens: Tensor, state: State | None = None, tap: Tap | None = None, last_only: bool = False
    ) -> tuple[Tensor, State]:
        """Logits of the next token.

        Args:
            tokens: [batch, length] int64, length >= 1.
            state: from the call on the tokens before these.
            tap: called with full module names.
            last_only: only the last position's logits.
        Returns:
            [batch, length or 1, vocabulary] in the compute dtype, and the state after the last token.
        """
        hidden, state = self.hidden(tokens, state, tap)
        return self.logits(hidden[:, -1:] if last_only else hidden, tap), state

    def mtp_forward(
        self,
        tokens: Tensor,
        hidden: Tensor,
        state: State | None = None,
        tap: Tap | None = None,
        module: int = 0,
    ) -> tuple[Tensor, Tensor, State]:
        """One MTP module.

        Args:
            tokens: [batch, length] int64, the token *after* each position of ``hidden``.
            hidden: [batch, length, hidden] from ``hidden()``; for a further step or module, the hidden
                states that this method returned.
            state: of this module, from its call on the positions before.
        Returns:
            logits of the token after ``tokens`` [batch, length, vocabulary], the hidden states
            [batch, length, hidden] that they were computed from, and the module's state.
        """
        prefixes = mtp.layer_prefixes(self.config, module)
        first, last = prefixes[0], prefixes[-1]
        x = mtp.mtp_input(self.config, self.weights(first), self.embed(tokens), hidden, prefixed(tap, first))
        layers = [
            (self.config.of_mtp_layer(j), kind, prefix)
            for j, (kind, prefix) in enumerate(zip(self.config.mtp_layers, prefixes, strict=True))
        ]
        x, state = self._layers(layers, x, state, tap)
        hidden = mtp.mtp_output(self.config, self.weights(last), x)
        return self.logits(hidden, tap), hidden, state

    def _layers(
        self,
        layers: Sequence[tuple[NemotronHConfig, LayerKind, str]],
        x: Tensor,
        state: State | None,
        tap: Tap | None,
    ) -> tuple[Tensor, State]:
        before = state.layers if state else (None,) * len(layers)
        after: list[LayerState] = []
        for (config, kind, prefix), old in zip(layers, before, strict=True):
            x, new = layer_forward(config, kind, self.weights(prefix), x, old, prefixed(tap, prefix))
            after.append(new)
        return x, State(tuple(after))

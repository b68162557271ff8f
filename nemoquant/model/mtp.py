"""Multi-token prediction: predicts token t+2 from the main model's hidden state at t and token t+1.

    x = eh_proj(concat(enorm(embedding of token t+1), hnorm(hidden_t)))
        where hidden is the main model's output after norm_f
    x = the module's layers, with residuals that start at this x
    hidden' = final_layernorm(x), and the logits are the main model's lm_head of hidden'

This is as in vLLM, SGLang and TensorRT-LLM; all three norms are RMS norms. The layers of module m are
``mtp.layers.{i}.`` with i from m * len(pattern); enorm, hnorm and eh_proj are stored under its first layer,
final_layernorm under its last. The layers themselves are those of the main model: run them by
``reference.layer_forward``.
"""

import torch
from torch import Tensor

from nemoquant.model import names
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.norm import rms_norm
from nemoquant.model.taps import Tap, Weights, identity, linear


def layer_prefixes(config: NemotronHConfig, module: int) -> list[str]:
    """The prefixes of the layers of MTP module ``module``, in the order of ``config.mtp_layers``."""
    count = len(config.mtp_layers)
    return [names.mtp_layer(module * count + j) for j in range(count)]


@torch.no_grad()
def mtp_input(
    config: NemotronHConfig, weights: Weights, embedded: Tensor, hidden: Tensor, tap: Tap = identity
) -> Tensor:
    """The input of the module's first layer.

    Args:
        weights: of the module's first layer, by names relative to it.
        embedded: [batch, length, hidden], the embeddings of the tokens at t+1.
        hidden: [batch, length, hidden], the main model's output after norm_f at t.
        tap: called with ``eh_proj``.
    Returns:
        [batch, length, hidden].
    """
    parts = [
        rms_norm(embedded, weights["enorm.weight"], config.norm_eps),
        rms_norm(hidden, weights["hnorm.weight"], config.norm_eps),
    ]
    return linear("eh_proj", torch.cat(parts, -1).flatten(0, 1), weights, tap).view_as(hidden)


@torch.no_grad()
def mtp_output(config: NemotronHConfig, weights: Weights, x: Tensor) -> Tensor:
    """``final_layernorm`` of ``x`` [batch, length, hidden], which is the input of lm_head.

    ``weights`` are those of the module's last layer, which has this norm.
    """
    return rms_norm(x, weights["final_layernorm.weight"], config.norm_eps)

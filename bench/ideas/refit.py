"""Modules that stay bf16, refitted to the stream of the quantized layers before them, layer by layer.

A router, fc1 or the head gets the least-squares change that gives its output of the source's input from the
quantized one's; fc2 the one that gives the source's stream after its layer. Biases, norms and the rest stay.
"""

from collections.abc import Collection, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ideas.forward import Forward, Weights, product, rms
from nemoquant.formats import FormatName
from nemoquant.model import names
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.names import OUTPUT
from nemoquant.quantized.packed import fake_quantize

KINDS = {"gate": "router", "fc1_latent_proj": "fc1", "fc2_latent_proj": "fc2"}


def moved(weight: Tensor, lacking: Tensor, x: Tensor, ridge: float) -> Tensor:
    """A weight [out, in] with the change that adds about ``lacking`` [tokens, out] to its outputs."""
    x = x.double()
    h = x.T @ x
    h += ridge * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    change = torch.linalg.solve(h, x.T @ lacking.double()).T
    return (weight.double() + change).to(torch.bfloat16).float()


@torch.no_grad()
def refitted(
    config: NemotronHConfig,
    source: Weights,
    quantized: Weights,
    inputs: Mapping[str, tuple[FormatName, np.float32]],
    rows: Tensor,
    kinds: Collection[str],
    ridge: float,
) -> Weights:
    """``quantized`` with modules of some kinds refitted: router, fc1, fc2, head. All rows go at once."""
    weights = dict(quantized)
    x = xq = F.embedding(rows, source[f"{names.EMBEDDINGS}.weight"])
    exact, rounded = Forward(config, source), Forward(config, weights)
    for i in range(len(config.layers)):
        seen: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor, weight: Tensor, seen: dict[str, Tensor] = seen) -> Tensor:
            seen[name] = x
            return product(name, x, weight)

        def fit(name: str, x: Tensor, weight: Tensor, seen: dict[str, Tensor] = seen) -> Tensor:
            if name in inputs:
                x = fake_quantize(x, *inputs[name])[0]
            kind = KINDS.get(name.rpartition(".")[2])
            if kind == "fc2":
                seen[name] = x
            elif kind in kinds:
                lacking = F.linear(seen[name] - x, weight)
                weight = weights[f"{name}.weight"] = moved(weight, lacking, x, ridge)
            y = product(name, x, weight)
            rule = inputs.get(f"{name}{OUTPUT}")
            return y if rule is None else fake_quantize(y, *rule)[0]

        x, xq = exact.layer(i, x, keep), rounded.layer(i, xq, fit)
        fc2 = f"{names.layer(i)}{names.MIXER}fc2_latent_proj"
        if "fc2" in kinds and fc2 in seen:
            old = weights[f"{fc2}.weight"]
            new = weights[f"{fc2}.weight"] = moved(old, (x - xq).flatten(0, 1), seen[fc2], ridge)
            xq = xq + F.linear(seen[fc2], new - old).view(xq.shape)
    if "head" in kinds:
        norm, name = source[f"{names.FINAL_NORM}.weight"], f"{names.HEAD}.weight"
        x, xq = (rms(s, norm, config.norm_eps).flatten(0, 1) for s in (x, xq))
        weights[name] = moved(weights[name], F.linear(x - xq, weights[name]), xq, ridge)
    return weights

"""Gradients of a model's loss with respect to what its modules compute, for the output side of the error.

The loss is the log-likelihood of labels that are drawn from the model's own distribution: the expected outer
product of its gradient is the Fisher matrix, which is the Hessian of the KL where it is zero.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bench.ideas.forward import Forward, Weights
from nemoquant.model import names
from nemoquant.model.config import NemotronHConfig

BATCH = 4
Gradients = dict[str, NDArray[np.float32]]
"""By module, [tokens, out]; an expert's tokens in ascending order."""


def gradients(
    config: NemotronHConfig, weights: Weights, rows: Tensor, modules: Collection[str], source: str, seed: int
) -> Gradients:
    """Of some modules, over rows [rows, length].

    Args:
        source: where they come from. ``loss``: through all layers behind a module. ``choice:WIDTH``: the
            same, with a gradient of the choice of experts, a sigmoid of that width. ``local``: the loss's
            gradient with respect to the last layer's stream, put at the end of each layer, so that no other
            layer is behind a module. ``random``: normal numbers there.
    """
    width = float(source.partition(":")[2] or 0)
    one_layer = source in ("local", "random")
    model = Forward(config, weights, width)
    random = torch.Generator().manual_seed(seed)
    found: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
    last = len(config.layers) - 1
    for batch in rows.split(BATCH):
        outputs: dict[str, Tensor] = {}
        streams: dict[int, Tensor] = {}

        def product(name: str, x: Tensor, weight: Tensor, outputs: dict[str, Tensor] = outputs) -> Tensor:
            y = F.linear(x, weight)
            if name in modules:
                outputs[name] = y = y if y.requires_grad else y.requires_grad_()
            return y

        def stream(i: int, x: Tensor, streams: dict[int, Tensor] = streams) -> Tensor:
            streams[i] = x
            return x.detach().requires_grad_() if one_layer and i < last else x

        logits = model.logits(batch, product, stream).flatten(0, 1)
        labels = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=random)[:, 0]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        if one_layer:
            (top,) = torch.autograd.grad(loss, [streams[last]], retain_graph=True)
            if source == "random":
                top = torch.randn(top.shape, generator=random)
            for i, end in streams.items():
                mine = {name: y for name, y in outputs.items() if name.startswith(names.layer(i))}
                if mine:
                    _add(found, mine, torch.autograd.grad(end, list(mine.values()), top))
        else:
            _add(found, outputs, torch.autograd.grad(loss, list(outputs.values())))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _add(
    found: dict[str, list[NDArray[np.float32]]], outputs: Iterable[str], parts: Iterable[Tensor]
) -> None:
    for name, part in zip(outputs, parts, strict=True):
        found[name].append(part.numpy())

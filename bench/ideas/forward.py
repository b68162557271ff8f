"""A forward pass that autograd can go through, for gradients with respect to what modules compute.

The reference model computes without gradients and in place. This one is written out for small models: float32
throughout, no state, no groups of experts.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nemoquant.model import names
from nemoquant.model.config import NemotronHConfig

CHUNK = 64
Weights = Mapping[str, Tensor]
Product = Callable[[str, Tensor, Tensor], Tensor]
"""Called with a module's name, its input [tokens, in] and its weight; returns [tokens, out]."""
Stream = Callable[[int, Tensor], Tensor]
"""Called with a layer's number and the stream after it; returns what goes on."""


def product(name: str, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG001
    """The plain one."""
    return F.linear(x, weight)


def through(i: int, x: Tensor) -> Tensor:  # noqa: ARG001
    """The stream as it is."""
    return x


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class Forward:
    """A model.

    Attributes:
        width: of the sigmoid by which the choice of experts gets a gradient, in units of their scores; 0:
            it has none.
    """

    def __init__(self, config: NemotronHConfig, weights: Weights, width: float = 0.0) -> None:
        self.config, self.weights, self.width = config, weights, width
        self._mixers = {"mamba": self._mamba, "attention": self._attention, "moe": self._moe}

    def logits(self, tokens: Tensor, product: Product, stream: Stream) -> Tensor:
        """[batch, length] -> [batch, length, vocabulary]."""
        x = F.embedding(tokens, self.weights[f"{names.EMBEDDINGS}.weight"])
        for i in range(len(self.config.layers)):
            x = stream(i, self.layer(i, x, product))
        x = rms(x, self.weights[f"{names.FINAL_NORM}.weight"], self.config.norm_eps)
        return F.linear(x, self.weights[f"{names.HEAD}.weight"])

    def layer(self, i: int, x: Tensor, product: Product) -> Tensor:
        """The stream [batch, length, hidden] after a layer."""
        k = names.layer(i)
        u = rms(x, self.weights[f"{k}norm.weight"], self.config.norm_eps)
        return x + self._mixers[self.config.layers[i]](k + names.MIXER, u, product)

    def _mamba(self, k: str, u: Tensor, product: Product) -> Tensor:
        c, w = self.config, self.weights
        batch, length, _ = u.shape
        groups, size, inner = c.n_groups, c.ssm_state_size, c.mamba_inner
        heads = c.mamba_num_heads // groups
        projected = product(f"{k}in_proj", u.flatten(0, 1), w[f"{k}in_proj.weight"]).view(batch, length, -1)
        z, xbc, dt = projected.split([inner, c.conv_channels, c.mamba_num_heads], -1)
        kernel = w[f"{k}conv1d.weight"]
        padding = kernel.shape[-1] - 1
        xbc = F.conv1d(xbc.mT, kernel, w[f"{k}conv1d.bias"], padding=padding, groups=kernel.shape[0])
        x, b, cs = F.silu(xbc[..., :length].mT).split([inner, groups * size, groups * size], -1)
        dt = F.softplus(dt + w[f"{k}dt_bias"]).clamp(*c.time_step_limit).view(batch, length, groups, heads)
        x = x.reshape(batch, length, groups, heads, -1)
        b, cs = (t.reshape(batch, length, groups, size) for t in (b, cs))
        decays = dt * -torch.exp(w[f"{k}A_log"]).view(groups, heads)
        state = x.new_zeros(batch, groups, heads, x.shape[-1], size)
        parts = []
        for start in range(0, length, CHUNK):
            part = slice(start, start + CHUNK)
            decay, bs, reads, written = decays[:, part].cumsum(1), b[:, part], cs[:, part], x[:, part]
            written = written * dt[:, part, ..., None]
            n = decay.shape[1]
            future = torch.ones(n, n, dtype=torch.bool).triu_(1)[..., None, None]
            mixing = (decay[:, :, None] - decay[:, None]).masked_fill(future, -torch.inf).exp()
            mixing = mixing * torch.einsum("btgn,bsgn->btsg", reads, bs)[..., None]
            before = torch.einsum("btgn,bghpn->btghp", reads, state) * decay.exp()[..., None]
            parts.append(torch.einsum("btsgh,bsghp->btghp", mixing, written) + before)
            left = (decay[:, -1:] - decay).exp()[..., None] * written
            kept = state * decay[:, -1].exp()[..., None, None]
            state = kept + torch.einsum("bsghp,bsgn->bghpn", left, bs)
        y = torch.cat(parts, 1) + x * w[f"{k}D"].view(groups, heads, 1)
        y = (y.reshape(batch, length, inner) * F.silu(z)).view(batch, length, groups, -1)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + c.norm_eps)
        y = y.reshape(batch * length, inner) * w[f"{k}norm.weight"]
        return product(f"{k}out_proj", y, w[f"{k}out_proj.weight"]).view(u.shape)

    def _attention(self, k: str, u: Tensor, product: Product) -> Tensor:
        flat = u.flatten(0, 1)
        query, key, value = (
            product(f"{k}{name}", flat, self.weights[f"{k}{name}.weight"])
            .view(*u.shape[:2], -1, self.config.head_dim)
            .transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        y = y.transpose(1, 2).reshape(len(flat), -1)
        return product(f"{k}o_proj", y, self.weights[f"{k}o_proj.weight"]).view(u.shape)

    def _moe(self, k: str, u: Tensor, product: Product) -> Tensor:
        c, w = self.config, self.weights
        flat = u.flatten(0, 1)

        def module(name: str, x: Tensor) -> Tensor:
            return product(f"{k}{name}", x, w[f"{k}{name}.weight"])

        scores = torch.sigmoid(module(names.ROUTER, flat))
        choice = scores + w[f"{k}gate.e_score_correction_bias"]
        best = torch.topk(choice.detach(), c.num_experts_per_tok + 1, -1).indices
        x = module("fc1_latent_proj", flat) if c.moe_latent_size else flat
        total = self._experts(k, x, scores, best[:, :-1], product)
        if self.width:
            last, next_ = choice.gather(1, best[:, -2:]).split(1, -1)
            with torch.no_grad():
                other = torch.cat([best[:, :-2], best[:, -1:]], 1)
                lost = total - self._experts(k, x, scores, other, lambda _, x, weight: F.linear(x, weight))
            place = torch.sigmoid((last - next_) / self.width)
            total = total + (place - place.detach()) * lost
        if c.moe_latent_size:
            total = module("fc2_latent_proj", total)
        h = module("shared_experts.up_proj", flat).relu().square()
        return (total + module("shared_experts.down_proj", h)).view(u.shape)

    def _experts(self, k: str, x: Tensor, scores: Tensor, ids: Tensor, product: Product) -> Tensor:
        c = self.config
        chosen = scores.gather(1, ids)
        if c.norm_topk_prob:
            chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
        factors = chosen * c.routed_scaling_factor
        total = torch.zeros_like(x)
        for expert in range(c.n_routed_experts):
            rows, slot = (ids == expert).nonzero(as_tuple=True)
            if len(rows):
                p = f"{k}{names.expert(expert)}"
                h = product(f"{p}up_proj", x[rows], self.weights[f"{p}up_proj.weight"]).relu().square()
                y = product(f"{p}down_proj", h, self.weights[f"{p}down_proj.weight"])
                total = total.index_add(0, rows, y * factors[rows, slot, None])
        return total

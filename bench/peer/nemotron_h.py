"""What the rivals' scripts share: transformers' model of a folder, and the job that they are given.

A job is a JSON file: ``source``, ``out``, ``rows`` (a .npy file [rows, length]), ``method`` and ``map``,
from the name of a quantized module to the formats of its weights and inputs (null: as the source).

Two things of the loaded model are ours, for every tool alike. transformers' scan on a CPU is wrong for rows
longer than a chunk (its issue 47246), and has a lower limit for dt that this family has not: it is replaced
by the definition. And a tool that takes linear layers only gets the experts as linear layers, with the
names that they have in published files: transformers 5 keeps them as two tensors of three dimensions.
"""

import json
import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts, NemotronHMamba2Mixer

SOURCE = ("weight", "bias", "A_log", "D", "dt_bias", "up_proj", "down_proj")  # ends of parameters' names
BESIDE = ("_pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")  # what a tool keeps in the model's dtype


@dataclass(frozen=True)
class Job:
    """See above; ``map`` has names as transformers has them."""

    source: str
    out: str
    rows: Tensor
    method: str
    map: dict[str, tuple[str, str | None]]


def read_job(path: str) -> Job:
    data = json.loads(Path(path).read_text())
    named = {"model." + name.removeprefix("backbone."): tuple(f) for name, f in data["map"].items()}
    rows = torch.from_numpy(np.load(data["rows"])).long()
    return Job(data["source"], data["out"], rows, data["method"], named)


def scan(self: Any, states: Tensor, *_: object, **__: object) -> Tensor:
    """Mamba-2 of a row from its start, as a masked product of all pairs of tokens: exact, for short rows."""
    batch, length, _ = states.shape
    groups = self.n_groups * self.ssm_state_size
    gate, mixed, dt = self.in_proj(states).split([self.intermediate_size, self.conv_dim, self.num_heads], -1)
    mixed = self.act(self.conv1d(mixed.transpose(1, 2))[..., :length].transpose(1, 2))
    x, b, c = mixed.float().split([self.intermediate_size, groups, groups], -1)
    dt = nn.functional.softplus(dt.float() + self.dt_bias.float()).transpose(1, 2)  # [batch, heads, length]
    decay = (dt * -self.A_log.float().exp()[:, None]).cumsum(-1)
    x = x.reshape(batch, length, self.num_heads, -1).transpose(1, 2)
    b, c = (part.reshape(batch, length, self.n_groups, -1).transpose(1, 2) for part in (b, c))
    pairs = (c @ b.transpose(-1, -2)).repeat_interleave(self.num_heads // self.n_groups, 1)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    pairs = pairs * (decay[..., None] - decay[..., None, :]).masked_fill(later, -torch.inf).exp()
    y = pairs @ (x * dt[..., None]) + x * self.D.float()[:, None, None]
    y = self.norm(y.transpose(1, 2).reshape(batch, length, -1), gate)
    return self.out_proj(y.to(states.dtype))


class Expert(nn.Module):
    def __init__(self, up: Tensor, down: Tensor, act: nn.Module) -> None:
        super().__init__()
        for name, weight in (("up_proj", up), ("down_proj", down)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            self.add_module(name, linear)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))


class SeparateExperts(nn.ModuleList):
    """The experts of a layer as linear layers."""

    def __init__(self, fused: NemotronHExperts) -> None:
        pairs = zip(fused.up_proj, fused.down_proj, strict=True)
        super().__init__(Expert(up, down, fused.act_fn) for up, down in pairs)
        self.num_experts = len(self)

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        total = torch.zeros_like(x, dtype=gates.dtype)
        for number, expert in enumerate(self):
            token, place = torch.where(chosen == number)
            if len(token):
                total = total.index_add(
                    0, token, (expert(x[token]) * gates[token, place, None]).to(total.dtype)
                )
        return total.to(x.dtype)


def load(folder: str, separate: bool) -> Any:
    """The model in float32, in which ours calibrates too; ``separate`` makes linear layers of experts."""
    NemotronHMamba2Mixer.forward = scan
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", use_mamba_kernels=False
    )
    if separate:
        for module in list(model.modules()):
            if isinstance(getattr(module, "experts", None), NemotronHExperts):
                module.experts = SeparateExperts(module.experts)
    return model.eval()


def narrow(model: nn.Module) -> None:
    """The source's parameters to bfloat16, as it has them, for export; scales of formats stay as they are."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name.rpartition(".")[2] in SOURCE + BESIDE:
            tensor.data = tensor.data.to(torch.bfloat16)

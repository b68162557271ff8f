"""Times of the routed experts in every format, by each kind of products; beside them torch's grouped ones.

Tokens choose their experts evenly at random. The floor is the larger of the chosen experts' weights, x and y
moved once at the rate of a copy, and the operations at the rate of a bf16 product. ``narrow_floor_us`` of
wide tables takes the rate of the narrowest type that multiplies the format's codes on the device: fp8 from
SM89 on, FP4 from SM100 on. These kernels do not reach every such rate: on SM90 mma.sync multiplies E4M3 no
faster than bfloat16.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bench.gpu.timing import Table, narrow_rate, timed
from nemoquant.ops.functional import EXPERT_FORMATS, routed_experts

MODELS = {"Super": (512, 22, 1024, 2688), "Nano": (128, 6, 2688, 1856)}  # experts, k, input, width
FORMATS = ("nvfp4", "fp8", "bf16", "w4a16")
TOKENS = (1, 16, 256, 4096)
WIDE_TOKENS = (1, 8, 16, 64, 256, 4096)
PRODUCTS = ("grouped",)  # beside those that the operator takes by itself
WIDE_PRODUCTS = ("decoded", "grouped", "native")
FEW = 64  # tokens; below it calls take turns with other experts, so that the cache does not hold them


def projection(format: str, experts: int, out: int, into: int) -> list[Tensor]:
    """[experts, out, into] of random codes, small enough that nothing overflows."""
    made = []
    for name in EXPERT_FORMATS[format][1]:
        if name == "weight":
            made.append(torch.randn(experts, out, into, device="cuda", dtype=torch.bfloat16) / into**0.5)
        elif name in ("codes", "block_scales"):
            columns = into // 16 if name == "block_scales" else into // 2 if "4" in format else into
            made.append(torch.randint(0, 0x50, (experts, out, columns), device="cuda", dtype=torch.uint8))
        else:
            made.append(torch.full((experts,), 0.01, device="cuda"))
    return made


@dataclass(frozen=True)
class Layer:
    """A model's experts in a format."""

    format: str
    experts: int
    chosen: int
    input: int
    width: int
    up: list[Tensor]
    down: list[Tensor]

    @classmethod
    def random(cls, model: str, format: str) -> "Layer":
        experts, chosen, size, width = MODELS[model]
        up, down = projection(format, experts, width, size), projection(format, experts, size, width)
        return cls(format, experts, chosen, size, width, up, down)

    def expert_bytes(self) -> int:
        return sum(part[0].numel() * part.element_size() for part in (*self.up, *self.down))

    def call(self, tokens: int) -> "Call":
        return Call(
            self,
            torch.randn(tokens, self.input, device="cuda").to(torch.bfloat16),
            torch.rand(tokens, self.experts, device="cuda").topk(self.chosen).indices,
            torch.rand(tokens, self.chosen, device="cuda"),
        )


@dataclass(frozen=True)
class Call:
    """Tokens and their experts, and the calls: ours, torch's."""

    layer: Layer
    x: Tensor
    ids: Tensor
    weights: Tensor

    def moved(self) -> int:
        """Bytes: the weights of the experts that were chosen, x and y."""
        return len(self.ids.unique()) * self.layer.expert_bytes() + 4 * self.x.numel()

    def operations(self) -> float:
        return 4.0 * self.ids.numel() * self.layer.input * self.layer.width

    def ours(self, products: str = "auto") -> object:
        one = self.layer
        return routed_experts(self.x, self.ids, self.weights, one.up, one.down, one.format, products=products)

    def in_torch(self) -> float:
        """Microseconds of both products of bf16 alone, on rows that were sorted before."""
        flat = self.ids.flatten()
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=self.layer.experts).cumsum(0).to(torch.int32)
        rows = self.x[order // self.layer.chosen]
        up, down = self.layer.up[0].mT, self.layer.down[0].mT

        def products() -> object:
            hidden = torch.relu(torch._grouped_mm(rows, up, offs=ends)).square()
            return torch._grouped_mm(hidden, down, offs=ends)

        return timed([products], 5)


def others(calls: Sequence[Call], products: Sequence[str]) -> dict[str, float | str]:
    """Microseconds of each kind of products and of torch's, or why there are none."""
    found: dict[str, float | str] = {}
    for kind in products:
        try:
            found[f"{kind}_us"] = timed([lambda c=c, k=kind: c.ours(k) for c in calls], 5)
        except Exception as error:  # mostly: there is none of that kind here
            found[kind] = str(error)[:60]
    if calls[0].layer.format == "bf16" and hasattr(torch, "_grouped_mm"):
        try:
            found["torch_grouped_mm_us"] = calls[0].in_torch()
        except Exception as error:
            found["torch_grouped_mm"] = str(error)[:80]
    return found


def narrowest(format: str) -> str:
    """The type that multiplies a format's codes as they are on this device: bf16, fp8 or fp4."""
    capability = torch.cuda.get_device_capability()
    if format == "fp8" and capability >= (8, 9):
        return "fp8"
    return "fp4" if format == "nvfp4" and capability >= (10, 0) else "bf16"


@cache
def rate(kind: str) -> float:
    """Of :func:`narrow_rate`, measured once."""
    return narrow_rate(kind)


def measure(table: Table, name: str, layer: Layer, tokens: int, wide: bool) -> None:
    """One row."""
    calls = [layer.call(tokens) for _ in range(8 if tokens < FEW else 1)]
    moved = sum(call.moved() for call in calls) / len(calls)
    us = timed([call.ours for call in calls], 9)
    more = others(calls, WIDE_PRODUCTS if wide else PRODUCTS)
    kind = narrowest(layer.format)
    if wide and kind != "bf16":
        by_products = calls[0].operations() / rate(kind) * 1e6
        more["narrow_floor_us"] = max(table.limits.floor(moved), by_products)
    table.row(name, us, table.limits.floor(moved, calls[0].operations()), **more)


def rows(table: Table, wide: bool = False) -> None:
    """Super's layer in four formats; ``wide``: Nano's too, every format, more tokens and products."""
    for model in MODELS if wide else ("Super",):
        for format in EXPERT_FORMATS if wide else FORMATS:
            layer = table.guarded(f"experts {format}", lambda m=model, f=format: Layer.random(m, f))
            if layer is None:
                continue
            for tokens in WIDE_TOKENS if wide else TOKENS:
                name = f"experts {model} {format} {tokens}"
                given = (table, name, layer, tokens, wide)
                table.guarded(name, lambda given=given: measure(*given))
            del layer, given
            torch.cuda.empty_cache()

"""Times RoutedExperts against its floor at Super's and Nano's sizes, in every format.

    python bench/gpu/routed_experts.py [--model super] [--format nvfp4]     needs a CUDA device and `nemoquant plugins build`

Tokens choose their experts evenly at random. The floor is the larger of
    memory    the weights of the experts that were chosen, once, and x and y, at the bandwidth of the memory's clock
    products  4 * tokens * k * input * width operations at the rate of a large bf16 product measured here; twice that for fp8 from SM89 on,
              four times for nvfp4 on SM100 and SM120 (which these kernels do not use: see plugins/routed_experts/README.md)
"""

import argparse

import torch
from timing import bandwidth, row, seconds, title
from torch import Tensor

from nemoquant.ops.functional import EXPERT_FORMATS, library_for, routed_experts

MODELS = {"super": (512, 22, 1024, 2688), "nano": (128, 6, 2688, 1856)}  # experts, k, input, width
TOKENS = (1, 16, 256, 4096)


def parts_of(format: str, experts: int, out: int, into: int) -> list[Tensor]:
    """A projection of random codes, small enough that nothing overflows."""
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


def product_rate() -> float:
    """Operations a second of a bf16 matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b)


def faster(format: str) -> int:
    """Products a second of a format's codes, over those of bf16."""
    capability = torch.cuda.get_device_capability()
    if format == "fp8":
        return 2 if capability >= (8, 9) else 1
    return 4 if format == "nvfp4" and capability[0] >= 10 else 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of RoutedExperts on this GPU.")
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--format", choices=EXPERT_FORMATS, action="append", help="default: all")
    options = parser.parse_args()
    library_for(torch.device("cuda"))
    title("RoutedExperts, bf16 in and out")
    rate = product_rate()
    for model in options.model or MODELS:
        experts, chosen, size, width = MODELS[model]
        for format in options.format or EXPERT_FORMATS:
            up, down = parts_of(format, experts, width, size), parts_of(format, experts, size, width)
            expert_bytes = sum(part[0].numel() * part.element_size() for part in (*up, *down))
            for tokens in TOKENS:
                x = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16)
                ids = torch.rand(tokens, experts, device="cuda").topk(chosen).indices
                weights = torch.rand(tokens, chosen, device="cuda")
                moved = len(ids.unique()) * expert_bytes + 4 * x.numel()
                products = 4 * tokens * chosen * size * width / (rate * faster(format))
                ours = seconds(lambda: routed_experts(x, ids, weights, up, down, format))  # noqa: B023
                row(f"{model}, {format}, {tokens} tokens", ours, max(moved / bandwidth(), products), {})


if __name__ == "__main__":
    main()

"""Times RoutedExperts at Super's size (512 experts, 22 a token, latent 1024, width 2688) against its floor.

    python bench/gpu/routed_experts.py [--format nvfp4] [--tokens 1]     needs a CUDA device and `nemoquant plugins build`

The floor is the larger of
    memory    the weights of the experts that were chosen, once, and x and y once, over the bandwidth
    products  4 * tokens * 22 * 1024 * 2688 operations over the rate of a large bf16 product, measured here: the kernels multiply bf16
A device's FP8 or FP4 products would have a lower floor; these kernels do not use them.
"""

import argparse

import torch
from timing import bandwidth, row, seconds, title
from torch import Tensor

from nemoquant.ops.experts import FORMATS, routed_experts
from nemoquant.ops.functional import library_for

EXPERTS, TOP_K, INPUT, WIDTH = 512, 22, 1024, 2688
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
GOAL = 1.5  # times the floor, at 1, 16, 256 and 4096 tokens


def projection(format: str, out: int, size: int) -> list[Tensor]:
    """Random parts, in the order of spec.yaml."""

    def codes(columns: int) -> Tensor:
        return torch.randint(0, 120, (EXPERTS, out, columns), dtype=torch.uint8, device="cuda")

    def scale(value: float) -> Tensor:
        return torch.full((EXPERTS,), value, device="cuda")

    if format == "bf16":
        return [torch.randn(EXPERTS, out, size, device="cuda", dtype=torch.bfloat16) / 32]
    blocks = [codes(size // 16)] if format in ("nvfp4", "w4a16") else []
    inputs = [scale(0.01)] if format in ("fp8", "nvfp4") else []
    return [codes(size // 2 if blocks else size), *blocks, scale(1e-4), *inputs]


def product_rate() -> float:
    """Operations a second of a bf16 matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of RoutedExperts on this GPU.")
    parser.add_argument("--format", choices=FORMATS, action="append", help="default: all")
    parser.add_argument("--tokens", type=int, action="append", help="default: 1 to 4096")
    options = parser.parse_args()
    library_for(torch.device("cuda"))
    rate = product_rate()
    title(f"RoutedExperts, {EXPERTS} experts, {TOP_K} a token, latent {INPUT}, width {WIDTH}, x in bf16; goal {GOAL} times the floor")
    print(f"a bf16 product reaches {rate / 1e12:.0f} TFLOP/s\n")
    for format in options.format or FORMATS:
        up, down = projection(format, WIDTH, INPUT), projection(format, INPUT, WIDTH)
        for tokens in options.tokens or TOKENS:
            x = torch.randn(tokens, INPUT, device="cuda", dtype=torch.bfloat16)
            ids = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K).indices
            weights = torch.rand(tokens, TOP_K, device="cuda")
            chosen = ids.unique().numel()
            moved = chosen * sum(part[0].numel() * part.element_size() for part in (*up, *down)) + 2 * x.nbytes
            floor = max(moved / bandwidth(), 4 * tokens * TOP_K * INPUT * WIDTH / rate)
            ours = seconds(lambda: routed_experts(x, ids, weights, up, down, format))  # noqa: B023
            row(f"{format}, {tokens} tokens, {chosen} experts", ours, floor, {})
        del up, down


if __name__ == "__main__":
    main()

"""Times RoutedExperts against its floor at Super's and Nano's sizes, in every format.

    python bench/gpu/routed_experts.py [--model super] [--format nvfp4]     needs a CUDA device and `nemoquant plugins build`

Tokens choose their experts evenly at random. The floor is the hardware's, and its column says which of the two it is, the larger:
    memory          the weights of the experts that were chosen, once, and x and y, at the bandwidth of the memory's clock
    bf16 products   4 * tokens * k * input * width operations at the rate of a large product of torch's, measured here, in the narrowest
                    (fp8, fp4) type that multiplies the format's codes and that the device has: fp8 from SM89 on, FP4 from SM100 on
These kernels do not reach every such rate: on SM90 mma.sync multiplies E4M3 no faster than bfloat16, which the floor does not excuse.
Beside the time of the products that are taken by themselves stand those of each other kind that is there (``products`` of the operator).
"""

import argparse
import sys
from collections.abc import Callable
from functools import cache

import torch
from timing import bandwidth, row, seconds, title
from torch import Tensor

from nemoquant.errors import EngineError
from nemoquant.ops.functional import EXPERT_FORMATS, EXPERT_PRODUCTS, library_for, routed_experts

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


SIDE = 8192  # of the products that give the rates


def narrowest(format: str) -> str:
    """The type that multiplies a format's codes as they are on this device: bf16, fp8 or fp4."""
    capability = torch.cuda.get_device_capability()
    if format == "fp8" and capability >= (8, 9):
        return "fp8"
    return "fp4" if format == "nvfp4" and capability >= (10, 0) else "bf16"


@cache
def rate(kind: str) -> float:
    """Operations a second of torch's product of SIDE cubed, by cuBLAS; fp8 as fast as the hardware adds up, fp4 with block scales."""
    if kind == "bf16":
        a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return 2 * SIDE**3 / seconds(lambda: a @ b)
    dtype, columns = (torch.float8_e4m3fn, SIDE) if kind == "fp8" else (torch.float4_e2m1fn_x2, SIDE // 2)
    a, b = (torch.randint(0, 0x50, (SIDE, columns), device="cuda", dtype=torch.uint8).view(dtype) for _ in range(2))
    one = torch.ones(() if kind == "fp8" else SIDE * SIDE // 16, device="cuda")
    scale = one if kind == "fp8" else one.to(torch.float8_e4m3fn)
    fast = kind == "fp8"
    return 2 * SIDE**3 / seconds(lambda: torch._scaled_mm(a, b.t(), scale, scale, out_dtype=torch.bfloat16, use_fast_accum=fast))


def of_each_kind(call: Callable[[str], object]) -> dict[str, float]:
    """Seconds of each kind of products that this library and device have for the arguments, but "auto"."""
    times = {}
    for products in (name for name in EXPERT_PRODUCTS if name != "auto"):
        try:
            call(products)
        except EngineError as error:  # mostly: there is none of that kind
            print(f"{products}: not timed: {error}", file=sys.stderr)
            continue
        times[products] = seconds(lambda: call(products))  # noqa: B023
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="Times of RoutedExperts on this GPU.")
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--format", choices=EXPERT_FORMATS, action="append", help="default: all")
    options = parser.parse_args()
    library_for(torch.device("cuda"))
    title("RoutedExperts, bf16 in and out")
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
                kind = narrowest(format)
                memory, products = moved / bandwidth(), 4 * tokens * chosen * size * width / rate(kind)

                def call(which: str) -> Tensor:
                    return routed_experts(x, ids, weights, up, down, format, products=which)  # noqa: B023

                bound = "memory" if memory >= products else f"{kind} products"
                others = of_each_kind(call)
                name = f"{model}, {format}, {tokens} tokens"
                row(name, seconds(lambda: call("auto")), max(memory, products), others, bound)


if __name__ == "__main__":
    main()

"""CUTLASS's grouped products of RoutedExperts on a CUDA device, against the decoded products and float64.

NEMOQUANT_KERNELS names the library of `nemoquant plugins build --arch sm_90a --gemm-arch sm_90a` on an H100
or H200, of another architecture elsewhere. tests/plugins/test_grouped_experts.py tests all code around them.
"""

import pytest
import torch
from support.gpu_needs import has_kernel, needs
from test_gpu_routed_experts import Layer, error, given, layer, mixture, run
from torch import Tensor

from nemoquant.ops.functional import EXPERT_FORMATS, routed_experts
from nemoquant.ops.library import covers, kernels


def formats() -> list[str]:
    """The formats for which the library in use has grouped products on this device."""
    library = kernels("cuda") if has_kernel("routed_experts") else None
    if library is None:
        return []
    capability = torch.cuda.get_device_capability()
    if not any(covers(name, *capability) for name in library.gemm_architectures):
        return []
    return ["bf16", "fp8", "nvfp4"] if capability[0] == 10 else ["bf16", "fp8"]


FORMATS = formats()
pytestmark = needs_grouped = needs(
    "CUTLASS's products for this device: nemoquant plugins build --gemm-arch", bool(FORMATS)
)
every_format = pytest.mark.parametrize("format", FORMATS or ["none"])


def grouped(one: Layer, x: Tensor, ids: Tensor, weights: Tensor, products: str = "grouped") -> Tensor:
    parts = list(one.up.values()), list(one.down.values())
    return routed_experts(x, ids, weights, *parts, one.format, products=products)


@pytest.mark.parametrize("tokens", [1, 16, 93, 745, 4096])
@every_format
@pytest.mark.parametrize("model", ["super", "nano"])
def test_error_is_below_twice_that_of_a_framework(model: str, format: str, tokens: int) -> None:
    """Like the test of the same name for the other products; and repeated calls give the same bits."""
    one = layer(format, model)
    x, ids, weights = given(model, tokens, torch.bfloat16)
    exact = mixture(one, x, ids, weights, torch.float64)
    framework = mixture(one, x, ids, weights, torch.bfloat16).bfloat16()
    y = grouped(one, x, ids, weights)
    assert torch.isfinite(y).all()
    assert error(y, exact) <= 2 * error(framework, exact)
    assert error(y, grouped(one, x, ids, weights, "decoded").double()) <= 0.01
    assert grouped(one, x, ids, weights).equal(y)


def single_terms(format: str) -> Layer:
    """Products whose sums have one term each, so that they are exact.

    Each token meets one column of up; down is a permutation. Sizes are no multiples of 64, 128 or a tile: 160
    inputs, 224 wide, 4 experts.
    """
    experts, size, width = 4, 160, 224
    g = torch.Generator("cuda").manual_seed(3)
    made = Layer(format, {}, {})
    ones = torch.zeros(experts, size, width, device="cuda")
    ones[:, torch.arange(size), torch.arange(size) * 3 % width] = 1
    for parts, out, into, is_down in ((made.up, width, size, False), (made.down, size, width, True)):
        for name in EXPERT_FORMATS[format][1]:
            if name == "weight":
                values = torch.randn(experts, out, into, generator=g, device="cuda")
                parts[name] = (ones if is_down else values).bfloat16()
            elif name == "codes":
                if format == "fp8":
                    codes = torch.randint(
                        0, 256, (experts, out, into), generator=g, device="cuda", dtype=torch.uint8
                    )
                    finite = torch.where(codes & 0x7F == 0x7F, 0, codes)
                    parts[name] = torch.where(ones == 1, 0x38, 0).to(torch.uint8) if is_down else finite
                else:
                    codes = torch.randint(
                        0, 256, (experts, out, into // 2), generator=g, device="cuda", dtype=torch.uint8
                    )
                    two = torch.where(ones == 1, 2, 0).to(torch.uint8).unflatten(2, (-1, 2))
                    parts[name] = two[..., 0] | two[..., 1] << 4 if is_down else codes
            elif name == "block_scales":
                scales = torch.randint(
                    0x20, 0x50, (experts, out, into // 16), generator=g, device="cuda", dtype=torch.uint8
                )
                parts[name] = torch.full_like(scales, 0x38) if is_down else scales
            else:
                parts[name] = torch.rand(experts, generator=g, device="cuda") * 0.05 + 0.05
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@every_format
def test_every_code_and_scale_is_where_it_belongs(format: str, dtype: torch.dtype) -> None:
    """Bit for bit equal to the decoded products, which have their own tests.

    Every input and every row is tested, in tiles that are not full.
    """
    if format == "bf16":
        dtype = torch.bfloat16
    one = single_terms(format)
    tokens = 450
    x = torch.zeros(tokens, 160, device="cuda", dtype=dtype)
    x[torch.arange(tokens), torch.arange(tokens) % 160] = 1
    ids = (
        torch.tensor([0, 2, 3], device="cuda").repeat(tokens // 3)[:, None].contiguous()
    )  # one expert has no tokens
    weights = torch.ones(tokens, 1, device="cuda")
    y = grouped(one, x, ids, weights)
    assert y.count_nonzero() > y.numel() // 8  # half are negative before relu, and FP4 makes small ones zero
    assert y.equal(grouped(one, x, ids, weights, "decoded"))


@every_format
def test_ids_that_are_no_experts_add_nothing(format: str) -> None:
    one = layer(format, "nano")
    x, ids, weights = given("nano", 300, torch.bfloat16)
    ids[5], weights[5] = -1, torch.nan
    ids[7, 2], weights[7, 2] = 128, torch.inf
    clean = torch.where(torch.isfinite(weights), weights, 0)
    y = grouped(one, x, ids, weights)
    assert y.equal(grouped(one, x, ids.clamp(0, 127), clean))
    assert (y[5] == 0).all()
    assert (grouped(one, x, torch.full_like(ids, -1), weights) == 0).all()


@every_format
def test_all_tokens_on_one_expert(format: str) -> None:
    one = layer(format, "nano")
    x, _, weights = given("nano", 3000, torch.bfloat16)
    ids, weights = torch.full((3000, 1), 77, device="cuda"), weights[:, :1].contiguous()
    exact = mixture(one, x, ids, weights, torch.float64)
    assert error(grouped(one, x, ids, weights), exact) <= 2 * error(exact.bfloat16(), exact) + (
        0.004 if format == "bf16" else 0
    )


@every_format
def test_they_never_run_by_themselves(format: str) -> None:
    one = layer(format, "super")
    x, ids, weights = given("super", 4096, torch.bfloat16)
    assert run(one, x, ids, weights).equal(grouped(one, x, ids, weights, "decoded"))


@every_format
def test_it_runs_on_the_current_stream_and_in_a_graph(format: str) -> None:
    """Sizes of the products are read on the device: a replay of the graph uses the new ids."""
    one = layer(format, "nano")
    x, ids, weights = given("nano", 256, torch.bfloat16)
    grouped(one, x, ids, weights)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        y = grouped(one, x, ids, weights)
    ids.copy_(torch.randint(0, 128, ids.shape, device="cuda"))
    graph.replay()
    again = grouped(one, x, ids, weights)
    torch.cuda.synchronize()
    assert y.equal(again)

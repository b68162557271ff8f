"""RoutedExperts on a CUDA device: Super's and Nano's sizes against float64, every kernel, repeatable bits, streams and graphs.

Build the kernels first: `nemoquant plugins build` (or name a library in NEMOQUANT_KERNELS). Under compute-sanitizer:
`compute-sanitizer python -m pytest tests/gpu/test_gpu_routed_experts.py -k "not Super"`.
"""

import pytest
import torch
from torch import Tensor

from nemoquant.ops.experts import FORMATS, routed_experts
from nemoquant.ops.library import serves

AVAILABLE = torch.cuda.is_available() and serves("routed_experts", "cuda")
pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs a CUDA device and its kernels: nemoquant plugins build")

SIZES = {"Super": (1024, 2688), "Nano": (2688, 1856), "small": (96, 160)}
EXPERTS = 16  # each kernel depends on tokens an expert, not on how many experts there are
# tokens of 4 experts each: kernels with tiles of 8, 32 and 64
TOKENS = (1, 7, 8, 33, 96, 97, 500)
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def random_parts(format: str, out: int, size: int, g: torch.Generator) -> list[Tensor]:
    def codes(columns: int, high: int = 256) -> Tensor:
        return torch.randint(0, high, (EXPERTS, out, columns), dtype=torch.uint8, device="cuda", generator=g)

    spread = 1 + torch.rand(EXPERTS, device="cuda", generator=g)
    if format == "bf16":
        return [(torch.randn(EXPERTS, out, size, device="cuda", generator=g) / size**0.5).bfloat16()]
    inputs = [spread * 5 / (448 if format == "fp8" else 448 * 6)] if format in ("fp8", "nvfp4") else []
    if format in ("nvfp4", "w4a16"):
        scales = 40 + torch.randint(0, 32, (EXPERTS, out, size // 16), dtype=torch.uint8, device="cuda", generator=g)
        return [codes(size // 2), scales, spread / 20 / size**0.5, *inputs]
    values = codes(size)
    values[values & 0x7F == 0x7F] = 0  # NaN is no weight
    return [values, spread / 100 / size**0.5, *inputs]


def decoded(format: str, parts: list[Tensor]) -> Tensor:
    """float64 [experts, out, in]."""
    if format == "bf16":
        return parts[0].double()
    if format not in ("nvfp4", "w4a16"):
        return parts[0].view(torch.float8_e4m3fn).double() * parts[1].double()[:, None, None]
    table = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64, device="cuda")
    codes = torch.stack([parts[0] & 15, parts[0] >> 4], -1).flatten(-2)
    scales = parts[1].view(torch.float8_e4m3fn).double().repeat_interleave(16, -1)
    return table[codes.long()] * scales * parts[2].double()[:, None, None]


def rounded(x: Tensor, format: str, scale: Tensor) -> Tensor:
    """Through the format's codes and back, in float32 as the definition has it, returned in float64. x [rows, in], one scale."""
    x = x.float()
    if format == "fp8":
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()
    blocks = x.unflatten(-1, (-1, 16))
    block = (blocks.abs().amax(-1, keepdim=True) / (6 * scale)).clamp(max=448).to(torch.float8_e4m3fn).float()
    d = block * scale
    magnitude = (blocks.abs() / torch.where(d == 0, 1, d)).clamp(max=6)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    values = (magnitude / step).round() * step * blocks.sign()
    return (values.double() * block.double() * scale.double()).flatten(-2)


def in_torch(
    x: Tensor, ids: Tensor, weights: Tensor, up: list[Tensor], down: list[Tensor], format: str, dtype: torch.dtype
) -> Tensor:
    """Expert after expert, products in ``dtype``, the sum in float64."""
    total = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    first, second = decoded(format, up), decoded(format, down)
    for e in range(EXPERTS):
        token, place = (ids == e).nonzero(as_tuple=True)
        rows = x[token].double()
        for matrix, parts in ((first, up), (second, down)):
            if format in ("fp8", "nvfp4"):
                rows = rounded(rows, format, parts[-1][e])
            rows = (rows.to(dtype) @ matrix[e].to(dtype).mT).double()
            rows = torch.relu(rows) ** 2 if matrix is first else rows
        total.index_add_(0, token, rows * weights[token, place, None].double())
    return total


def given(format: str, size: str, tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    g = torch.Generator("cuda").manual_seed(0)
    inner, width = SIZES[size]
    x = torch.randn(tokens, inner, device="cuda", generator=g).to(dtype)
    ids = torch.rand(tokens, EXPERTS, device="cuda", generator=g).topk(4).indices
    weights = torch.rand(tokens, 4, device="cuda", generator=g)
    return x, ids, weights, random_parts(format, width, inner, g), random_parts(format, inner, width, g)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format", FORMATS)
def test_error_is_below_twice_that_of_bf16(format: str, size: str, tokens: int) -> None:
    """Against float64. With rounded inputs codes flip in both; torch's products in bf16 flip more of them."""
    a = given(format, size, tokens)
    exact = in_torch(*a, format, torch.float64)
    assert error(routed_experts(*a, format), exact) < 2 * error(in_torch(*a, format, torch.bfloat16).bfloat16(), exact)


@pytest.mark.parametrize("tokens", [1, 33, 500])
@pytest.mark.parametrize("format", [f for f in FORMATS if f not in ("fp8", "nvfp4")])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 1e-3)], ids=str)
def test_other_dtypes(dtype: torch.dtype, limit: float, format: str, tokens: int) -> None:
    """float32 inputs in three bfloat16 parts: what is left is the tensor cores' sum in float32. float16: the rounding of y."""
    a = given(format, "Super", tokens, dtype)
    assert error(routed_experts(*a, format), in_torch(*a, format, torch.float64)) < limit


@pytest.mark.parametrize("tokens", [1, 33, 500])
@pytest.mark.parametrize("format", FORMATS)
def test_the_same_bits_every_time(format: str, tokens: int) -> None:
    a = given(format, "Super", tokens)
    first = routed_experts(*a, format)
    assert all(routed_experts(*a, format).equal(first) for _ in range(10))


def test_ids_out_of_range_are_skipped_and_counted() -> None:
    x, ids, weights, up, down = given("nvfp4", "small", 500)
    whole = routed_experts(x, ids, weights, up, down, "nvfp4")
    ids[7, 1], ids[8, 0], skipped = -1, EXPERTS, torch.zeros(1, dtype=torch.int32, device="cuda")
    y = routed_experts(x, ids, weights, up, down, "nvfp4", skipped)
    assert skipped.item() == 2
    kept = torch.ones(500, dtype=torch.bool, device="cuda")
    kept[[7, 8]] = False
    assert y[kept].equal(whole[kept])


def test_it_runs_on_the_current_stream_and_in_a_graph() -> None:
    x, *rest = given("nvfp4", "Super", 4)
    routed_experts(x, *rest, "nvfp4")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        y = routed_experts(x, *rest, "nvfp4")
    x.mul_(2)
    graph.replay()
    doubled = routed_experts(x, *rest, "nvfp4")
    torch.cuda.synchronize()
    assert y.equal(doubled)


def test_more_ids_than_a_pass_takes() -> None:
    """30,000 tokens of 4: two passes; each token as in a batch of its own kind."""
    x, ids, weights, up, down = given("nvfp4", "small", 30_000)
    y = routed_experts(x, ids, weights, up, down, "nvfp4")
    last = slice(24_576, 30_000)  # the second pass
    assert y[last].equal(routed_experts(x[last].contiguous(), ids[last].contiguous(), weights[last].contiguous(), up, down, "nvfp4"))

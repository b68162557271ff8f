"""RoutedExperts on a CUDA device: Super's and Nano's sizes against float64 in every format.

Also streams and graphs. NEMOQUANT_KERNELS names the library of `nemoquant plugins build`. Under
compute-sanitizer: `compute-sanitizer python -m pytest tests/gpu/test_gpu_routed_experts.py -k "not super"`.
"""

from dataclasses import dataclass

import pytest
import torch
from support.gpu_needs import has_kernel, needs, needs_kernel
from torch import Tensor

from nemoquant.ops.functional import EXPERT_FORMATS, routed_experts
from nemoquant.ops.library import covers, kernels

pytestmark = needs_kernel("routed_experts")


def has_native() -> bool:
    """Whether the device is of the family 12.x, and the library has code with its FP4 instructions."""
    library = kernels("cuda") if has_kernel("routed_experts") else None
    if library is None or torch.cuda.get_device_capability()[0] != 12:
        return False
    names = [name for name in library.architectures if name[-1] in "af"]
    return any(covers(name, *torch.cuda.get_device_capability()) for name in names)


needs_native = needs("a device of SM 120 or 121, with kernels for sm_120f or sm_120a", has_native())

MODELS = {"super": (512, 22, 1024, 2688), "nano": (128, 6, 2688, 1856)}  # experts, k, input, width
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass
class Layer:
    """Parts of both projections as the operator takes them."""

    format: str
    up: dict[str, Tensor]
    down: dict[str, Tensor]

    def weight(self, projection: str, expert: int) -> Tensor:
        """Decoded, float64 [out, in]."""
        parts = self.up if projection == "up" else self.down
        if "weight" in parts:
            return parts["weight"][expert].double()
        codes, scale = parts["codes"][expert], parts["global_scale"][expert].double()
        if "block_scales" not in parts:
            return codes.view(torch.float8_e4m3fn).double() * scale
        table = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64, device="cuda")
        values = table[torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()]
        return (
            values
            * parts["block_scales"][expert].view(torch.float8_e4m3fn).double().repeat_interleave(16, 1)
            * scale
        )

    def rounded(self, projection: str, v: Tensor, expert: int) -> Tensor:
        """A product's inputs [n, in] in float64, after the format's rounding."""
        parts = self.up if projection == "up" else self.down
        if "input_scale" not in parts:
            return v
        scale, rows = parts["input_scale"][expert], v.float()
        if self.format == "fp8":
            return e4m3(rows / scale).double() * scale.double()
        blocks = rows.unflatten(1, (-1, 16))
        block = e4m3(blocks.abs().amax(2, keepdim=True) / (6 * scale)) * scale
        ratio = blocks / torch.where(block == 0, 1, block)
        return (e2m1(ratio).double() * block.double()).flatten(1)


def e4m3(v: Tensor) -> Tensor:
    return v.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def e2m1(v: Tensor) -> Tensor:
    """Adding and subtracting a large number rounds to multiples of 0.5, 1 or 2, ties to the even code."""
    size = v.abs().clamp(max=6)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign((size / step).round() * step, v)


def layer(format: str, model: str) -> Layer:
    """Random codes of every magnitude, block scales around 1.

    Global scales give the hidden values the spread of the inputs.
    """
    experts, _, size, width = MODELS[model]
    g = torch.Generator("cuda").manual_seed(0)
    made = Layer(format, {}, {})
    for parts, out, into, hidden in ((made.up, width, size, False), (made.down, size, width, True)):
        for name in EXPERT_FORMATS[format][1]:
            if name == "weight":
                parts[name] = (
                    torch.randn(experts, out, into, generator=g, device="cuda", dtype=torch.bfloat16)
                    / into**0.5
                )
            elif name == "codes":
                columns = into // 2 if "4" in format else into
                codes = torch.randint(
                    0, 256, (experts, out, columns), generator=g, device="cuda", dtype=torch.uint8
                )
                parts[name] = codes if "4" in format else torch.where(codes & 0x7F == 0x7F, 0, codes)
            elif name == "block_scales":
                parts[name] = torch.randint(
                    0x30, 0x41, (experts, out, into // 16), generator=g, device="cuda", dtype=torch.uint8
                )
            else:
                spread = torch.rand(experts, generator=g, device="cuda") * 0.4 + 0.8
                size_of_codes = 3.0 if "4" in format else 120.0
                largest = (40.0 if hidden else 5.0) / (2688.0 if format == "nvfp4" else 448.0)
                parts[name] = spread * (largest if name == "input_scale" else 1 / (size_of_codes * into**0.5))
    return made


def given(model: str, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    experts, chosen, size, _ = MODELS[model]
    g = torch.Generator("cuda").manual_seed(1)
    ids = torch.rand(tokens, experts, generator=g, device="cuda").topk(chosen).indices
    weights = torch.rand(tokens, chosen, generator=g, device="cuda")
    return torch.randn(tokens, size, generator=g, device="cuda").to(dtype), ids, weights


def mixture(one: Layer, x: Tensor, ids: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Expert by expert; with bfloat16 as a framework computes it: each product and its inputs are rounded."""
    total = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    for expert in ids.unique().tolist():
        rows, j = (ids == expert).nonzero(as_tuple=True)
        v = one.rounded("up", x[rows].double(), expert).to(dtype)
        hidden = torch.relu(v @ one.weight("up", expert).to(dtype).mT).square()
        v = one.rounded("down", hidden.double(), expert).to(dtype)
        total.index_add_(
            0, rows, (v @ one.weight("down", expert).to(dtype).mT).double() * weights[rows, j, None].double()
        )
    return total


def run(one: Layer, x: Tensor, ids: Tensor, weights: Tensor, products: str = "auto") -> Tensor:
    return routed_experts(
        x, ids, weights, list(one.up.values()), list(one.down.values()), one.format, products=products
    )


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("tokens", [1, 2, 16, 93, 94, 256, 745, 4096])
@pytest.mark.parametrize("format", EXPERT_FORMATS)
@pytest.mark.parametrize("model", MODELS)
def test_error_is_below_twice_that_of_a_framework(model: str, format: str, tokens: int) -> None:
    """bfloat16 inputs. Flipped codes of hidden values count here.

    One of 59,136 moves a token by less than bfloat16 rounds.
    """
    one = layer(format, model)
    x, ids, weights = given(model, tokens, torch.bfloat16)
    exact = mixture(one, x, ids, weights, torch.float64)
    framework = mixture(one, x, ids, weights, torch.bfloat16).bfloat16()
    y = run(one, x, ids, weights)
    assert torch.isfinite(y).all()
    assert error(y, exact) <= 2 * error(framework, exact)
    assert error(y, exact) <= 0.01
    assert run(one, x, ids, weights).equal(y)


@needs_native
@pytest.mark.parametrize("tokens", [1, 94, 745, 4096])
@pytest.mark.parametrize("model", MODELS)
def test_native_products(model: str, tokens: int) -> None:
    """float32 in and out: within 1e-4 of float64 and of the decoded products.

    Tokens with a flipped hidden code are left out, one in twenty at most. How many bits of a sum of 64
    products are kept is not documented; sums of 128 are added in float32. With all bits of float32 it would
    be 1e-6.
    """
    one = layer("nvfp4", model)
    x, ids, weights = given(model, tokens, torch.float32)
    y, decoded = run(one, x, ids, weights, "native"), run(one, x, ids, weights, "decoded")
    for wanted in (mixture(one, x, ids, weights, torch.float64), decoded.double()):
        apart = (y.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert (apart > 1e-4).sum() <= max(1, tokens // 20)
        assert apart.max() < 0.05
    assert run(one, x, ids, weights, "native").equal(y)


@needs_native
def test_native_products_of_whole_numbers_are_exact() -> None:
    """One block at a time is not zero, so that each code meets the scales of its own block in both operands.

    Equal bit for bit, for the position of each lane.
    """
    g = torch.Generator("cuda").manual_seed(3)
    size, tokens = 512, 64
    codes = torch.randint(0, 256, (1, size, size // 2), generator=g, device="cuda", dtype=torch.uint8)
    powers = torch.tensor(
        [0x01, 0x04, 0x28, 0x38, 0x40], dtype=torch.uint8, device="cuda"
    )  # 2^-9 and 2^-7, which are subnormal; 1/4, 1 and 2
    blocks = powers[torch.randint(0, 5, (1, size, size // 16), generator=g, device="cuda")]
    one = torch.ones(1, device="cuda")
    identity = torch.zeros(1, size, size // 2, dtype=torch.uint8, device="cuda")
    rows = torch.arange(size, device="cuda")
    identity[0, rows, rows // 2] = torch.where(rows % 2 == 0, 0x2, 0x20).to(torch.uint8)
    ones = torch.full_like(blocks, 0x38)
    made = Layer(
        "nvfp4",
        {"codes": codes, "block_scales": blocks, "global_scale": one, "input_scale": one},
        {
            "codes": identity,
            "block_scales": ones,
            "global_scale": one,
            "input_scale": one,
        },
    )
    x = torch.zeros(tokens, size, device="cuda")
    table = torch.tensor(E2M1, device="cuda")
    for token in range(tokens):
        at = token % (size // 16) * 16
        x[token, at : at + 16] = table[torch.randint(0, 8, (16,), generator=g, device="cuda")] * 2.0 ** (
            token % 3
        )
        x[token, at] = 6 * 2.0 ** (token % 3)  # so that the block's scale is that power
    ids, weights = (
        torch.zeros(tokens, 1, dtype=torch.int64, device="cuda"),
        torch.ones(tokens, 1, device="cuda"),
    )
    exact = mixture(made, x, ids, weights, torch.float64)
    assert run(made, x, ids, weights, "native").double().equal(exact)


@needs_native
def test_native_products_keep_a_nan_with_its_token() -> None:
    """A block with a NaN gets a NaN scale."""
    one = layer("nvfp4", "nano")
    x, ids, weights = given("nano", 64, torch.bfloat16)
    clean = run(one, x, ids, weights, "native")
    x[5, 7] = torch.nan
    y = run(one, x, ids, weights, "native")
    assert y[5].isnan().all()
    others = torch.arange(64, device="cuda") != 5
    assert y[others].equal(clean[others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 40, 600, 2000])
@pytest.mark.parametrize("format", ["bf16", "w8a16", "w4a16"])
def test_other_dtypes(format: str, tokens: int, dtype: torch.dtype) -> None:
    """float16: within 2% of the error of rounding the exact result once.

    float32: 1e-5, because tensor cores add less precisely than float32.
    """
    one = layer(format, "nano")
    x, ids, weights = given("nano", tokens, dtype)
    exact = mixture(one, x, ids, weights, torch.float64)
    limit = 1e-5 if dtype == torch.float32 else 1.02 * error(exact.half(), exact)
    assert error(run(one, x, ids, weights), exact) <= limit


@pytest.mark.parametrize("format", ["w8a16", "w4a16"])
def test_every_code_is_decoded(format: str) -> None:
    """Each code goes through one column, subnormal ones too: y is (code * scale)^2, exactly.

    Both kernels: one token, and 300.
    """
    byte = torch.arange(256, dtype=torch.uint8, device="cuda")
    packed = 2 if format == "w4a16" else 1
    up, down = (torch.zeros(1, 256, 256 // packed, dtype=torch.uint8, device="cuda") for _ in range(2))
    finite = torch.where(byte & 0x7F == 0x7F, 0, byte & (0x7F if packed == 2 else 0xFF))
    one = torch.ones(1, device="cuda")
    rows = torch.arange(256, device="cuda")
    values = finite.view(torch.float8_e4m3fn).float()
    scales: tuple[list[Tensor], list[Tensor]] = ([], [])
    if packed == 2:
        up[0, :, 0] = byte & 7
        down[0, rows, rows // 2] = torch.where(rows % 2 == 0, 0x2, 0x20).to(torch.uint8)
        values = values * torch.tensor(E2M1, device="cuda")[(byte & 7).long()]
        ones = torch.full((1, 256, 16), 0x38, dtype=torch.uint8, device="cuda")
        scales = ([finite[None, :, None].repeat(1, 1, 16)], [ones])
    else:
        up[0, :, 0], down[0, rows, rows] = finite, 0x38
    for tokens in (1, 300):
        x = torch.zeros(tokens, 256, device="cuda")
        x[:, 0] = 1
        ids, weights = (
            torch.zeros(tokens, 1, dtype=torch.int64, device="cuda"),
            torch.ones(tokens, 1, device="cuda"),
        )
        y = routed_experts(x, ids, weights, [up, *scales[0], one], [down, *scales[1], one], format)
        assert y.equal((values.clamp(min=0) ** 2).expand(tokens, 256))


def test_ids_that_are_no_experts_add_nothing() -> None:
    one = layer("nvfp4", "nano")
    x, ids, weights = given("nano", 64, torch.bfloat16)
    ids[5], weights[5] = -1, torch.nan
    ids[7, 2], weights[7, 2] = 128, torch.inf
    clean_ids, clean = ids.clamp(0, 127), torch.where(torch.isfinite(weights), weights, 0)
    skipped = torch.ones(1, dtype=torch.int32, device="cuda")
    y = routed_experts(
        x, ids, weights, list(one.up.values()), list(one.down.values()), "nvfp4", skipped=skipped
    )
    assert y.equal(run(one, x, clean_ids, clean))
    assert (y[5] == 0).all()
    assert skipped.item() == 1 + 7  # all six of a token, one of another


def test_all_tokens_on_one_expert() -> None:
    one = layer("fp8", "nano")
    x, _, weights = given("nano", 3000, torch.bfloat16)
    ids = torch.full((3000, 1), 77, device="cuda")
    exact = mixture(one, x, ids, weights[:, :1], torch.float64)
    assert error(run(one, x, ids, weights[:, :1].contiguous()), exact) <= 2 * error(exact.bfloat16(), exact)


def test_it_runs_on_the_current_stream_and_in_a_graph() -> None:
    """Routing is read on the device: a replay of the graph uses the new ids."""
    one = layer("w4a16", "nano")
    x, ids, weights = given("nano", 16, torch.bfloat16)
    run(one, x, ids, weights)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        y = run(one, x, ids, weights)
    ids.copy_(ids.flip(0))
    graph.replay()
    again = run(one, x, ids, weights)
    torch.cuda.synchronize()
    assert y.equal(again)

"""The experts' cases: every format against a mixture in float64, its inputs rounded as the format says."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu.cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Case,
    Errors,
    MissingError,
    relative_error,
    unequal,
)
from nemoquant.errors import EngineError
from nemoquant.ops.functional import EXPERT_FORMATS, routed_experts

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_MAX = 448.0

REFUSALS = {
    "native": ("which this library was built without", "on a device of compute capability"),
    "grouped": ("which this library was built without", "which this library does not have"),
}
"""Words of the library about products that it, or this device, has not; anything else is an error."""
GROUPED = ("bf16", "fp8", "nvfp4")  # the formats that such products can have at all

Parts = dict[str, Tensor]
"""A projection of all experts: ``weight``, or ``codes`` and its scales."""


@dataclass(frozen=True)
class Sizes:
    experts: int
    chosen: int
    input: int
    width: int


@dataclass(frozen=True)
class Layer:
    """The projections of all experts, random, of one format."""

    format: str
    up: Parts
    down: Parts

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, products: str = "auto") -> Tensor:
        """Raises MissingError where the library or the device has no such ``products``."""
        up, down = list(self.up.values()), list(self.down.values())
        try:
            return routed_experts(x, ids, weights, up, down, self.format, products=products)
        except EngineError as error:
            if any(words in str(error) for words in REFUSALS.get(products, ())):
                raise MissingError(str(error)) from None
            raise


def layer(device: str, format: str, sizes: Sizes) -> Layer:
    """Codes of every value; scales such that x and hidden values, about 5 and 40 at most, fill the range."""
    g = torch.Generator(device).manual_seed(0)
    up = projection(device, g, format, sizes.experts, sizes.width, sizes.input, largest=5.0)
    down = projection(device, g, format, sizes.experts, sizes.input, sizes.width, largest=40.0)
    return Layer(format, up, down)


def projection(
    device: str,
    g: torch.Generator,
    format: str,
    experts: int,
    out: int,
    into: int,
    largest: float,
) -> Parts:
    """[experts, out, into] in the format's parts; ``largest`` is about the largest of its inputs."""
    four = "4" in format

    def integers(low: int, high: int, columns: int) -> Tensor:
        shape = (experts, out, columns)
        return torch.randint(low, high, shape, generator=g, device=device, dtype=torch.uint8)

    parts: Parts = {}
    for name in EXPERT_FORMATS[format][1]:
        if name == "weight":
            normal = torch.randn(experts, out, into, generator=g, device=device)
            parts[name] = (normal / into**0.5).to(BFLOAT16)
        elif name == "codes":
            codes = integers(0, 256, into // 2 if four else into)
            parts[name] = codes if four else torch.where(codes & 0x7F == 0x7F, 0, codes)  # 0x7f is NaN
        elif name == "block_scales":
            parts[name] = integers(0x30, 0x41, into // 16)
        else:
            spread = torch.rand(experts, generator=g, device=device) * 0.4 + 0.8
            reached = 6 * E4M3_MAX if format == "nvfp4" else E4M3_MAX
            usual = largest / reached if name == "input_scale" else 1 / ((3.0 if four else 120.0) * into**0.5)
            parts[name] = spread * usual
    return parts


def decoded(parts: Parts, expert: int) -> Tensor:
    """An expert's weight [out, in] in float64."""
    if "weight" in parts:
        return parts["weight"][expert].double()
    codes, scale = parts["codes"][expert], parts["global_scale"][expert].double()
    if "block_scales" not in parts:
        return codes.view(torch.float8_e4m3fn).double() * scale
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64, device=codes.device)
    values = table[torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()]
    blocks = parts["block_scales"][expert].view(torch.float8_e4m3fn).double()
    return values * blocks.repeat_interleave(16, 1) * scale


def e4m3(values: Tensor) -> Tensor:
    """Rounded to E4M3, saturating, as float32."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def rounded(format: str, parts: Parts, values: Tensor, expert: int) -> Tensor:
    """A product's input [rows, in] as the format rounds it: to E4M3, to NVFP4 by blocks, or not."""
    if "input_scale" not in parts:
        return values
    scale, rows = parts["input_scale"][expert], values.float()
    if format == "fp8":
        return e4m3(rows / scale).double() * scale.double()
    blocks = rows.unflatten(1, (-1, 16))
    block = e4m3(blocks.abs().amax(2, keepdim=True) / (6 * scale)) * scale
    ratio = blocks / torch.where(block == 0, 1, block)
    magnitude = ratio.abs().clamp(max=6)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))  # E2M1's
    codes = torch.copysign((magnitude / step).round() * step, ratio)
    return (codes.double() * block.double()).flatten(1)


def mixture(one: Layer, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over each token's experts in float64."""
    total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in ids.unique().tolist():
        rows, place = (ids == expert).nonzero(as_tuple=True)
        given = rounded(one.format, one.up, x[rows].double(), expert)
        hidden = torch.relu(given @ decoded(one.up, expert).mT).square()
        result = rounded(one.format, one.down, hidden, expert) @ decoded(one.down, expert).mT
        total.index_add_(0, rows, result * weights[rows, place, None].double())
    return total


def limit(format: str, dtype: torch.dtype) -> float:
    """1% with bfloat16, or where inputs are rounded, which may fall to the other side; else by the dtype."""
    if dtype == BFLOAT16 or "input_scale" in EXPERT_FORMATS[format][1]:
        return 1e-2
    return 1e-3 if dtype == FLOAT16 else 2e-5


def against_float64(
    device: str,
    format: str,
    tokens: int,
    sizes: Sizes,
    dtype: torch.dtype,
    products: str = "auto",
) -> Errors:
    """y, and whether a second call gives the same bits."""
    one = layer(device, format, sizes)
    g = torch.Generator(device).manual_seed(1)
    ids = torch.rand(tokens, sizes.experts, generator=g, device=device).topk(sizes.chosen).indices
    weights = torch.rand(tokens, sizes.chosen, generator=g, device=device)
    x = torch.randn(tokens, sizes.input, generator=g, device=device).to(dtype)
    y = one(x, ids, weights, products)
    error = relative_error(y, mixture(one, x, ids, weights))
    again = one(x, ids, weights, products)
    return [("y", error, limit(format, dtype)), ("repeat", unequal([again], [y]), 0)]


def products_cases(device: str) -> Iterator[Case]:
    """Each kind of products by its name: a prompt's tokens, and odd sizes with experts of few."""
    check = partial(against_float64, device, dtype=BFLOAT16)
    usual = (40, Sizes(8, 2, 64, 96)) if device == "cpu" else (1500, Sizes(64, 6, 1024, 2688))
    formats = {"decoded": tuple(EXPERT_FORMATS), "native": ("nvfp4",), "grouped": GROUPED}
    for products, theirs in formats.items():
        for format in theirs:
            for tokens, sizes in (usual, (77, Sizes(5, 3, 160, 224))):
                name = f"experts {format} {products} {tokens} tokens"
                yield Case(name, partial(check, format, tokens, sizes, products=products))


def cases(device: str) -> Iterator[Case]:
    """Every format at published widths with fewer experts; on a device Super's layer too."""
    small = device == "cpu"
    shape = (8, 2, 64, 96) if small else (64, 6, 1024, 2688)
    check = partial(against_float64, device)
    for format in EXPERT_FORMATS:
        name = f"experts {format}"
        for tokens in (1, 40) if small else (1, 8, 40, 200, 1500):
            real = partial(check, format, tokens, Sizes(*shape), BFLOAT16)
            yield Case(f"{name} {tokens} tokens {shape} bf16", real)
        yield Case(f"{name} odd sizes", partial(check, format, 77, Sizes(5, 3, 160, 224), BFLOAT16))
        for dtype in (FLOAT16, FLOAT32):
            yield Case(f"{name} {dtype}", partial(check, format, 50, Sizes(16, 4, 256, 352), dtype))
    yield from products_cases(device)
    if small:
        return
    super_layer = Sizes(512, 22, 1024, 2688)
    for format, tokens in (
        ("nvfp4", 1),
        ("nvfp4", 64),
        ("nvfp4", 2048),
        ("fp8", 64),
        ("w4a16", 256),
        ("bf16", 64),
    ):
        yield Case(f"experts Super {format} {tokens}", partial(check, format, tokens, super_layer, BFLOAT16))

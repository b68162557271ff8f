"""The reference model's routed experts through the operator, on the host library.

Against the loop over experts, and when the operator is used.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.norms import relative_error as error
from support.plugin_build import host_folder, needs_compiler
from torch import Tensor

from nemoquant.api import diff
from nemoquant.model import moe
from nemoquant.model.taps import identity
from nemoquant.ops import library
from nemoquant.ops.library import Kernels

pytestmark = [needs_compiler, pytest.mark.slow]

EXPERTS, CHOSEN, SIZE, WIDTH, TOKENS = 7, 3, 64, 96, 11


class Counting(Kernels):
    """The host library; it also records the number of experts of each call."""

    def __init__(self) -> None:
        super().__init__(host_folder() / "libnemoquant_host.so")
        self.calls: list[int] = []

    def call(self, op: str, **arguments: Any) -> None:  # type: ignore[override]
        if op == "routed_experts":
            self.calls.append(arguments["experts"])
        super().call(op, **arguments)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """Sends tensors of the CPU to the host library."""
    made = Counting()
    monkeypatch.setattr(library, "_used", {"cpu": made})
    return made


def weights(dtype: torch.dtype = torch.bfloat16, size: int = SIZE, width: int = WIDTH) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    made = {}
    for expert in range(EXPERTS):
        made[f"experts.{expert}.up_proj.weight"] = (torch.randn(width, size, generator=g) / size**0.5).to(
            dtype
        )
        made[f"experts.{expert}.down_proj.weight"] = (torch.randn(size, width, generator=g) / width**0.5).to(
            dtype
        )
    return made


def tokens(among: tuple[int, ...] = tuple(range(EXPERTS)), size: int = SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and factors; ids are drawn from ``among``."""
    g = torch.Generator().manual_seed(1)
    ids = torch.stack(
        [torch.tensor(among)[torch.randperm(len(among), generator=g)[:CHOSEN]] for _ in range(TOKENS)]
    )
    return torch.randn(TOKENS, size, generator=g), ids, torch.rand(TOKENS, CHOSEN, generator=g) + 0.1


def by_definition(given: dict[str, Tensor], x: Tensor, ids: Tensor, factors: Tensor) -> Tensor:
    """Token by token in float64."""
    total = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for expert, factor in zip(ids[t].tolist(), factors[t].tolist(), strict=True):
            up, down = (given[f"experts.{expert}.{p}_proj.weight"].double() for p in ("up", "down"))
            total[t] += factor * (down @ torch.relu(up @ x[t].double()).square())
    return total


@pytest.mark.parametrize(
    ("experts_a_slab", "among", "calls"),
    [
        (100, tuple(range(EXPERTS)), [7]),
        (3, tuple(range(EXPERTS)), [3, 3, 1]),  # a token's experts are in several slabs
        (1, (1, 3, 4, 6), [1] * 4),
        (100, (1, 3, 4, 6), [4]),  # experts that no token chose are not loaded
        (2, (0, 5, 6), [2, 1]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slabs_against_float64(
    dtype: torch.dtype,
    experts_a_slab: int,
    among: tuple[int, ...],
    calls: list[int],
    served: Counting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """float32: error at most twice that of the loop; bfloat16: not above the loop's.

    In bfloat16 each slab's sum is rounded once, the loop rounds each product.
    """
    given, (x, ids, factors) = weights(), tokens(among)
    x = x.to(dtype)
    looked_up: list[str] = []

    class Recording(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            looked_up.append(name)
            return super().__getitem__(name)

    monkeypatch.setattr(moe, "SLAB_BYTES", experts_a_slab * 4 * SIZE * WIDTH)
    found = moe.routed_experts(Recording(given), x, ids, factors, identity)
    assert served.calls == calls
    assert {int(name.split(".")[1]) for name in looked_up} == set(ids.flatten().tolist())
    assert found.dtype == dtype
    served.calls.clear()
    loop = moe.routed_experts(given, x, ids, factors, lambda name, x: x)
    assert served.calls == []
    wanted = by_definition(given, x, ids, factors)
    assert error(found, wanted) < 2 * error(loop, wanted)


@pytest.mark.parametrize(
    ("why", "given"),
    [
        ("float32 weights would be rounded", weights(torch.float32)),
        (
            "one expert of another dtype",
            weights() | {"experts.4.down_proj.weight": weights(torch.float32)["experts.4.down_proj.weight"]},
        ),
        ("a width that it does not take", weights(width=80)),
        ("an input that it does not take", weights(size=48)),
    ],
)
def test_what_does_not_fit_goes_through_the_loop(
    why: str, given: dict[str, Tensor], served: Counting
) -> None:
    x, ids, factors = tokens(size=given["experts.0.up_proj.weight"].shape[1])
    found = moe.routed_experts(given, x, ids, factors, identity)
    assert served.calls == [], why
    assert error(found, by_definition(given, x, ids, factors)) < 1e-6


def test_no_token_is_no_call(served: Counting) -> None:
    x, ids, factors = tokens()
    assert moe.routed_experts(weights(), x[:0], ids[:0], factors[:0], identity).shape == (0, SIZE)
    assert served.calls == []


def test_a_diff_through_the_kernels(
    make_checkpoint: Callable[..., Path], token_rows: Path, served: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides use the same path where nothing is rounded, so a model against itself has no error at all.

    Its perplexity equals torch's.
    """
    source = make_checkpoint(moe_intermediate_size=64)
    options: dict[str, Any] = {"data": token_rows, "threads": 1, "card": False}
    found = diff(source, [source], **options)
    assert set(served.calls) == {8}
    assert found.candidates[0].logits.kl.max == 0
    assert all(layer.stream.relative == layer.alone.relative == 0 for layer in found.candidates[0].layers)
    monkeypatch.setattr(library, "_used", {})
    plain = diff(source, [source], **options)
    assert found.reference.perplexity == pytest.approx(plain.reference.perplexity, rel=1e-5)
    assert found.reference.perplexity != plain.reference.perplexity, "other kernels, other rounding"

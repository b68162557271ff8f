"""Every matrix product goes through its tap: names, shapes, and the tap's result is what gets multiplied."""

import pytest
import torch
from support.small_model import random_weights, small_config, source
from torch import Tensor

from nemoquant.model.moe import route
from nemoquant.model.reference import ReferenceModel
from nemoquant.model.taps import product

CONFIG, _ = small_config()
WEIGHTS = random_weights(CONFIG)
IDS = torch.randint(0, 96, (2, 21), generator=torch.Generator().manual_seed(3))
NO_PRODUCT = ("norm.weight", "norm_f.weight", "layernorm.weight", "conv1d.weight", "embeddings.weight")
NO_PRODUCT += ("enorm.weight", "hnorm.weight", "gate.weight")
PRODUCTS = [
    n.removesuffix(".weight") for n in WEIGHTS if n.endswith(".weight") and not n.endswith(NO_PRODUCT)
]
TAPPED = [n.removesuffix(".weight") for n in WEIGHTS if n.endswith("gate.weight")]


def run(weights: dict[str, Tensor], tap=None) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """Logits of the main model and of its MTP module."""
    model = ReferenceModel(CONFIG, source(weights))
    hidden, _ = model.hidden(IDS, tap=tap)
    return model.logits(hidden, tap), model.mtp_forward(IDS.roll(-1, 1), hidden, tap=tap)[0]


def record() -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> Tensor:
        assert name == "lm_head" or name not in seen, f"{name} is tapped twice"
        seen[name] = x.clone()
        return x

    run(WEIGHTS, keep)
    return seen


def test_names_are_the_modules_and_nothing_else() -> None:
    seen = record()
    caches = {f"{n}.output" for n in PRODUCTS if n.endswith(("k_proj", "v_proj"))}
    assert set(seen) == {*PRODUCTS, *TAPPED, *caches}
    for name in PRODUCTS:
        assert seen[name].ndim == 2
        assert seen[name].shape[1] == WEIGHTS[name + ".weight"].shape[1], name
        if ".experts." not in name:
            assert seen[name].shape[0] == IDS.numel(), name
    for name in caches:
        assert seen[name].shape == (2, CONFIG.num_key_value_heads, 21, CONFIG.head_dim)


def test_rows_of_experts_are_the_tokens_that_chose_them() -> None:
    seen = record()
    for gate in TAPPED:
        mixer = gate.removesuffix("gate")
        ids, _ = route(CONFIG, source(WEIGHTS)(mixer), seen[gate])
        for expert in range(CONFIG.n_routed_experts):
            chosen = (ids == expert).any(1)
            for projection in ("up_proj", "down_proj"):
                assert seen[f"{mixer}experts.{expert}.{projection}"].shape[0] == int(chosen.sum())
            latent = seen[mixer + "fc1_latent_proj"] @ WEIGHTS[mixer + "fc1_latent_proj.weight"].mT
            torch.testing.assert_close(
                seen[f"{mixer}experts.{expert}.up_proj"], latent[chosen]
            )  # torch's defaults for float32


@pytest.mark.parametrize("name", PRODUCTS + TAPPED)
def test_what_the_tap_returns_is_multiplied(name: str) -> None:
    """Twice the input equals, to the bit, twice the weight; both differ from the unchanged model."""

    def double(module: str, x: Tensor) -> Tensor:
        return x * 2 if module == name else x

    by_tap, by_weight = (
        run(WEIGHTS, double),
        run({**WEIGHTS, name + ".weight": WEIGHTS[name + ".weight"] * 2}),
    )
    assert all(torch.equal(a, b) for a, b in zip(by_tap, by_weight, strict=True))
    assert not torch.equal(by_tap[1], run(WEIGHTS)[1])


@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
def test_cached_values_are_what_the_tap_returned(projection: str) -> None:
    name = f"backbone.layers.1.mixer.{projection}"

    def double(module: str, x: Tensor) -> Tensor:
        return x * 2 if module == name + ".output" else x

    doubled = {**WEIGHTS, name + ".weight": WEIGHTS[name + ".weight"] * 2}
    for a, b in zip(run(WEIGHTS, double), run(doubled), strict=True):
        assert torch.equal(a, b)
    model, part = ReferenceModel(CONFIG, source(WEIGHTS)), []
    _, state = model.forward(IDS[:, :20], tap=double)
    model.forward(
        IDS[:, 20:],
        state,
        tap=lambda n, x: (part.append((n, x.shape[2])) if n.endswith(".output") else None) or x,
    )
    assert ("backbone.layers.1.mixer.k_proj.output", 1) in part  # new positions only
    attribute = "key" if projection == "k_proj" else "value"
    tapped = getattr(state.layers[1], attribute)
    plain = getattr(model.forward(IDS[:, :20])[1].layers[1], attribute)
    assert torch.equal(tapped, plain * 2)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_rows_changes_no_row(count: int, dtype: torch.dtype) -> None:
    """bfloat16 rows are padded for the kernel, which must change no result.

    Sums are exact, so that any order gives the same bits.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (count, 32), generator=g).to(dtype)
    weight = torch.randint(-2, 3, (8, 32), generator=g).to(dtype)
    y = product(x, weight)
    assert y.dtype == dtype
    assert y.shape == (count, 8)
    assert y.double().equal(x.double() @ weight.double().mT)

"""Gradients through a layer: against the reference's own differences, and against transformers' autograd."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.norms import relative_error as relative
from support.small_model import random_weights, small_config, transformers_model
from torch import Tensor

from nemoquant.model.gradients import MIXERS, layer_gradient, layer_output
from nemoquant.model.kinds import KINDS
from nemoquant.model.reference import layer_forward
from nemoquant.model.taps import Scope, Weights

CHANGES = [
    pytest.param({}, id="base"),
    pytest.param({"moe_latent_size": None, "norm_topk_prob": False}, id="no latent size"),
    pytest.param({"n_group": 4, "topk_group": 2, "num_key_value_heads": 1}, id="groups of experts"),
    pytest.param({"n_groups": 6, "use_conv_bias": False}, id="no bias"),
]


def ignore(name: str, gradient: Tensor) -> None:
    pass


def layers(config: Any) -> list[tuple[int, str, str]]:
    return [(i, kind, f"backbone.layers.{i}.") for i, kind in enumerate(config.layers)]


def inputs(config: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows of more than two chunks of the scan, and a gradient at the output."""
    g = torch.Generator().manual_seed(3)
    x, back = (torch.randn(2, 150, config.hidden_size, generator=g) for _ in range(2))
    return x.to(dtype), back.to(dtype)


def slope_of(loss: Callable[[float], float]) -> float:
    step = 3e-3
    return (loss(step) - loss(-step)) / (2 * step)


def test_every_kind_has_one() -> None:
    assert list(MIXERS) == list(KINDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", CHANGES)
def test_it_computes_what_the_reference_computes(changes: dict[str, Any], dtype: torch.dtype) -> None:
    config, _ = small_config(**changes)
    weights = random_weights(config)
    for i, kind, prefix in layers(config):
        own, x = config.of_layer(i), inputs(config, dtype)[0]
        expected, _ = layer_forward(own, kind, Scope(weights, prefix), x)
        got = layer_output(own, kind, Scope(weights, prefix), x, ignore)
        assert got.dtype == dtype
        assert relative(got.float(), expected.float()) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("changes", CHANGES)
def test_gradients_are_differences_of_the_reference(changes: dict[str, Any]) -> None:
    """Along a direction: at the input, and at the output of each product, which a tap of weights moves."""
    config, _ = small_config(**changes)
    weights = random_weights(config)
    for bias in (w for name, w in weights.items() if name.endswith("e_score_correction_bias")):
        bias += 10 * torch.arange(len(bias))  # the same experts before and after a step
    for i, kind, prefix in layers(config):
        own, scope, (x, back) = config.of_layer(i), Scope(weights, prefix), inputs(config)
        seen: dict[str, Tensor] = {}
        found = layer_gradient(own, kind, scope, x, back, seen.__setitem__)
        along = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))

        def loss(x: Tensor, weights: Weights, own=own, kind=kind, back=back, prefix=prefix) -> float:
            return float((layer_forward(own, kind, Scope(weights, prefix), x)[0].double() * back).sum())

        def at_input(by: float, x=x, along=along, loss=loss) -> float:
            return loss(x + by * along, weights)

        assert slope_of(at_input) == pytest.approx(float((found.double() * along).sum()), rel=2e-2, abs=0.05)

        # A change of the weight moves the output by x' times it: so sums over tokens of g x' are tested.
        shown: dict[str, Tensor] = {}

        def tap(name: str, x: Tensor, shown=shown) -> Tensor:
            shown[name] = x
            return x

        layer_forward(own, kind, scope, x, None, tap)
        products = [name for name in shown if f"{name}.weight" in scope and not name.endswith("gate")]
        assert set(seen) == set(products)
        for name in products[:4] + products[-3:]:
            weight = scope[f"{name}.weight"]
            change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)) * weight.std()

            def moved(by: float, full=f"{prefix}{name}.weight", change=change, x=x, loss=loss) -> float:
                return loss(x, weights | {full: weights[full] + by * change})

            slope = slope_of(moved)
            expected = float(((seen[name].double().T @ shown[name].double()) * change).sum())
            assert expected == pytest.approx(slope, rel=2e-2, abs=0.05)


def test_bf16_weights_and_gradients_are_those_of_float32_but_for_rounding() -> None:
    config, _ = small_config()
    weights = {name: w.bfloat16() for name, w in random_weights(config).items()}
    for i, kind, prefix in layers(config):
        own, scope = config.of_layer(i), Scope(weights, prefix)
        whole = layer_gradient(own, kind, scope, *inputs(config), ignore)
        x, back = inputs(config, torch.bfloat16)
        half = layer_gradient(own, kind, scope, x, back, ignore)
        assert half.dtype == torch.bfloat16
        assert relative(half.float(), whole) < 0.1  # a token may choose another expert


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("changes", CHANGES)
def test_gradients_are_those_of_transformers(changes: dict[str, Any]) -> None:
    """Through the whole model, at the stream before each layer and at the output of every product."""
    config, raw = small_config(**changes)
    weights = random_weights(config)
    ids = torch.randint(0, 96, (2, 41), generator=torch.Generator().manual_seed(1))
    model = transformers_model(raw, config, weights).eval()
    blocks = model.model.layers
    outputs: dict[str, list[Tensor]] = {}
    before: dict[int, Tensor] = {}

    def keep(name: str):
        def hook(_module: Any, _args: Any, output: Tensor) -> None:
            outputs.setdefault(name, []).append(output)

        return hook

    def keep_input(i: int):
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            before[i] = args[0] if args else kwargs["hidden_states"]

        return hook

    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(keep_input(i), with_kwargs=True)
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(keep(f"{i}.{name}"))
    last: list[Tensor] = []
    model.model.norm_f.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    loss = model(ids, use_cache=False).logits.float().logsumexp(-1).sum()
    names = list(outputs)
    found = torch.autograd.grad(
        loss,
        [last[-1], *(before[i] for i in range(len(blocks))), *(outputs[n][-1] for n in names)],
    )
    gradient, streams = found[0], found[1 : 1 + len(blocks)]
    theirs = dict(zip(names, found[1 + len(blocks) :], strict=True))
    for i, kind, prefix in reversed(layers(config)):
        seen: dict[str, Tensor] = {}
        x = before[i].detach()
        gradient = layer_gradient(
            config.of_layer(i), kind, Scope(weights, prefix), x, gradient, seen.__setitem__
        )
        assert relative(gradient, streams[i]) < 1e-4
        for name, g in seen.items():
            if "experts." not in name or "shared" in name:  # theirs of routed experts are no modules
                assert relative(g, theirs[f"{i}.{name}"].reshape(g.shape)) < 1e-4

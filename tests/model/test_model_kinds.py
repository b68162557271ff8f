"""The records of layer kinds: that they agree with the tensors, with torch, and with each other."""

from dataclasses import astuple
from typing import Any, get_args

import pytest
import torch
from support.small_model import mixer_weights, small_config

from nemoquant.model import names
from nemoquant.model.config import LayerKind
from nemoquant.model.kinds import KINDS, kv_values_per_token, ssm_state_bytes
from nemoquant.model.kinds.record import PAST
from nemoquant.model.reference import BLOCKS, layer_forward

ALL: tuple[LayerKind, ...] = get_args(LayerKind)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"moe_latent_size": None},
    {"n_shared_experts": 0},
    {"use_conv_bias": False},
]


def test_every_kind_has_a_record_and_a_block() -> None:
    assert tuple(KINDS) == tuple(BLOCKS) == ALL


def test_no_letter_spelling_or_role_is_of_two_kinds() -> None:
    for words in (
        [kind.letter for kind in KINDS.values()],
        [*ALL, *(word for kind in KINDS.values() for word in kind.spellings)],
        [role for kind in KINDS.values() for role in (*kind.linear, *kind.other)],
    ):
        assert len(words) == len(set(words))


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("kind", ALL)
def test_projections_are_the_modules_whose_roles_are_linear(kind: LayerKind, changes: dict[str, Any]) -> None:
    config, record = small_config(**changes)[0], KINDS[kind]
    entries = list(record.tensors(config))
    modules = [f"mixer.{e.name.removesuffix('.weight')}" for e in entries if e.role in record.linear]
    linear = {names.stack_of(module) for module in modules}
    assert {f"mixer.{projection}" for projection in record.projections(config)} == linear
    assert {e.role for e in entries} - set(record.linear) <= {*record.other, "norm"}
    first = {names.member(projection, 0) for projection in record.projections(config)}
    assert first <= {e.name.removesuffix(".weight") for e in entries}


@pytest.mark.parametrize("kind", ALL)
def test_states_are_those_that_torch_keeps(kind: LayerKind) -> None:
    config, _ = small_config()
    weights = mixer_weights(config, kind, torch.Generator().manual_seed(0))
    named = {f"mixer.{name}": w for name, w in weights.items()} | {"norm.weight": torch.ones(64)}
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    _, state = layer_forward(config, kind, named, x)
    assert isinstance(state, BLOCKS[kind].state)
    kept = () if state is None else astuple(state)
    expected = KINDS[kind].states(config)
    assert [tuple(t.shape) for t in kept] == [
        (2, *(5 if size == PAST else size for size in tensor.shape)) for tensor in expected
    ]
    assert [t.dtype for t in kept] == [
        torch.float32 if tensor.dtype == "float32" else torch.bfloat16 for tensor in expected
    ]


def test_a_state_of_another_kind_is_refused() -> None:
    config, _ = small_config()
    weights = mixer_weights(config, "mlp", torch.Generator().manual_seed(0))
    named = {f"mixer.{name}": w for name, w in weights.items()} | {"norm.weight": torch.ones(64)}
    with pytest.raises(AssertionError):
        layer_forward(config, "mlp", named, torch.ones(1, 1, 64), ())  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_state_figures_by_hand(dtype: str, item: int) -> None:
    """Two attention layers with 2 heads of 16 for K and for V; two Mamba-2 layers with 6 heads of 8 by 16."""
    config, _ = small_config(mamba_ssm_cache_dtype=dtype)
    assert kv_values_per_token(config) == 2 * 2 * (2 * 16)
    assert ssm_state_bytes(config) == 2 * (6 * 8 * 16) * item

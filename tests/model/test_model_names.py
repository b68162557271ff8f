"""Published names, built and read back."""

import pytest

from nemoquant.model import names

UP = "backbone.layers.5.mixer.experts.17.up_proj"


def test_names_are_the_published_ones() -> None:
    assert names.layer(3) + names.MIXER + "o_proj" == "backbone.layers.3.mixer.o_proj"
    assert names.mtp_layer(1) + names.MIXER + names.ROUTER == "mtp.layers.1.mixer.gate"
    assert names.layer(5) + names.MIXER + names.member(names.stack("up_proj"), 17) == UP
    assert (names.head(tied=True), names.head(tied=False)) == ("backbone.embeddings", "lm_head")
    assert names.kv_projections(7) == ["backbone.layers.7.mixer.k_proj", "backbone.layers.7.mixer.v_proj"]


@pytest.mark.parametrize("module", ["shared_experts.up_proj", "up_proj", "fc1_latent_proj"])
def test_a_module_that_is_no_stack_stands_for_itself(module: str) -> None:
    assert not names.is_stack(module)
    assert names.member(module, 3) == module


def test_reading_an_experts_name() -> None:
    assert names.stack_of(UP) == "backbone.layers.5.mixer.experts.up_proj"
    assert names.experts_of(UP) == "backbone.layers.5.mixer.experts"
    assert names.mixer_of("mtp.layers.0.mixer.q_proj") == "mtp.layers.0.mixer."
    assert names.expert_number(UP, "up_proj") == 17
    assert names.expert_number(UP, "down_proj") is None


@pytest.mark.parametrize(
    "module",
    ["backbone.layers.5.mixer.shared_experts.up_proj", "backbone.layers.17.mixer.up_proj", "lm_head"],
)
def test_other_modules_are_no_experts(module: str) -> None:
    assert names.stack_of(module) == module
    assert names.expert_number(module, "up_proj") is None
    with pytest.raises(AssertionError, match="is no expert's"):
        names.experts_of(module)

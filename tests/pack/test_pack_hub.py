"""The head of the model card, read again by the hub's own library."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from nemoquant.model.parse import load_config
from nemoquant.pack.hub import head, source_id, with_results


@pytest.fixture
def opened(make_checkpoint):
    def open_at(place: str, card: str | None = None, **config) -> tuple[Path, dict[str, Any]]:
        folder: Path = make_checkpoint(place, **config)
        if card is not None:
            (folder / "README.md").write_text(card)
        return folder, load_config(folder)[1]

    return open_at


def test_a_source_without_a_card(opened) -> None:
    data = ModelCard(head(*opened("plain"), "vllm", {"b", "a"}) + "# T\n").data.to_dict()
    assert data == {"library_name": "vllm", "pipeline_tag": "text-generation", "tags": ["a", "b"]}


def test_the_licence_and_the_name_of_a_source(opened) -> None:
    theirs = (
        "---\nlicense: other\nlicense_name: 'made-up'\nlicense_link: >-\n  x\ntags:\n- a\n---\nlicense: mit\n"
    )
    source = opened("named", theirs, _name_or_path="maker/Model-1")
    data = ModelCard(head(*source, "vllm", set())).data.to_dict()
    assert data["base_model"] == "maker/Model-1" and data["base_model_relation"] == "quantized"
    assert (data["license"], data["license_name"]) == ("other", "made-up")


def test_what_is_decoded_is_not_called_quantized(opened) -> None:
    source = opened("named", _name_or_path="maker/Model-1")
    data = ModelCard(head(*source, "transformers", {"a"}, None)).data.to_dict()
    assert data["base_model"] == "maker/Model-1" and "base_model_relation" not in data


def test_a_name_from_the_hubs_cache(opened) -> None:
    source = opened("models--maker--Model-2/snapshots/0a1b")
    assert source_id(*source) == "maker/Model-2"
    assert source_id(*opened("x", _name_or_path="/home/me/model")) is None


HEADS = ("---\nlicense: " + "x" * 300 + "\n---\n", "license: mit", "---\nlicense: \x1b[1m\n---\n", "---\n")


@pytest.mark.parametrize("card", HEADS)
def test_a_licence_that_can_not_be_taken(card, opened) -> None:
    assert "license" not in ModelCard(head(*opened("odd", card), "vllm", {"a"})).data.to_dict()


def test_values_can_not_leave_their_place(opened) -> None:
    source = opened("sly", "---\nlicense: 'x: [y'\n---\n")
    assert ModelCard(head(*source, "vllm", {"a"})).data.license == "x: [y"


def test_results_take_the_place_of_earlier_ones(opened) -> None:
    text = head(*opened("plain"), "vllm", {"a"}) + "# T\n\n- a line\n"
    once = with_results(text, "m", "data.txt", [("kl_divergence", "KL", 0.5)])
    assert once is not None
    again = with_results(once, "m", "data.txt", [("kl_divergence", "KL", 0.25), ("perplexity", "P", 2.0)])
    assert again is not None and again.endswith("---\n# T\n\n- a line\n")
    found = ModelCard(again).data.eval_results
    assert [(each.metric_type, each.metric_value, each.dataset_name) for each in found] == [
        ("kl_divergence", 0.25, "data.txt"),
        ("perplexity", 2.0, "data.txt"),
    ]
    assert with_results("# no head\n", "m", "d", []) is None

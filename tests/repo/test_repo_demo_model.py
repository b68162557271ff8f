"""The demo model matches its manifest, and is good enough to test quantization with.

Every kind of block matters.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from support.places import CALIB, DEMO

from nemoquant.checkpoint.manifest import file_sha256
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.model.reference import ReferenceModel
from nemoquant.sources.source import open_source
from nemoquant.tokens.rows import load_rows

MANIFEST = json.loads((DEMO / "manifest.json").read_text())
SOURCE = open_source(DEMO)


@pytest.fixture(scope="module")
def model():
    return ReferenceModel(SOURCE.config, lambda prefix: LayerWeights(SOURCE.checkpoint, prefix))


@pytest.fixture(scope="module")
def rows():
    return torch.from_numpy(load_rows(CALIB / "data/evaluation.jsonl", DEMO, SOURCE.config, 8, 512).ids)


@pytest.fixture(scope="module")
def forward(model, rows):
    """Hidden states of the rows, and the experts that their tokens chose."""
    reached = set()

    def tap(name, x):
        if ".experts." in name:
            reached.add(name.rsplit(".", 1)[0])
        return x

    return model.hidden(rows, tap=tap)[0], reached


def percent(text: str) -> float:
    return float(text.removesuffix("%")) / 100


def test_files_are_those_that_were_measured():
    assert {name: file_sha256(DEMO / name) for name in MANIFEST["files"]} == MANIFEST["files"]


def test_it_is_small_and_has_every_kind_of_block():
    shards = list(DEMO.glob("*.safetensors"))
    assert len(shards) == 2 and sum(p.stat().st_size for p in DEMO.iterdir()) <= 20_000_000
    config = SOURCE.config
    assert set(config.layers) >= {"mamba", "moe", "attention"} and config.count("attention") >= 2
    assert config.num_key_value_heads < config.num_attention_heads
    assert (
        config.n_routed_experts >= 16
        and config.num_experts_per_tok == 4
        and config.moe_latent_size
        and config.n_shared_experts
    )
    assert config.mtp_layers == ("attention", "moe") and not config.tie_word_embeddings
    assert 2048 <= config.vocab_size <= 4096


def test_calibration_evaluation_and_training_share_no_work():
    data = json.loads((CALIB / "data/MANIFEST.json").read_text())
    calibration, evaluation = data["calibration.jsonl"], data["evaluation.jsonl"]
    assert not set(calibration["works"]) & set(evaluation["works"])
    for name in ("calibration.jsonl", "evaluation.jsonl"):
        assert file_sha256(CALIB / "data" / name) == data[name]["sha256"]
        works = {json.loads(line)["work"] for line in (CALIB / "data" / name).read_text().splitlines()}
        assert works <= set(data[name]["works"])


def test_perplexity_is_what_the_manifest_says(model, rows, forward):
    """Recomputed on eight of the rows; the manifest's figure is over all rows, so the two are only near."""
    logits = model.logits(forward[0])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), rows[:, 1:].flatten())
    claimed = MANIFEST["evaluation"]["perplexity"]
    assert loss.exp().item() == pytest.approx(claimed, rel=0.25)
    ngram = next(v for k, v in MANIFEST["evaluation"].items() if k.startswith("5-gram"))
    assert claimed < ngram


def test_every_block_matters():
    table = MANIFEST["perplexity without a block"]
    assert percent(table["routed experts of all layers"]["rise"]) >= 0.20
    singles = {k: percent(v["rise"]) for k, v in table.items() if "layer " in k}
    assert len(singles) == len(SOURCE.config.layers)
    assert {k: v for k, v in singles.items() if v < 0.01} == {}


def test_every_expert_gets_tokens(forward):
    _, reached = forward
    assert len(reached) == SOURCE.config.n_routed_experts * SOURCE.config.count("moe")
    assert min(min(counts) for counts in MANIFEST["tokens per expert, 32 calibration rows"].values()) > 0


def test_multi_token_prediction_is_far_above_chance(model, rows, forward):
    hidden, _ = forward
    logits, _, _ = model.mtp_forward(rows[:, 1:-1], hidden[:, :-2])
    right = (logits.argmax(-1) == rows[:, 2:]).double().mean().item()
    likeliest = (torch.bincount(rows[:, 2:].flatten()).max() / rows[:, 2:].numel()).item()
    assert right > 3 * likeliest, f"top-1 {right:.3f}, the likeliest token alone {likeliest:.3f}"


def test_some_heads_are_slower_than_the_floor_of_other_implementations():
    assert MANIFEST["mamba heads"]["below 0.001"] > 0

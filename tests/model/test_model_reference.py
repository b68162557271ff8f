"""Streaming, states, MTP and smaller promises of the reference model."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.norms import relative_error as relative
from support.small_model import mixer_weights, random_weights, small_config, source
from torch import Tensor

from nemoquant.model import taps
from nemoquant.model.moe import route, routed_experts
from nemoquant.model.norm import rms_norm
from nemoquant.model.reference import ReferenceModel, State, layer_forward

CONFIG, _ = small_config()
WEIGHTS = random_weights(CONFIG)
MODEL = ReferenceModel(CONFIG, source(WEIGHTS))
LENGTH = 75
IDS = torch.randint(0, 96, (2, LENGTH), generator=torch.Generator().manual_seed(5))
SPLIT = 1e-5  # the same sums in another order; measured: 1.1e-6 at most


def state_errors(got: State, expected: State) -> list[float]:
    pairs = [(g, e) for g, e in zip(got.layers, expected.layers, strict=True) if e is not None]
    return [relative(getattr(g, f.name), getattr(e, f.name)) for g, e in pairs for f in fields(e)]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=4))
def test_a_sequence_may_be_cut_anywhere(cuts: list[int]) -> None:
    check_cuts([0, *sorted(set(cuts)), LENGTH])


def test_token_by_token() -> None:
    check_cuts([0, 4, *range(5, LENGTH + 1)])


def check_cuts(edges: list[int]) -> None:
    """Logits and final states of parts against those of the whole; also for the MTP module."""
    hidden, state = MODEL.hidden(IDS)
    mtp, _, mtp_state = MODEL.mtp_forward(IDS.roll(-1, 1), hidden)
    logits, mtp_logits, at, mtp_at = [], [], None, None
    for start, end in itertools.pairwise(edges):
        part, at = MODEL.hidden(IDS[:, start:end], at)
        logits.append(MODEL.logits(part))
        following, _, mtp_at = MODEL.mtp_forward(IDS.roll(-1, 1)[:, start:end], part, mtp_at)
        mtp_logits.append(following)
    assert at is not None
    assert mtp_at is not None
    assert relative(torch.cat(logits, 1), MODEL.logits(hidden)) < SPLIT
    assert relative(torch.cat(mtp_logits, 1), mtp) < SPLIT
    assert max(state_errors(at, state)) < SPLIT
    assert max(state_errors(mtp_at, mtp_state)) < SPLIT


def test_layers_by_hand_are_the_model() -> None:
    """As in calibration: hidden states are kept outside; each layer in turn takes the rows one by one."""
    rows = [MODEL.embed(row[None]) for row in IDS]
    for i, kind in enumerate(CONFIG.layers):
        layer = source(WEIGHTS)(f"backbone.layers.{i}.")
        kept = [row.clone() for row in rows]
        rows, old = [layer_forward(CONFIG, kind, layer, row)[0] for row in rows], rows
        assert all(torch.equal(a, b) for a, b in zip(old, kept, strict=True))  # inputs are not changed
    expected, _ = MODEL.hidden(IDS)
    assert (
        relative(rms_norm(torch.cat(rows), WEIGHTS["backbone.norm_f.weight"], CONFIG.norm_eps), expected)
        < SPLIT
    )


def test_last_only() -> None:
    logits, _ = MODEL.forward(IDS)
    last, _ = MODEL.forward(IDS, last_only=True)
    assert last.shape == (2, 1, 96)
    assert relative(last, logits[:, -1:]) < SPLIT


def test_tied_embeddings() -> None:
    config, _ = small_config(tie_word_embeddings=True)
    weights = {name: w for name, w in WEIGHTS.items() if name != "lm_head.weight"}
    tied, _ = ReferenceModel(config, source(weights)).forward(IDS)
    same, _ = ReferenceModel(
        CONFIG, source({**weights, "lm_head.weight": weights["backbone.embeddings.weight"]})
    ).forward(IDS)
    assert torch.equal(tied, same)


def test_weights_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 weights, float32 compute: converted at once or in slices, only the order of sums differs."""
    half = ReferenceModel(CONFIG, source({name: w.bfloat16() for name, w in WEIGHTS.items()}))
    whole, _ = half.forward(IDS)
    monkeypatch.setattr(taps, "CAST_ELEMENTS", 700)
    slices, _ = half.forward(IDS)
    assert relative(slices, whole) < SPLIT


class Watched(Mapping[str, Tensor]):
    """Weights that record which names were read."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights, self.read = weights, []

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("listing the weights of a layer may be slow")

    def __len__(self) -> int:
        return len(self.weights)


def test_an_expert_without_tokens_is_neither_read_nor_tapped() -> None:
    weights, seen = {"norm.weight": torch.ones(64)}, []
    weights |= {
        f"mixer.{n}": w for n, w in mixer_weights(CONFIG, "moe", torch.Generator().manual_seed(0)).items()
    }
    weights["mixer.gate.e_score_correction_bias"] = torch.tensor([0.0, 9, 0, 9, 0, 0, 9, 0])
    watched = Watched(weights)
    layer_forward(
        CONFIG, "moe", watched, torch.randn(1, 5, 64), None, lambda name, x: (seen.append(name), x)[1]
    )
    assert {n.split(".")[2] for n in watched.read if ".experts." in n} == {"1", "3", "6"}
    assert {n.split(".")[2] for n in seen if ".experts." in n} == {"1", "3", "6"}
    assert len(watched.read) == len(set(watched.read))  # each once


def test_router_by_hand() -> None:
    """Scores by sigmoid, choice by score plus bias, weights by score alone.

    The two groups with the best pairs stay open.
    """
    config, _ = small_config(n_group=4, topk_group=2, num_experts_per_tok=2, hidden_size=8)
    logits = torch.tensor([[3.0, -4.0, 1.0, 1.0, 0.5, 0.4, 0.0, -1.0]])
    weights = {
        "gate.weight": torch.eye(8),
        "gate.e_score_correction_bias": torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 0.9]),
    }
    # pairs: .953 + .018 = .971 | .731 + .731 = 1.462 | .622 + .599 = 1.221 | .5 + .269 + .9 = 1.669: groups 1
    # and 3 are open. In them: .731 .731 .5 and .269 + .9: experts 7 and 2 or 3
    ids, factors = route(config, weights, logits)
    chosen = dict(zip(ids[0].tolist(), factors[0].tolist(), strict=True))
    assert 7 in chosen
    assert set(chosen) <= {2, 3, 7}
    low, high = (
        1 / (1 + 2.718281828**1),
        1 / (1 + 2.718281828**-1),
    )  # sigmoid of -1 and of 1, which add up to 1
    assert chosen[7] == pytest.approx(2.5 * low, rel=1e-6)
    assert sum(chosen.values()) == pytest.approx(2.5 * (low + high), rel=1e-6)


def test_routed_experts_by_hand() -> None:
    """Token by token in float64; a float32 sum of a few terms is exact to 1e-6."""
    g = torch.Generator().manual_seed(0)
    weights = mixer_weights(CONFIG, "moe", g)
    x = torch.randn(33, CONFIG.moe_latent_size, generator=g)
    ids = torch.stack([torch.randperm(8, generator=g)[:3] for _ in range(33)])
    factors = torch.rand(33, 3, generator=g)
    expected = torch.zeros_like(x, dtype=torch.float64)
    for t, k in itertools.product(range(33), range(3)):
        expected[t] += factors[t, k].double() * dense(x[t].double(), weights, f"experts.{ids[t, k]}.")
    assert relative(routed_experts(weights, x, ids, factors, taps.identity), expected) < 1e-6


def dense(x: Tensor, weights: Mapping[str, Tensor], prefix: str) -> Tensor:
    wide = torch.clamp(weights[prefix + "up_proj.weight"].double() @ x, min=0) ** 2
    return weights[prefix + "down_proj.weight"].double() @ wide


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + CONFIG.norm_eps) * weight.double()


def plain_attention(w: Mapping[str, Tensor], xs: list[Tensor]) -> Tensor:
    """The last position's output, one head at a time."""
    size, per = CONFIG.head_dim, CONFIG.num_attention_heads // CONFIG.num_key_value_heads
    heads = []
    for h in range(CONFIG.num_attention_heads):
        own, shared = slice(h * size, (h + 1) * size), slice(h // per * size, (h // per + 1) * size)
        query = w["q_proj.weight"].double()[own] @ xs[-1]
        keys = torch.stack([w["k_proj.weight"].double()[shared] @ x for x in xs])
        values = torch.stack([w["v_proj.weight"].double()[shared] @ x for x in xs])
        heads.append(torch.softmax(keys @ query / size**0.5, 0) @ values)
    return w["o_proj.weight"].double() @ torch.cat(heads)


def plain_moe(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    scores = 1 / (1 + torch.exp(-(w["gate.weight"].double() @ x)))
    chosen = sorted(range(8), key=lambda e: -float(scores[e] + w["gate.e_score_correction_bias"][e]))[:3]
    latent = w["fc1_latent_proj.weight"].double() @ x
    mixed = (
        sum(scores[e] * dense(latent, w, f"experts.{e}.") for e in chosen)
        * 2.5
        / sum(scores[e] for e in chosen)
    )
    return w["fc2_latent_proj.weight"].double() @ mixed + dense(x, w, "shared_experts.")


def test_mtp_against_a_plain_float64_computation() -> None:
    """One position at a time: both norms, eh_proj, attention, experts, last norm, lm_head.

    The first norm's input is the embedding of the next token.
    """
    ids = IDS[:1, :12]
    hidden, _ = MODEL.hidden(ids)
    got, out, state = MODEL.mtp_forward(ids.roll(-1, 1), hidden)
    first, last = source(WEIGHTS)("mtp.layers.0."), source(WEIGHTS)("mtp.layers.1.")
    normed: list[Tensor] = []
    for t in range(12):
        embedded = WEIGHTS["backbone.embeddings.weight"][ids[0, (t + 1) % 12]].double()
        pair = [
            plain_norm(embedded, first["enorm.weight"]),
            plain_norm(hidden[0, t].double(), first["hnorm.weight"]),
        ]
        x = first["eh_proj.weight"].double() @ torch.cat(pair)
        normed.append(plain_norm(x, first["norm.weight"]))
        x = x + plain_attention(taps.Scope(first, "mixer."), normed)
        x = x + plain_moe(taps.Scope(last, "mixer."), plain_norm(x, last["norm.weight"]))
        x = plain_norm(x, last["final_layernorm.weight"])
        assert relative(out[0, t], x) < SPLIT, t
        assert relative(got[0, t], WEIGHTS["lm_head.weight"].double() @ x) < SPLIT, t
    assert [type(s).__name__ for s in state.layers] == ["KVState", "NoneType"]


def test_two_mtp_modules_have_their_own_layers() -> None:
    config, _ = small_config(num_nextn_predict_layers=2)
    weights, seen = random_weights(config), []
    model = ReferenceModel(config, source(weights))
    hidden, _ = model.hidden(IDS[:, :5])
    _, hidden, _ = model.mtp_forward(IDS[:, 1:6], hidden)
    model.mtp_forward(IDS[:, 2:7], hidden, module=1, tap=lambda name, x: (seen.append(name), x)[1])
    assert {name.split(".mixer")[0] for name in seen} == {
        "mtp.layers.2.eh_proj",
        "mtp.layers.2",
        "mtp.layers.3",
        "lm_head",
    }

"""Figures from logits: against the formulas in numpy, and by hand where a rule decides a case."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemoquant.evaluate import metrics
from nemoquant.evaluate.layers import routing
from nemoquant.evaluate.metrics import HISTOGRAM_EDGES, Positions, compare, shared, summarize, top, top1

# Both sides are float64. A log-probability of size 30 has an error of a few 2^-53 x 30 = 3e-15. The sum over
# the vocabulary adds as many roundings as it has terms. Measured: 4e-15 for log-probabilities and for KL.
FLOAT64 = 1e-12


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """By log-sum-exp, in float64."""
    x = logits.astype(np.float64)
    largest = x.max(-1, keepdims=True)
    return x - largest - np.log(np.exp(x - largest).sum(-1, keepdims=True))


def kl_of(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    p, q = log_softmax(reference), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(-1)


def random_logits(
    rows: int, length: int, vocabulary: int, models: int = 2, seed: int = 0
) -> list[np.ndarray]:
    """The reference's logits, and others that come nearer to it step by step."""
    rng = np.random.default_rng(seed)
    first = rng.standard_normal((rows, length, vocabulary)) * 6
    others = [first + rng.standard_normal(first.shape) * 10.0**-i for i in range(models - 1)]
    return [x.astype(np.float32) for x in (first, *others)]


def run(logits: list[np.ndarray], tokens: np.ndarray | None = None) -> list[Positions]:
    """All positions of [rows, length, vocabulary] at once; ``tokens`` [rows, length] are the real ones."""
    rows, length, vocabulary = logits[0].shape
    targets = np.zeros((rows, length), np.int64) if tokens is None else np.roll(tokens, -1, 1)
    out = [Positions(rows, length) for _ in logits]
    flat = [torch.from_numpy(np.ascontiguousarray(x.reshape(-1, vocabulary), np.float32)) for x in logits]
    compare(flat, torch.from_numpy(targets.reshape(-1)), out, 0)
    return out


def hand(*rows: list[float]) -> np.ndarray:
    """One row of positions with these logits."""
    return np.array([rows], np.float32)


# Against the formulas.


@pytest.mark.parametrize("shape", [(1, 2, 7), (3, 17, 96), (2, 5, 5000)])
def test_every_position(shape: tuple[int, int, int]) -> None:
    logits = random_logits(*shape, models=4)
    tokens = np.random.default_rng(1).integers(0, shape[2], shape[:2])
    out = run(logits, tokens)
    for model, found in zip(logits, out, strict=True):
        expected = -np.take_along_axis(log_softmax(model), np.roll(tokens, -1, 1)[..., None], -1)[..., 0]
        np.testing.assert_allclose(found.nll, expected, rtol=FLOAT64, atol=FLOAT64)
    for model, found in zip(logits[1:], out[1:], strict=True):
        np.testing.assert_allclose(found.kl, kl_of(logits[0], model), rtol=0, atol=FLOAT64)
        np.testing.assert_array_equal(found.top1_same, logits[0].argmax(-1) == model.argmax(-1))
        best, own = (np.argsort(-x, -1)[..., :5] for x in (logits[0], model))
        count = (best[..., :, None] == own[..., None, :]).sum((-1, -2))
        np.testing.assert_array_equal(found.top5_same, count / 5)
    assert not out[0].kl.any()  # the reference has only one figure, nll


def test_the_summary() -> None:
    logits = random_logits(3, 40, 96)
    tokens = np.random.default_rng(1).integers(0, 96, (3, 40))
    reference, found = run(logits, tokens)
    result = summarize(found, reference)
    kl = kl_of(*logits)[:, :-1]
    nll = [
        -np.take_along_axis(log_softmax(x), np.roll(tokens, -1, 1)[..., None], -1)[:, :-1].mean()
        for x in logits
    ]
    ordered = np.sort(kl.ravel())  # 117 values: the median is the 59th, and 0.99 x 116 = 114.84
    assert result.kl.mean == pytest.approx(kl.mean(), rel=FLOAT64)
    assert result.kl.median == pytest.approx(ordered[58], rel=FLOAT64)
    assert result.kl.p99 == pytest.approx(ordered[114] + 0.84 * (ordered[115] - ordered[114]), rel=FLOAT64)
    assert result.kl.max == pytest.approx(ordered[-1], rel=FLOAT64)
    assert reference.perplexity == pytest.approx(math.exp(nll[0]), rel=FLOAT64)
    assert result.perplexity == pytest.approx(math.exp(nll[1]), rel=FLOAT64)
    assert result.perplexity_ratio == pytest.approx(math.exp(nll[1] - nll[0]), rel=FLOAT64)
    assert result.top1_agreement == (logits[0].argmax(-1) == logits[1].argmax(-1))[:, :-1].mean()
    best, own = (np.argsort(-x, -1)[:, :-1, :5] for x in logits)
    count = (best[..., :, None] == own[..., None, :]).sum((-1, -2))
    assert result.top5_agreement == pytest.approx(count.mean() / 5, rel=FLOAT64)
    assert 0 < result.top1_agreement < 1
    assert 0 < result.top5_agreement < 1


def test_the_last_position_of_a_row_counts_nowhere() -> None:
    """It predicts a token that is not known. Its figures are made as bad as possible."""
    found, reference = Positions(2, 9), Positions(2, 9)
    for positions in (found, reference):
        positions.nll[:], positions.top1_same[:], positions.top5_same[:] = 1.0, 1.0, 1.0
    clean = summarize(found, reference)
    found.nll[:, -1], found.kl[:, -1], found.top1_same[:, -1], found.top5_same[:, -1] = 1e4, 50.0, 0.0, 0.0
    reference.nll[:, -1] = 1e4
    assert summarize(found, reference) == clean
    assert sum(clean.kl_histogram.counts) == 16
    assert clean.kl_by_position[-1].last == 7


# KL by hand.


def test_two_tokens() -> None:
    """KL of two short distributions, in both directions.

    p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 log 2 + 1/2 log 2/3 = log(2 / sqrt 3). The other direction: 3/4
    log 3 - log 2.
    """
    even, odd = hand([0.0, 0.0]), hand([0.0, math.log(3.0)])
    log3 = float(np.float32(math.log(3.0)))  # the logit is a float32: its rounding is 2^-25 of it, and of KL
    assert run([even, odd])[1].kl[0, 0] == pytest.approx(math.log(2 / math.sqrt(3)), rel=1e-6)
    assert run([odd, even])[1].kl[0, 0] == pytest.approx(0.75 * log3 - math.log(2), rel=1e-6)
    assert run([even, odd], np.array([[0]]))[1].nll[0, 0] == pytest.approx(math.log(4), rel=1e-6)
    assert run([even, odd], np.array([[1]]))[1].nll[0, 0] == pytest.approx(math.log(4 / 3), rel=1e-6)


def test_a_constant_on_all_logits_is_nothing() -> None:
    assert run([hand([1.0, 2.0, 3.0]), hand([101.0, 102.0, 103.0])])[1].kl[0, 0] < FLOAT64


def test_kl_of_equal_logits_is_exactly_zero() -> None:
    """At any scale, and where one token has all the probability."""
    for scale in (0.0, 1e-3, 1.0, 30.0, 1e4):
        logits = random_logits(2, 8, 300)[0] * np.float32(scale)
        assert not run([logits, logits.copy()])[1].kl.any()


def test_kl_is_never_negative() -> None:
    """Logits differ in their last bit: terms of 1e-11 add up to 1e-18, which rounding can make negative."""
    rng = np.random.default_rng(0)
    first = (rng.standard_normal((1, 2000, 50)) / 100).astype(np.float32)
    other = np.nextafter(first, first + rng.choice([-1, 1], first.shape).astype(np.float32))
    kl = run([first, other])[1].kl
    raw = kl_of(first, other)
    assert (raw < 0).any(), "no sum came out below zero, so that it tests nothing"
    assert (kl >= 0).all()
    assert (kl == 0).any()
    assert kl.max() < 1e-13


def test_a_token_that_the_candidate_rules_out_costs_what_it_is_worth() -> None:
    assert run([hand([0.0, 0.0]), hand([0.0, -1000.0])])[1].kl[0, 0] == pytest.approx(
        500 - math.log(2), rel=FLOAT64
    )


# Likeliest tokens.


def test_ties_go_to_the_lower_id() -> None:
    logits = torch.tensor(
        [[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [-1.0, -5.0, -1.0, -2.0], [0.0, -0.0, -1.0, 0.0]]
    )
    assert top1(logits).tolist() == [1, 0, 0, 0]
    assert top(logits, 2).tolist() == [[1, 2], [0, 1], [0, 2], [0, 1]]
    assert top(logits, 3).tolist() == [[0, 1, 2], [0, 1, 2], [0, 2, 3], [0, 1, 3]]


def test_a_tie_at_the_fifth_place() -> None:
    """Three tokens share the fifth place: the lowest id has it, wherever the better tokens stand."""
    reference = [1.0, 9.0, 1.0, 8.0, 7.0, 1.0, 6.0, 0.0]
    same_four = [0.0, 9.0, 1.0, 8.0, 7.0, 1.0, 6.0, 0.0]
    assert top(torch.tensor([reference, same_four]), 5).tolist() == [[0, 1, 3, 4, 6], [1, 2, 3, 4, 6]]
    assert run([hand(reference), hand(same_four)])[1].top5_same.tolist() == [[0.8]]
    assert run([hand(reference), hand(reference)])[1].top5_same.tolist() == [[1.0]]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_likeliest_of_many_ties(count: int) -> None:
    """Small integers, so that nearly every position has ties."""
    logits = np.random.default_rng(0).integers(0, 6, (500, 40)).astype(np.float32)
    expected = np.sort(np.argsort(-logits, -1, kind="stable")[:, :count], -1)
    np.testing.assert_array_equal(top(torch.from_numpy(logits), count), expected)
    if count == 1:
        np.testing.assert_array_equal(top1(torch.from_numpy(logits)), expected[:, 0])


def test_a_vocabulary_of_less_than_five() -> None:
    """All tokens are among the likeliest, and agree."""
    assert top(torch.tensor([[1.0, 2.0, 0.0]]), 5).tolist() == [[0, 1, 2]]
    reference, found = run([hand([1.0, 2.0, 0.0], [0.0, 0.0, 1.0]), hand([9.0, 2.0, 0.0], [0.0, 0.0, 1.0])])
    assert found.top5_same.tolist() == [[1.0, 1.0]]
    assert found.top1_same.tolist() == [[0.0, 1.0]]
    assert summarize(found, reference).top5_agreement == 1.0


def test_ids_in_common() -> None:
    a = np.array([[0, 1, 2], [4, 5, 6], [7, 2, 9], [1, 2, 3]])
    b = np.array([[2, 1, 0], [7, 8, 9], [9, 1, 0], [1, 2, 4]])
    assert shared(a, b).tolist() == [3, 0, 1, 2]
    assert shared(a[:0], b[:0]).tolist() == []


# Slices.


@pytest.mark.parametrize("elements", [1, 96, 97, 96 * 7, 96 * 50, 96 * 51])
def test_slices_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """51 positions of 96 tokens, in slices of 1, 7, 50 and all."""
    logits = random_logits(3, 17, 96, models=3)
    tokens = np.random.default_rng(1).integers(0, 96, (3, 17))
    whole = run(logits, tokens)
    monkeypatch.setattr(metrics, "SLICE_ELEMENTS", elements)
    for found, expected in zip(run(logits, tokens), whole, strict=True):
        for name in ("nll", "kl", "top1_same", "top5_same"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def test_parts_are_filled_where_they_belong() -> None:
    logits = random_logits(3, 17, 96)
    targets = torch.from_numpy(np.random.default_rng(1).integers(0, 96, 51))
    flat = [torch.from_numpy(x.reshape(51, 96)) for x in logits]
    whole, parts = ([Positions(3, 17), Positions(3, 17)] for _ in range(2))
    compare(flat, targets, whole, 0)
    for start, end in ((20, 51), (0, 20)):
        compare([x[start:end] for x in flat], targets[start:end], parts, start)
    for found, expected in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(found.kl, expected.kl)
        np.testing.assert_array_equal(found.nll, expected.nll)
        np.testing.assert_array_equal(found.top5_same, expected.top5_same)


# The summary's parts.


def filled(kl: np.ndarray) -> Positions:
    """Positions whose KL is ``kl`` [rows, predicted]; the last position of each row is added."""
    found = Positions(kl.shape[0], kl.shape[1] + 1)
    found.kl[:, :-1], found.kl[:, -1] = kl, 77.0
    return found


def test_the_histogram() -> None:
    """Up to the first edge: first bin. On an inner edge: the bin above. From the last edge on: last bin."""
    edges = HISTOGRAM_EDGES
    below = [math.nextafter(edge, 0) for edge in (edges[1], edges[-1])]
    values = [0.0, 1e-300, 1e-12, edges[0], edges[1], below[0], 1.0, 2.0, below[1], edges[-1], 1e5]
    histogram = summarize(filled(np.array([values])), Positions(1, 2)).kl_histogram
    expected = [0] * (len(edges) - 1)
    bin_of_one = edges.index(1.0)
    for i in (0, 0, 0, 0, 1, 0, bin_of_one, bin_of_one + 1, -1, -1, -1):
        expected[i] += 1
    assert histogram.counts == expected
    assert histogram.edges == edges
    assert (edges[0], edges[-1]) == (1e-9, 100.0)


def test_the_histogram_counts_every_position() -> None:
    kl = 10.0 ** np.random.default_rng(0).uniform(-14, 4, (5, 300))
    found = summarize(filled(kl), Positions(1, 2)).kl_histogram
    inner = np.array(found.edges[1:-1])  # numpy's own count, with open ends
    expected = [
        int(((kl >= low) & (kl < high)).sum())
        for low, high in zip([-1, *inner], [*inner, np.inf], strict=True)
    ]
    assert found.counts == expected
    assert sum(found.counts) == 1500


@pytest.mark.parametrize("predicted", [1, 2, 127, 128, 129, 511, 1000])
def test_ranges_of_positions_cover_each_once(predicted: int) -> None:
    kl = np.random.default_rng(0).random((3, predicted))
    ranges = summarize(filled(kl), Positions(1, 2)).kl_by_position
    assert [i for r in ranges for i in range(r.first, r.last + 1)] == list(range(predicted))
    assert len(ranges) == min(predicted, 128)
    sizes = {r.last - r.first + 1 for r in ranges}
    assert max(sizes) - min(sizes) <= 1
    for r in ranges:
        assert r.kl == pytest.approx(kl[:, r.first : r.last + 1].mean(), rel=FLOAT64)


@pytest.mark.parametrize(
    ("nll", "expected"),
    [
        (0.0, 1.0),
        (math.log(25.0), 25.0),
        (699.0, math.exp(699.0)),
        (700.0, None),
        (1e6, None),
        (math.inf, None),
        (math.nan, None),
    ],
)
def test_a_perplexity_that_is_no_number(nll: float, expected: float | None) -> None:
    found, reference = Positions(1, 3), Positions(1, 3)
    found.nll[:] = nll
    assert found.perplexity == (None if expected is None else pytest.approx(expected, rel=FLOAT64))
    assert summarize(found, reference).perplexity_ratio == (
        None if expected is None else pytest.approx(expected, rel=FLOAT64)
    )
    assert (summarize(reference, found).perplexity_ratio is None) == (expected is None)


def test_agreement_is_never_more_than_one() -> None:
    """The mean of many fifths that are all 1.0."""
    found = Positions(7, 1001)
    found.top1_same[:] = found.top5_same[:] = 1.0
    result = summarize(found, Positions(7, 1001))
    assert (result.top1_agreement, result.top5_agreement) == (1.0, 1.0)


# Experts.


@pytest.fixture
def experts() -> Callable[[int], SimpleNamespace]:
    return lambda count: SimpleNamespace(n_routed_experts=count)


def test_routing_by_hand(experts) -> None:
    """Four tokens, two of five experts each: the same, one other, both others, the same in another order."""
    reference = np.array([[0, 1], [0, 1], [0, 1], [2, 3]])
    candidate = np.array([[0, 1], [0, 2], [2, 3], [3, 2]])
    found = routing(experts(5), reference, candidate)
    assert found.flipped == 3 / 8
    assert found.tokens_with_flip == 2 / 4
    assert found.tokens_per_expert == [2, 1, 3, 2, 0]
    assert found.tokens_per_expert_reference == [3, 3, 1, 1, 0]


def test_the_same_routing_has_no_flip(experts) -> None:
    ids = np.sort(np.random.default_rng(0).permuted(np.tile(np.arange(16), (1000, 1)), axis=1)[:, :4], 1)
    found = routing(experts(16), ids, ids)
    assert (found.flipped, found.tokens_with_flip) == (0.0, 0.0)
    assert found.tokens_per_expert == found.tokens_per_expert_reference
    assert sum(found.tokens_per_expert) == 4000

"""Figures from logits: KL, perplexity, agreement.

Log-probabilities and sums are float64, for a slice of positions at a time.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemoquant.evaluate.schema import Histogram, Kl, Logits, PositionRange

SLICE_ELEMENTS = 1 << 22  # logits whose float64 log-probabilities are held at a time
TOP = 5
POSITION_RANGES = 128
HISTOGRAM_EDGES = [10.0 ** (e / 4) for e in range(-36, 9)]  # 1e-9 to 100 nats, four bins a decade


class Positions:
    """One model's figures at each position, float64 [rows, length].

    The last position of a row predicts no known token, and is left out of every summary.

    Attributes:
        nll: negative log likelihood of the next token, nats.
        kl: KL(reference || this model), nats.
        top1_same: whether both have the same likeliest token.
        top5_same: share of the reference's five likeliest among this model's.
    """

    def __init__(self, rows: int, length: int) -> None:
        shape = rows, length
        self.nll, self.kl, self.top1_same, self.top5_same = (
            np.zeros(shape),
            np.zeros(shape),
            np.zeros(shape),
            np.zeros(shape),
        )

    @property
    def perplexity(self) -> float | None:
        """exp of the mean nll; None where that is not a finite number."""
        mean = float(self.nll[:, :-1].mean())
        return math.exp(mean) if mean < 700 else None


def top1(logits: Tensor) -> NDArray[np.int64]:
    """logits [positions, vocabulary] -> the likeliest token of each, ties to the lower id."""
    ids: NDArray[np.int64] = logits.numpy().argmax(-1)
    return ids


def top(logits: Tensor, count: int) -> NDArray[np.int64]:
    """logits [positions, vocabulary] -> ids of the ``count`` likeliest, ascending; ties to the lower ids."""
    count = min(count, logits.shape[-1])
    least = logits.topk(count, -1).values[:, -1:]
    taken = (logits >= least).numpy()
    ids = np.empty((len(taken), count), np.int64)
    exact = taken.sum(-1) == count
    ids[exact] = np.nonzero(taken[exact])[1].reshape(-1, count)
    for i in np.flatnonzero(~exact):
        order = np.argsort(-logits[i].numpy(), kind="stable")
        ids[i] = np.sort(order[:count])
    return ids


def shared(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of common ids in each row of ``a`` and ``b`` [n, k]; ids are distinct in a row."""
    both = np.sort(np.concatenate([a, b], 1), 1)
    count: NDArray[np.int64] = (both[:, 1:] == both[:, :-1]).sum(1)
    return count


def compare(logits: Sequence[Tensor], targets: Tensor, out: Sequence[Positions], start: int) -> None:
    """Compare models at some positions; the first one is the reference.

    Args:
        logits: of each model, [positions, vocabulary] float32.
        targets: [positions] int64, the next tokens.
        out: of each model; filled from the flat position ``start`` on.
    """
    step = max(1, SLICE_ELEMENTS // logits[0].shape[-1])
    for begin in range(0, len(targets), step):
        part = slice(begin, min(begin + step, len(targets)))
        at = slice(start + part.start, start + part.stop)
        first, p, log_p, best = logits[0][part], torch.empty(0), torch.empty(0), np.empty((0, 1), np.int64)
        for number, (model, positions) in enumerate(zip(logits, out, strict=True)):
            log_q = torch.log_softmax(model[part].double(), -1)
            positions.nll.reshape(-1)[at] = -log_q.gather(1, targets[part, None])[:, 0].numpy()
            if number == 0:
                p, log_p, best = log_q.exp(), log_q, top(first, TOP)
                continue
            # rounding can leave a sum slightly below zero
            positions.kl.reshape(-1)[at] = (log_p - log_q).mul_(p).sum(-1).clamp_min_(0).numpy()
            positions.top1_same.reshape(-1)[at] = top1(first) == top1(model[part])
            positions.top5_same.reshape(-1)[at] = shared(best, top(model[part], TOP)) / best.shape[1]


def summarize(found: Positions, reference: Positions) -> Logits:
    """The figures over all predicted positions."""
    kl, own, theirs = found.kl[:, :-1], found.perplexity, reference.perplexity
    return Logits(
        kl=Kl(mean=kl.mean(), median=np.median(kl), p99=np.percentile(kl, 99), max=kl.max()),
        perplexity=own,
        perplexity_ratio=own / theirs if own is not None and theirs is not None else None,
        top1_agreement=found.top1_same[:, :-1].mean(),
        top5_agreement=min(1.0, found.top5_same[:, :-1].mean()),
        kl_histogram=_histogram(kl),
        kl_by_position=_by_position(kl),
    )


def _histogram(kl: NDArray[np.float64]) -> Histogram:
    edges = np.array(HISTOGRAM_EDGES)
    bins = np.clip(np.searchsorted(edges, kl.reshape(-1), side="right") - 1, 0, len(edges) - 2)
    return Histogram(edges=HISTOGRAM_EDGES, counts=np.bincount(bins, minlength=len(edges) - 1).tolist())


def _by_position(kl: NDArray[np.float64]) -> list[PositionRange]:
    means = kl.mean(0)
    groups = np.array_split(np.arange(len(means)), min(len(means), POSITION_RANGES))
    return [PositionRange(first=int(g[0]), last=int(g[-1]), kl=means[g].mean()) for g in groups]

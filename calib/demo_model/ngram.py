"""A smoothed 5-gram model: the yardstick that the demo model has to beat.

Interpolated modified Kneser-Ney (Chen and Goodman 1999, section 3): three discounts an order, estimated from
the counts of counts; every order below the highest counts distinct left contexts. An n-gram is one int64,
``BITS`` a token.
"""

import numpy as np

BITS = 11  # vocabulary of 2,048


class KneserNey:
    """Trained on one token stream; ``logprob`` gives natural logarithms."""

    def __init__(self, tokens: np.ndarray, vocab: int, order: int = 5) -> None:
        assert vocab <= 1 << BITS, f"{vocab} tokens do not fit {BITS} bits"
        self.vocab, self.order = vocab, order
        self.levels = []
        stream = tokens.astype(np.int64)
        grams, counts = np.unique(self.windows(stream, order), return_counts=True)
        for n in range(order, 0, -1):
            self.levels.insert(0, self.level(grams, counts))
            if n > 1:  # distinct left neighbours of each shorter n-gram
                grams, counts = np.unique(grams & ((1 << BITS * (n - 1)) - 1), return_counts=True)

    @staticmethod
    def windows(stream: np.ndarray, n: int) -> np.ndarray:
        out = np.zeros(len(stream) - n + 1, np.int64)
        for i in range(n):
            out = out << BITS | stream[i : len(out) + i]
        return out

    @staticmethod
    def level(grams: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Discounted counts of the n-grams, and of each context its total and the mass left for the lower
        order."""
        n1, n2, n3, n4 = ((counts == i).sum() for i in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        discounts = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        discount = discounts[np.minimum(counts, 3)]
        contexts, at = np.unique(grams >> BITS, return_inverse=True)
        return {
            "grams": grams,
            "mass": counts - discount,
            "contexts": contexts,
            "total": np.bincount(at, counts),
            "left": np.bincount(at, discount),
        }

    @staticmethod
    def find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return at, keys[at] == wanted

    def logprob(self, row: np.ndarray) -> np.ndarray:
        """ln p of each token of ``row`` after its first, given up to ``order - 1`` tokens before it in the
        row."""
        row = row.astype(np.int64)
        p = np.full(len(row) - 1, 1 / self.vocab)
        for n, level in enumerate(self.levels, 1):
            grams = self.windows(row, n)[max(0, 2 - n) :]
            here = slice(max(0, n - 2), None)  # positions with n - 1 tokens before them
            at, seen = self.find(level["contexts"], grams >> BITS)
            total, left = level["total"][at], level["left"][at]
            gram_at, gram_seen = self.find(level["grams"], grams)
            mass = np.where(gram_seen, level["mass"][gram_at], 0.0)
            p[here] = np.where(seen, (mass + left * p[here]) / total, p[here])
        return np.log(p)


def perplexity(train: np.ndarray, rows: np.ndarray, vocab: int, order: int = 5) -> float:
    """Perplexity over the predicted positions of ``rows`` [R, L]."""
    model = KneserNey(train, vocab, order)
    return float(np.exp(-np.mean([model.logprob(row) for row in rows])))

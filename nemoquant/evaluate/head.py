"""Final norm, head and multi-token prediction of all models, the same positions of all at a time."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.errors import UncomputableError, WeightError
from nemoquant.evaluate.candidate import CandidateCheckpoint
from nemoquant.evaluate.layers import Energy, into, run_layer
from nemoquant.evaluate.metrics import Positions, compare, top1
from nemoquant.evaluate.reference import embed
from nemoquant.model import mtp, names
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.norm import rms_norm
from nemoquant.model.reference import ReferenceModel, WeightSource
from nemoquant.model.taps import Tap, identity, prefixed
from nemoquant.sources.source import Source
from nemoquant.tokens.rows import Rows

HEAD_ELEMENTS = 1 << 25  # logits of one model held at a time

Shares = Callable[[int, str], None]  # number of finished shares (one a candidate), and the current work


class Head:
    """Logits of one model from its stream [rows, length, hidden] after the last layer.

    They are computed on ``device`` and kept on the CPU.
    """

    def __init__(
        self, config: NemotronHConfig, weights: WeightSource, tap: Tap, stream: Tensor, device: torch.device
    ) -> None:
        self.config, self.weights, self.tap = config, weights, tap
        self.model = ReferenceModel(config, weights, device=device)
        self.hidden = rms_norm(stream, weights(f"{names.FINAL_NORM}.")["weight"], config.norm_eps).flatten(
            0, 1
        )
        self.choice = np.zeros(len(self.hidden), np.int64)  # the likeliest next token of each position

    def logits(self, part: slice = slice(None), hidden: Tensor | None = None) -> Tensor:
        """Logits [positions, vocabulary], float32.

        Args:
            part: positions, of the stream or of ``hidden``.
            hidden: other hidden states [positions, hidden]; None takes the model's stream.
        """
        x = (self.hidden if hidden is None else hidden)[part]
        return self.model.logits(x[None].to(self.model.device), self.tap)[0].cpu()

    def acceptance(self, ids: Tensor) -> float:
        """Share of positions where the first MTP module chooses the same next token as the main model.

        At position t the module takes the hidden state of t and the token at t + 1. Its likeliest token is
        compared with the main model's at t + 1, as in speculative decoding with greedy verification. NaN
        where the module produces NaN or Inf.

        Args:
            ids: [rows, length]; ``choice`` must be filled.
        """
        c, prefixes = self.config, mtp.layer_prefixes(self.config, 0)
        rows, length = ids.shape
        hidden = self.hidden.view(rows, length, -1)
        x = torch.empty(rows, length - 1, c.hidden_size)
        embeddings, first = self.weights(f"{names.EMBEDDINGS}."), self.weights(prefixes[0])
        for row in range(rows):
            one = slice(row, row + 1)
            tap = prefixed(self.tap, prefixes[0])
            after, before = (
                t.to(self.model.device) for t in (embed(embeddings, ids[one, 1:]), hidden[one, :-1])
            )
            x[one] = mtp.mtp_input(c, first, after, before, tap).cpu()
        for j, (kind, prefix) in enumerate(zip(c.mtp_layers, prefixes, strict=True)):
            y = torch.empty_like(x)
            run_layer(
                c.of_mtp_layer(j),
                kind,
                self.weights(prefix),
                x,
                prefixed(self.tap, prefix),
                into(y),
                device=self.model.device,
            )
            x = y
        drafted = mtp.mtp_output(c, self.weights(prefixes[-1]), x).flatten(0, 1)
        if not torch.isfinite(drafted).all():
            return math.nan
        expected = self.choice.reshape(rows, length)[:, 1:].reshape(-1)
        accepted = sum(
            int((top1(self.logits(part, drafted)) == expected[part]).sum())
            for part in _slices(c, len(drafted))
        )
        return accepted / len(drafted)


def _slices(config: NemotronHConfig, positions: int) -> Iterator[slice]:
    step = max(1, HEAD_ELEMENTS // config.vocab_size)
    return (slice(start, min(start + step, positions)) for start in range(0, positions, step))


def heads_of(
    source: Source, candidates: Sequence[CandidateCheckpoint], streams: Sequence[Tensor], device: torch.device
) -> list[Head]:
    """The heads of all models over their streams after the last layer, the reference's first."""
    checkpoint = source.checkpoint
    heads = [
        Head(source.config, lambda prefix: LayerWeights(checkpoint, prefix), identity, streams[0], device)
    ]
    pairs = zip(candidates, streams[1:], strict=True)
    return heads + [Head(source.config, c.weights, c.tap(), stream, device) for c, stream in pairs]


def compare_heads(
    source: Source,
    candidates: Sequence[CandidateCheckpoint],
    heads: Sequence[Head],
    rows: Rows,
    progress: Shares,
) -> tuple[Positions, list[Positions], list[Energy], list[float | None]]:
    """Logits of all models, and the figures that follow from them.

    Args:
        heads: the reference's first.
    Returns:
        positions of the reference, positions of each candidate, the error of each candidate's logits, and
            the MTP acceptance of the reference and of each candidate (None where one has no module).
    """
    config, ids = source.config, torch.from_numpy(rows.ids)
    positions = [Positions(*ids.shape) for _ in heads]
    energies = [Energy() for _ in candidates]
    targets = ids.roll(-1, 1).flatten()
    for part in _slices(config, ids.numel()):
        progress(len(candidates) * part.start // ids.numel(), "head")
        logits = [head.logits(part) for head in heads]
        if not torch.isfinite(logits[0]).all():
            raise WeightError(
                f"{source.path}: its final norm or head computes NaN or Inf; expected finite logits, is it "
                f"damaged?"
            )
        for candidate, own in zip(candidates, logits[1:], strict=True):
            if not torch.isfinite(own).all():
                raise UncomputableError(
                    f"{candidate.path}: the head computes NaN or Inf on the given rows; an engine would "
                    f"too, no figure can be given"
                )
        for head, own in zip(heads, logits, strict=True):
            head.choice[part] = top1(own)
        for energy, own in zip(energies, logits[1:], strict=True):
            energy.add(own, logits[0])
        compare(logits, targets[part], positions, part.start)
    has_mtp = [config.mtp_modules > 0, *(config.mtp_modules > 0 and c.has_mtp for c in candidates)]
    acceptance = [head.acceptance(ids) if has else None for head, has in zip(heads, has_mtp, strict=True)]
    kinds = [WeightError, *(UncomputableError for _ in candidates)]
    paths = [source.path, *(c.path for c in candidates)]
    for kind, path, share in zip(kinds, paths, acceptance, strict=True):
        if share is not None and math.isnan(share):
            raise kind(
                f"{path}: its multi-token-prediction module (mtp) computes NaN or Inf; expected finite "
                f"weights"
            )
    return positions[0], positions[1:], energies, acceptance

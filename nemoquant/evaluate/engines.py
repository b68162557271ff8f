"""Candidates' logits from an engine, compared with those of the torch arithmetic."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemoquant.engine.base import Engine
from nemoquant.errors import UsageError
from nemoquant.evaluate.head import Head, Shares
from nemoquant.evaluate.metrics import Positions, compare, summarize
from nemoquant.evaluate.schema import EngineRun
from nemoquant.tokens.rows import Rows


def check_length(engine: Engine, length: int) -> None:
    """Raises UsageError where an engine takes no rows of this length; before it reads its weights."""
    if engine.max_seq_len is not None and length > engine.max_seq_len:
        raise UsageError(
            f"rows of {length:,} tokens: the {engine.name} engine was built for {engine.max_seq_len:,} at "
            f"most; give --seq-len, or build it again with a larger --max-seq-len"
        )


def run_engines(
    engines: Sequence[Engine], rows: Rows, reference: Head, heads: Sequence[Head], progress: Shares
) -> list[EngineRun]:
    """Each engine's figures.

    Args:
        engines: the engine of each candidate.
        heads: the logits of each candidate by torch.
    Raises:
        UsageError: an engine gives logits of the last position only, or NaN.
    """
    ids = torch.from_numpy(rows.ids)
    count, length = ids.shape
    targets = ids.roll(-1, 1)
    runs = []
    for number, (engine, head) in enumerate(zip(engines, heads, strict=True)):
        own, by_torch, by_engine, beside = (Positions(count, length) for _ in range(4))
        for row in range(count):
            progress(number, f"{engine.name}, row {row} of {count}")
            logits = torch.from_numpy(engine.forward(rows.ids[row : row + 1]).logits[0])
            _check(engine, logits, length)
            at = slice(row * length, (row + 1) * length)
            compare([reference.logits(at), logits], targets[row], [own, by_engine], at.start)
            compare([head.logits(at), logits], targets[row], [by_torch, beside], at.start)
        facts = engine.describe()
        runs.append(
            EngineRun(
                engine=engine.name,
                version=facts["version"],
                device=facts["device"],
                compute=facts["compute"],
                logits=summarize(by_engine, own),
                kl_from_torch=beside.kl[:, :-1].mean(),
            )
        )
    return runs


def _check(engine: Engine, logits: Tensor, length: int) -> None:
    if len(logits) != length:
        raise UsageError(
            f"the {engine.name} graph gives logits of {len(logits)} position; export it without "
            f"--last-token-only"
        )
    if not torch.isfinite(logits).all():
        raise UsageError(
            f"the {engine.name} engine computes NaN or Inf on the given rows, the torch arithmetic does "
            f"not; export it again"
        )

"""Writes the measured figures into nemoquant's model card, and the card's new hash into the manifest."""

from pathlib import Path

from nemoquant.checkpoint import manifest
from nemoquant.errors import CheckpointError
from nemoquant.evaluate.report.markdown import cost_sentence
from nemoquant.evaluate.schema import Candidate, Report
from nemoquant.pack.card import with_cost
from nemoquant.pack.files import CARD


def update_card(path: Path, candidate: Candidate, report: Report) -> list[str]:
    """Write the figures into the card in the folder ``path``; returns warnings where it was not changed.

    The card of a checkpoint that another tool wrote is not changed.
    """
    if not (path / manifest.FILE).exists():
        return []
    try:
        text = (path / CARD).read_text(encoding="utf-8")
        changed = with_cost(text, cost_sentence(candidate, report.data, report.reference.perplexity))
        if changed is None:
            return [f"{path / CARD} has no line for the cost in accuracy; it is left as it is"]
        if changed != text:
            manifest.change_file(path, CARD, changed)
    except CheckpointError as error:
        return [str(error)]
    except (OSError, UnicodeDecodeError) as error:
        return [f"{path / CARD} can't be given the figures ({error}); it is left as it is"]
    return []

"""Writes the measured figures into nemoquant's model card, and the card's new hash into the manifest."""

import hashlib

from nemoquant.checkpoint.intact import Intact
from nemoquant.checkpoint.manifest import CARD, listed, put_file, read_manifest
from nemoquant.errors import CheckpointError
from nemoquant.evaluate.report.markdown import cost_sentence
from nemoquant.evaluate.schema import Candidate, Report
from nemoquant.files import MOST_SETTINGS, read_bytes
from nemoquant.pack.card import with_cost
from nemoquant.pack.hub import with_results


def update_card(intact: Intact, candidate: Candidate, report: Report) -> list[str]:
    """Write the figures into the card of a checkpoint; returns warnings where it was not changed.

    A card that was edited is left as it is, and so is one in a folder that is no longer what was measured.
    """
    card = intact.folder / CARD
    try:
        old = read_bytes(card, MOST_SETTINGS)
        data = read_manifest(intact.folder)
        if hashlib.sha256(old).hexdigest() not in listed(data, CARD):
            return [f"{card} was edited after it was written; it is left as it is"]
        told = with_cost(old.decode(), cost_sentence(candidate, report.data, report.reference.perplexity))
        new = told and with_results(told, intact.folder.name, report.data.source, _results(candidate))
        if new is None:
            return [f"{card} has no head, or no line for the cost in accuracy; it is left as it is"]
        if new.encode() != old or CARD in data.get("was", {}):  # of a run that was killed meanwhile
            put_file(intact.folder, CARD, new.encode(), intact.check, made_from=old)
    except CheckpointError as error:
        return [str(error)]
    except (OSError, ValueError) as error:
        return [f"{card} can't be given the figures ({error}); it is left as it is"]
    return []


def _results(candidate: Candidate) -> list[tuple[str, str, float]]:
    """Metrics for the head of the card: type, name, value."""
    logits = candidate.logits
    found = [("kl_divergence", "KL from bf16, nats a token", logits.kl.mean)]
    if logits.perplexity is not None:
        found.append(("perplexity", "Perplexity", logits.perplexity))
    return [*found, ("top1_agreement", "Same likeliest token as bf16", logits.top1_agreement)]

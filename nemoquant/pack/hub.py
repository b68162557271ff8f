"""The head of a model card that hubs read, by the hub's own card library; nothing is sent anywhere."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemoquant.files import read_text
from nemoquant.sources.hub import is_hub_id, named_by
from nemoquant.words import plain

TASK = "text-generation"  # of a model whose card names no other, as those that see or hear do
TAKEN = ("license", "license_name", "license_link", "pipeline_tag")  # from the head of the source's card
MOST_CARD = 1 << 20  # bytes of the source's card
MOST_VALUE = 200  # characters of one of its values


def source_id(folder: Path, raw_config: Mapping[str, Any]) -> str | None:
    """A source's name on the hub: by the cache folder it lies in, or its config; None if neither says."""
    here, declared = folder.resolve(), str(raw_config.get("_name_or_path", ""))
    cached = [name for place in (here, *here.parents) if (name := named_by(place)) is not None]
    return next(iter(cached), declared if is_hub_id(declared) else None)


def source_name(folder: Path, raw_config: Mapping[str, Any]) -> str:
    """What to call a source: its name on the hub, or that of its folder."""
    return source_id(folder, raw_config) or folder.resolve().name


def head(
    folder: Path,
    raw_config: Mapping[str, Any],
    library: str,
    tags: Collection[str],
    relation: str | None = "quantized",
) -> str:
    """The head of the card of what was made from the checkpoint in ``folder``, with both lines of dashes.

    Args:
        library: that loads it, by the hub's name.
        relation: to the base model, by the hub's words; None says nothing of it.
    """
    from huggingface_hub import ModelCardData

    base = source_id(folder, raw_config)
    found: dict[str, Any] = {"pipeline_tag": TASK} | _taken(folder)
    if base is not None:
        found |= {"base_model": base} | ({"base_model_relation": relation} if relation else {})
    data = ModelCardData(library_name=library, tags=sorted(tags), **found)
    return f"---\n{data.to_yaml()}\n---\n"


def _taken(folder: Path) -> dict[str, str]:
    """The licence and the task that the source's card declares; plain values of one line alone."""
    try:
        text = read_text(folder / "README.md", MOST_CARD)
    except (OSError, ValueError):  # it has none, or none that can be read
        return {}
    begin, found = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL), {}
    for line in begin[1].splitlines() if begin else []:
        key, _, value = line.partition(":")
        value = value.strip().strip("'\"")
        if key in TAKEN and 0 < len(value) <= MOST_VALUE and value.isprintable():
            found[key] = value
    return found


def with_results(text: str, name: str, dataset: str, results: Sequence[tuple[str, str, float]]) -> str | None:
    """A card's text with evaluation results in its head, in place of earlier ones; None where it has no head.

    Args:
        name: of the model.
        dataset: what it was measured on.
        results: type of a metric, its name for people, and the value.
    """
    from huggingface_hub import EvalResult, ModelCard

    if not text.startswith("---\n"):
        return None
    card = ModelCard(text)
    data: Any = card.data
    data.model_name = plain(name)
    data.eval_results = [
        EvalResult(
            task_type=TASK,
            dataset_type="text",
            dataset_name=plain(dataset),
            metric_type=kind,
            metric_name=title,
            metric_value=value,
        )
        for kind, title, value in results
    ]
    return str(card)

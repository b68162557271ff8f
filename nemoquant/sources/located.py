"""Where a model is: a path, or a name on the hub that the hub's cache here has. One place decides it.

A path that exists is that path, or the snapshot of a model's folder in a cache. Else a text that can be a
name on the hub is one. Nothing reaches a network unless a download is asked for.
"""

import os
from collections.abc import Callable
from pathlib import Path

from nemoquant import arguments
from nemoquant.arguments import PathLike
from nemoquant.errors import HubError, listing
from nemoquant.progress import Progress, no_progress
from nemoquant.sources.hub import ALL, HubName, Wanted, hub_name, is_address, is_hub_id, named_by
from nemoquant.sources.hub_cache import (
    CONFIG,
    cache_folder,
    cached_models,
    find_snapshot,
    folder_of,
    is_root,
    lacking,
    revisions,
    snapshots,
)

MISSING = "what is missing"


def located(
    argument: str,
    given: PathLike,
    wanted: Wanted = ALL,
    *,
    download: bool = False,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress = no_progress,
) -> Path:
    """The path of a model: what exists under it, or the snapshot in the hub's cache that a name stands for.

    Where a snapshot lacks weights that are not needed, the path is that of its config. A text that is neither
    a path nor a name is returned as a path: who reads it says what is missing.

    Args:
        argument: what the model is called in messages.
        given: a path, a name on the hub (``hub.py``), or a model's folder in a cache.
        download: fetch what the cache lacks, and what is newer on the hub.
        say: called with a line of text on what a name stands for.
        progress: of the download.
    Raises:
        UsageError: it is no path, and no name. HubError: the cache has no such model, or not all of it; or it
            can't be fetched. CheckpointError, Interrupted: see :func:`nemoquant.sources.download.fetch`.
    """
    path, text = arguments.path(argument, given), os.fspath(given)
    if os.path.lexists(path) and not is_address(text):
        model = named_by(path.resolve()) if is_root(path) else None
        if model is None:
            _check_no_cache(path)
            if download:
                other = f"; hf://{text} is the model on the hub" if is_hub_id(text) else ""
                say(f"{text} is here, --download fetches nothing{other}")
            return path
        name, cache, place = HubName(model), path.resolve().parent, f" --cache-dir {path.resolve().parent}"
    else:
        found = hub_name(argument, text)
        if found is None:
            return path
        name, cache, place = found, cache_folder(), ""
    if download and _is_offline():
        say("HF_HUB_OFFLINE is set: --download fetches nothing, the cache alone is used")
        download = False
    if download:
        from nemoquant.sources.download import fetch  # with the hub's library

        snapshot = fetch(name, cache, wanted, progress)
    else:
        snapshot = _cached(name, cache, place)
    return _complete(name, snapshot, place, say, needs_weights=wanted.weights)


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _check_no_cache(path: Path) -> None:
    """Refuse a whole cache, in which nobody could tell which model is meant."""
    if path.is_dir() and not (path / CONFIG).exists() and (models := cached_models(path)):
        raise HubError(
            f"{path} is a cache with {len(models)} models ({listing(models)}); expected one of them, as "
            f"{folder_of(path, models[0])}"
        )


def _cached(name: HubName, cache: Path, place: str) -> Path:
    root = folder_of(cache, name.model)
    snapshot = find_snapshot(root, name)
    if snapshot is None:
        has = revisions(root)
        there = f"has only {listing(has)} of it" if has else "has nothing of it"
        raise HubError(
            f"{name}: there is no file or folder of that name, and the hub's cache {cache} {there}; "
            f"{_ways(name, place, 'it')}"
        )
    return snapshot


def _complete(
    name: HubName, snapshot: Path, place: str, say: Callable[[str], None], *, needs_weights: bool
) -> Path:
    """The snapshot, or its config where weights that are not needed are missing."""
    if not (snapshot / CONFIG).exists():
        raise HubError(f"{name}: {snapshot} has no {CONFIG}; {_ways(name, place, MISSING)}")
    missing, of = lacking(snapshot)
    lacks = f"lacks {len(missing)} of {of} files with weights ({listing(missing)})"
    if missing and needs_weights:
        others = [commit for commit in snapshots(snapshot.parent.parent) if commit != snapshot.name]
        whole = [commit for commit in others if not lacking(snapshot.parent / commit)[0]]
        instead = f"; {name.model}@{whole[0]} is there whole" if whole else ""
        raise HubError(f"{name}: {snapshot} {lacks}; {_ways(name, place, MISSING)}{instead}")
    if missing:
        say(f"{name} is {snapshot / CONFIG}: the snapshot {lacks}, its config alone is used")
        return snapshot / CONFIG
    say(f"{name} is {snapshot}")
    return snapshot


def _ways(name: HubName, place: str, what: str) -> str:
    """How to fetch what a cache lacks, as the end of a message."""
    revision = f" --revision {name.revision}" if name.revision else ""
    offline = " once HF_HUB_OFFLINE is unset" if _is_offline() else ""
    return f"`hf download {name.model}{revision}{place}` or the option --download fetches {what}{offline}"

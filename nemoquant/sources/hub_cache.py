"""A model's folder in the hub's cache: its revisions and snapshots, and what a snapshot lacks.

    models--nvidia--NAME/refs/main              the commit of a branch or a tag, as it was when it was fetched
    models--nvidia--NAME/snapshots/COMMIT/...   links to models--nvidia--NAME/blobs/HASH

The layout is documented: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

import os
from itertools import islice
from pathlib import Path

from nemoquant.errors import HubError, listing
from nemoquant.files import MOST_TABLE_ENTRIES, plain_name, read_json, read_text
from nemoquant.sources.hub import COMMIT, HubName, is_revision, named_by
from nemoquant.words import plain

MOST_REF = 1000  # bytes of a file in refs/
MOST_REFS = 10_000  # entries of refs/, folders in it too
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"


def cache_folder() -> Path:
    """The hub's cache on this machine, by HF_HUB_CACHE and HF_HOME as its own library reads them."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def folder_of(cache: Path, model: str) -> Path:
    """Where a cache keeps a model."""
    return cache / f"models--{model.replace('/', '--')}"


def cached_models(cache: Path) -> list[str]:
    """Names of the models in a cache."""
    with os.scandir(cache) as entries:
        return sorted(name for entry in entries if (name := named_by(Path(entry.path))) is not None)


def is_root(folder: Path) -> bool:
    """Whether this is a model's folder in a cache, and not a checkpoint that only has such a name."""
    is_named = folder.is_dir() and named_by(folder.resolve()) is not None
    return is_named and not os.path.lexists(folder / CONFIG)


def find_snapshot(root: Path, name: HubName) -> Path | None:
    """The snapshot of a revision in a model's folder; None where the cache has none.

    Without a revision it is that of ``main``, or the only one.

    Raises:
        HubError: several and no ``main``.
    """
    there = snapshots(root)
    revision = name.revision or "main"
    commit = revision if COMMIT.fullmatch(revision) else _commit(root / "refs" / revision)
    if commit is None and name.revision is None:
        if len(there) > 1:
            raise HubError(
                f"{root} has {len(there)} snapshots and no refs/main that says which is meant: "
                f"{listing(there)}; name one, as {name.model}@{there[0]}"
            )
        commit = there[0] if there else None
    return root / "snapshots" / commit if commit is not None and commit in there else None


def snapshots(root: Path) -> list[str]:
    """The commits that a model's folder has something of."""
    try:
        with os.scandir(root / "snapshots") as entries:
            return sorted(entry.name for entry in entries if is_revision(entry.name) and entry.is_dir())
    except OSError:  # it has none, or none that can be read
        return []


def revisions(root: Path) -> list[str]:
    """What a model's folder has, for a message: ``main (0123abcd)``, then commits without a name."""
    refs = root / "refs"
    files = sorted(islice(refs.rglob("*"), MOST_REFS))
    named = {plain(path.relative_to(refs)): _commit(path) for path in files if path.is_file()}
    there = snapshots(root)
    told = [
        f"{ref} ({commit[:8]})" for ref, commit in named.items() if commit is not None and commit in there
    ]
    return told + [commit for commit in there if commit not in named.values()]


def _commit(ref: Path) -> str | None:
    """The commit in a file of refs/; None where there is none."""
    try:
        text = read_text(ref, MOST_REF).strip()
    except (OSError, ValueError):
        return None
    return text if is_revision(text) and "/" not in text else None


def shards_of(index: Path) -> list[str]:
    """The files that an index names; of one that can't be read none: opening the checkpoint says why."""
    try:
        content = read_json(index, entries=MOST_TABLE_ENTRIES)
    except (OSError, ValueError):
        return []
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    named = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({name for name in named if plain_name(name)})


def lacking(snapshot: Path) -> tuple[list[str], int]:
    """The files with weights that a snapshot should have and has not, and how many it should have.

    A link whose blob is gone counts as a file that is not there.
    """
    index = snapshot / INDEX
    if os.path.lexists(index) and not index.exists():
        return [INDEX], 1
    shards = shards_of(index) if index.exists() else [SINGLE]
    return [shard for shard in shards if not (snapshot / shard).exists()], len(shards)

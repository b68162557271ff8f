"""A model in a hub cache, laid out as huggingface_hub does it: links in a snapshot to blobs."""

import hashlib
from collections.abc import Mapping
from pathlib import Path


def put(cache: Path, name: str, files: Mapping[str, bytes], commit: str, *refs: str) -> Path:
    """Puts a snapshot of a model into a cache; returns the snapshot's folder."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    for file, data in files.items():
        digest = hashlib.sha256(data).hexdigest()
        (root / "blobs" / digest).write_bytes(data)
        (snapshot / file).symlink_to(f"../../blobs/{digest}")
    for ref in refs:
        path = root / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    return snapshot

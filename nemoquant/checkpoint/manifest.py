"""``nemoquant.json``: what was made, from what, with which settings, and the sha256 of every file.

It contains no time, host or path.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoquant.checkpoint.header import TensorInfo
from nemoquant.errors import CheckpointError
from nemoquant.files import replace_text
from nemoquant.model.roles import TensorSpec
from nemoquant.progress import Count

FILE = "nemoquant.json"
SCHEMA = 2
READ_BYTES = 8 << 20
REQUIRED = {"files": dict, "plan": dict, "source": dict, "shard_bytes": int}


def file_sha256(path: Path, count: Count = lambda size: None) -> str:
    """sha256 of a file, read a few megabytes at a time; ``count`` is called with the size of each piece."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as f:
        while got := f.readinto(buffer):
            digest.update(buffer[:got])
            count(got)
    return digest.hexdigest()


def config_sha256(raw_config: Mapping[str, Any]) -> str:
    """Identity of a config.json, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(raw_config, sort_keys=True).encode()).hexdigest()


def tensor_table_sha256(tensors: Mapping[str, TensorInfo]) -> str:
    """Identity of a checkpoint's tensor table: names, dtypes and shapes, whatever files hold the tensors."""
    table = sorted((name, info.dtype, list(info.shape)) for name, info in tensors.items())
    return hashlib.sha256(json.dumps(table).encode()).hexdigest()


def pack_dtypes(table: list[TensorSpec]) -> dict[str, Any]:
    """The dtypes of a tensor table: the usual one, and the names of tensors with another dtype."""
    usual = Counter(spec.dtype for spec in table).most_common(1)[0][0]
    return {"usual": usual, "others": {spec.name: spec.dtype for spec in table if spec.dtype != usual}}


def canonical(data: Mapping[str, Any]) -> bytes:
    """The manifest's bytes of which ``sha256`` is computed: sorted keys, without ``sha256`` itself."""
    return json.dumps({k: v for k, v in data.items() if k != "sha256"}, indent=1, sort_keys=True).encode()


def write_manifest(folder: Path, data: Mapping[str, Any]) -> None:
    """Write ``data`` with the sha256 of its canonical bytes."""
    signed = dict(data) | {"sha256": hashlib.sha256(canonical(data)).hexdigest()}
    replace_text(folder / FILE, json.dumps(signed, indent=1, sort_keys=True) + "\n")


def enter_file(folder: Path, name: str) -> None:
    """Record in the manifest the sha256 of a file that was written later, or written again.

    Raises:
        CheckpointError: the manifest can't be used.
    """
    data = read_manifest(folder)
    data["files"][name] = file_sha256(folder / name)
    write_manifest(folder, data)


def change_file(folder: Path, name: str, text: str) -> None:
    """Replace the text of a file that the manifest lists, and its sha256 there: both or neither.

    Raises:
        CheckpointError: the manifest can't be used, or the file is no longer the one that it lists.
    """
    data, path = read_manifest(folder), folder / name
    if data["files"].get(name) != file_sha256(path):
        raise CheckpointError(f"{path} was changed after it was written; it is left as it is")
    data["files"][name] = hashlib.sha256(text.encode()).hexdigest()
    old_text = path.read_text(encoding="utf-8")
    replace_text(path, text)
    try:
        write_manifest(folder, data)
    except BaseException:
        replace_text(path, old_text)
        raise


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read ``nemoquant.json`` and check its own sha256.

    Raises:
        CheckpointError: it is missing, not JSON, of another schema, or was changed.
    """
    path = folder / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; expected a checkpoint that nemoquant wrote") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); expected JSON") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        got = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(
            f"{path}: schema {got!r}, expected {SCHEMA}; use the version of nemoquant that wrote it"
        )
    if data.get("sha256") != hashlib.sha256(canonical(data)).hexdigest():
        raise CheckpointError(f"{path} was changed after it was written: its sha256 does not fit its content")
    missing = [key for key, kind in REQUIRED.items() if not isinstance(data.get(key), kind)]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}, or has them of another kind; expected what nemoquant writes"
        )
    return data

"""``nemoquant.json``: what was made, from what, with which settings, and the sha256 of every file.

It contains no time, host or path. Who changes it in a finished folder holds the folder's lock from reading to
writing, so that two processes lose nothing. What its content must look like is in ``manifest_schema.py``.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemoquant.checkpoint.header import TensorInfo
from nemoquant.errors import CheckpointError, brief, schema_problem
from nemoquant.files import locked, open_regular, read_json, replace_bytes, replace_text
from nemoquant.model.roles import TensorSpec
from nemoquant.progress import Count

FILE = "nemoquant.json"
CARD = "README.md"  # may be edited after it was written: everybody does before publishing a model
SCHEMA = 2
READ_BYTES = 1 << 20

Check = Callable[[Mapping[str, Any]], None]
"""Called with a manifest before it is changed; raises where the folder is not what it lists."""


def file_sha256(path: Path, count: Count = lambda size: None) -> str:
    """sha256 of a regular file, read piece by piece; ``count`` is called with the size of each piece."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(READ_BYTES))
    with os.fdopen(open_regular(path), "rb", buffering=0) as f:
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


def listed(data: Mapping[str, Any], name: str) -> list[str | None]:
    """The sha256 that a file may have: one, and another while it is replaced; None: it may be absent."""
    return [*([data["files"][name]] if name in data["files"] else []), *_before(data, name)]


def _before(data: Mapping[str, Any], name: str) -> list[str | None]:
    return [data["was"][name]] if name in data.get("was", {}) else []


def put_file(
    folder: Path, name: str, content: bytes, check: Check, *, made_from: bytes | None = None
) -> None:
    """Write or replace a file of a finished folder, and its sha256 in the manifest.

    While the file is replaced the manifest lists both hashes: a kill at any moment leaves a folder that is
    what its manifest lists.

    Args:
        check: see :data:`Check`.
        made_from: what the file still must contain; None replaces whatever is there.
    Raises:
        CheckpointError: the manifest can't be used, or the file has other content than ``made_from``.
    """
    with locked(folder):
        data, path = read_manifest(folder), folder / name
        check(data)
        here = file_sha256(path) if path.exists() else None
        if made_from is not None and here != hashlib.sha256(made_from).hexdigest():
            raise CheckpointError(f"{path} was changed meanwhile; it is left as it is")
        before = here if here in listed(data, name) else None
        after = dict(data) | {"files": data["files"] | {name: hashlib.sha256(content).hexdigest()}}
        others = {other: digest for other, digest in data.get("was", {}).items() if other != name}
        write_manifest(folder, after | {"was": others | {name: before}})
        try:
            replace_bytes(path, content)
        except BaseException:
            # The file may have its new content: a signal, or a failing disk, after it was renamed. Then the
            # manifest stays, which is right for both.
            if (file_sha256(path) if path.exists() else None) == here:
                write_manifest(folder, data)
            raise
        final = {k: v for k, v in after.items() if k != "was"} | ({"was": others} if others else {})
        with suppress(OSError):  # with both hashes the folder is what is listed too, and the file is written
            write_manifest(folder, final)


def read_if_there(folder: Path) -> dict[str, Any] | None:
    """:func:`read_manifest`; None where a folder has none. A link that leads nowhere is an error."""
    return read_manifest(folder) if os.path.lexists(folder / FILE) else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read ``nemoquant.json``, and check its own sha256 and that its content is as nemoquant writes it.

    Raises:
        CheckpointError: it is missing, not JSON, of another schema, was changed, or holds values of a wrong
            kind.
    """
    path = folder / FILE
    try:
        data: Any = read_json(path)
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link that leads nowhere; download the checkpoint again"
            ) from None
        raise CheckpointError(f"{path} does not exist; expected a checkpoint that nemoquant wrote") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); expected JSON") from None
    schema = data.get("schema") if isinstance(data, dict) else type(data).__name__
    if type(schema) is not int or schema != SCHEMA:
        raise CheckpointError(
            f"{path}: schema {brief(schema)}, expected {SCHEMA}; use the version of nemoquant that wrote it"
        )
    if data.get("sha256") != hashlib.sha256(canonical(data)).hexdigest():
        raise CheckpointError(f"{path} was changed after it was written: its sha256 does not fit its content")
    from nemoquant.checkpoint.manifest_schema import Manifest

    wrong = schema_problem(Manifest.model_validate, data)
    if wrong is not None:
        raise CheckpointError(f"{path} is not as nemoquant writes it: {wrong}; quantize again")
    found: dict[str, Any] = data
    return found

"""Changes outputs after they were written: tensors in their files, and a manifest that matches again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from nemoquant.checkpoint.manifest import FILE, file_sha256, write_manifest
from support.files import edit_json
from support.oracle_tensors import read as load_tensors
from support.pack_oracle import read


def sign(out: Path) -> None:
    """Writes a manifest of the changed files: then only a deeper check can detect the change."""
    data = json.loads((out / FILE).read_text())
    data["files"] = {p.name: file_sha256(p) for p in sorted(out.iterdir()) if p.name != FILE}
    write_manifest(out, data)


def overwrite(out: Path, name: str, data: bytes | Callable[[bytes], bytes], at: int = 0) -> None:
    """Changes a tensor's bytes in its file, from ``at`` on.

    A function gets all of them and returns the same number.
    """
    stored = read(out)[name]
    if callable(data):
        data = data(stored.data)
        assert len(data) == len(stored.data)
    assert at + len(data) <= len(stored.data)
    with (out / stored.file).open("r+b") as f:
        f.seek(stored.start + at)
        f.write(data)


def changed_copy(folder: Path, out: Path, edit: Callable[[dict[str, Tensor]], object], **config: Any) -> Path:
    """A copy in one file, as another tool would write it: without a manifest.

    ``edit`` changes its tensors (a dict by name), ``config`` its config.json.
    """
    ignored = shutil.ignore_patterns("*.safetensors", "model.safetensors.index.json", FILE)
    shutil.copytree(folder, out, ignore=ignored)
    tensors = load_tensors(folder)
    edit(tensors)
    whole = {key: t.contiguous() for key, t in tensors.items()}
    save_file(whole, out / "model.safetensors", metadata={"format": "pt"})
    edit_json(out / "config.json", lambda data: data.update(config))
    return out

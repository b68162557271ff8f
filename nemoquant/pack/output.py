"""The output folder: ``OUT.partial`` while it is made, ``OUT`` once it is whole. Only what was made here is ever removed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nemoquant.errors import OutputError

SIDE_FILES = ("generation_config.json", "tokenizer*", "chat_template*", "special_tokens*", "LICENSE*", "NOTICE*")
WRITTEN = ("config.json", "hf_quant_config.json", "README.md", "nemoquant.json", "nemoquant_scales.json")
MARGIN = 64 << 20  # of free disk beyond the tensors: headers, side files, the rest


def partial_of(out: Path) -> Path:
    return out.parent / (out.name + ".partial")


def check_output(out: Path, source: Path, needed: int) -> None:
    """Make sure that ``out`` can be written.

    Raises:
        OutputError: it exists, overlaps the source, an earlier run left its partial folder, or the disk has no room for
            ``needed`` bytes.
    """
    here, there = out.resolve(), source.resolve()
    for path in (here, partial_of(here)):
        if path == there or path in there.parents or there in path.parents:
            raise OutputError(f"{out} overlaps the source {source}; expected a folder outside it")
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out} exists; expected a new folder, nothing is overwritten: remove it or choose another name")
    if partial_of(out).exists():
        raise OutputError(f"{partial_of(out)} exists, left by a run that was killed; remove it, or choose another output")
    parent = next(p for p in here.parents if p.exists())
    if not parent.is_dir():
        raise OutputError(f"{out}: {parent} is not a folder; choose another output")
    free = shutil.disk_usage(parent).free
    if free < needed + MARGIN:
        raise OutputError(
            f"{out}: {(needed + MARGIN) / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on its disk; make room or choose another disk"
        )


@contextmanager
def making(out: Path) -> Iterator[Path]:
    """Yields the empty folder ``OUT.partial``; it becomes OUT when the body ends well, and is removed when it does not."""
    partial = partial_of(out)
    parents = [p for p in out.absolute().parents if not p.exists()]
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{partial} cannot be made ({error.strerror}); choose another output") from None
    try:
        yield partial
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial)
        for parent in parents:  # innermost first
            parent.rmdir()
        if isinstance(error, OSError):
            raise OutputError(f"{out}: {error}; nothing was kept, make room or choose another disk") from error
        raise


def copy_side_files(source: Path, raw_config: dict[str, Any], folder: Path) -> tuple[list[str], list[str]]:
    """Copy what belongs to a checkpoint beside its tensors, by allow-list: names copied, and names left behind.

    ``*.py`` files are copied only if the config's ``auto_map`` names them; they are never imported.
    """
    auto_map = raw_config.get("auto_map") or {}
    entries = [e for v in auto_map.values() for e in (v if isinstance(v, list) else [v]) if isinstance(e, str)]
    modules = {entry.split("--")[-1].split(".")[0] + ".py" for entry in entries}
    copied, skipped = [], []
    for path in sorted(source.iterdir()):
        name = path.name
        if name in ("config.json", "nemoquant.json") or name.endswith((".safetensors", ".safetensors.index.json")):
            continue  # written anew, or what the tensors were read from
        wanted = name in modules or any(fnmatch(name, pattern) for pattern in SIDE_FILES)
        if wanted and path.is_file() and name not in WRITTEN:
            shutil.copyfile(path, folder / name)  # follows a link: hub caches are made of them
            copied.append(name)
        else:
            skipped.append(name + "/" * path.is_dir())
    return copied, skipped

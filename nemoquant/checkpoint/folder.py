"""The output folder: ``OUT.partial`` while it is made, ``OUT`` once it is complete.

Only what was made here is ever removed.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nemoquant.errors import Interrupted, NemoquantError, OutputError

SIDE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens*",
    "LICENSE*",
    "NOTICE*",
)
MARGIN = 64 << 20  # bytes of free disk beyond the tensors, for side files and the rest
BYTES_PER_TENSOR = 600  # in headers, index, config files and scales file


def partial_of(out: Path) -> Path:
    """The folder ``OUT.partial`` of ``out``."""
    return out.parent / (out.name + ".partial")


def nearest_folder(path: Path) -> Path:
    """The nearest folder that exists: ``path`` itself, or one above it."""
    here = path.absolute()
    return next(p for p in (here, *here.parents) if p.is_dir())


def check_output(out: Path, source: Path, tensors: int, tensor_bytes: int, *, resume: bool = False) -> None:
    """Make sure that ``out`` can be written.

    With ``resume`` the partial folder of an earlier run may exist, and its bytes count as room.

    Raises:
        OutputError: it exists, overlaps the source, an earlier run left its partial folder, its folder is not
            writable, or the disk has no room for that many tensors and bytes.
    """
    target, origin = out.resolve(), source.resolve()
    for path in (target, partial_of(target)):
        if path == origin or path in origin.parents or origin in path.parents:
            raise OutputError(f"{out} overlaps the source {source}; expected a folder outside it")
    if out.exists() or out.is_symlink():
        raise OutputError(
            f"{out} exists; expected a new folder, nothing is overwritten: remove it or choose another name"
        )
    partial, bytes_there = partial_of(out), 0
    if partial.exists():
        if not resume:
            raise OutputError(
                f"{partial} exists, left by a run that did not end; --resume goes on with it, or remove it, "
                f"or choose another output"
            )
        bytes_there = sum(path.stat().st_size for path in partial.iterdir() if path.is_file())
    parent = nearest_folder(target)
    below = next(p for p in (target, *target.parents) if p.parent == parent)
    if below.exists():
        raise OutputError(f"{out}: {below} is not a folder; choose another output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: {parent} is not writable; choose another output")
    needed = tensor_bytes + BYTES_PER_TENSOR * tensors + MARGIN - bytes_there
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{out}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on its disk; make room or "
            f"choose another disk"
        )


@contextmanager
def making(out: Path) -> Iterator[Path]:
    """Yields the empty folder ``OUT.partial``, renamed to OUT if the body succeeds, and removed if not.

    Raises:
        OutputError: it can't be made or written; or OUT was made meanwhile, and then the finished OUT.partial
            stays.
    """
    partial = partial_of(out)
    parents = [p for p in out.absolute().parents if not p.exists()]
    made = False
    try:
        partial.mkdir(parents=True)
        made = True
        yield partial
    except BaseException as error:
        if made:
            shutil.rmtree(partial, ignore_errors=True)
        for parent in parents:  # innermost first; a folder that another run uses by now stays
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise OutputError(
                f"{out}: {error.strerror or error}; nothing was kept, make room or choose another output"
            ) from error
        # The files that an inner run kept were removed with the rest.
        if isinstance(error, NemoquantError | Interrupted) and error.kept:
            error.kept = "nothing was kept"
        raise
    try:
        partial.rename(out)
    except OSError as error:
        raise OutputError(
            f"{partial} is finished and verified, but can't be renamed to {out} ({error.strerror}); rename it"
        ) from None


def side_files(source: Path, raw_config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The other files beside the source's tensors: names to copy, by an allow-list, and names to leave.

    ``*.py`` files are copied only if the config's ``auto_map`` names them; they are never imported.

    Raises:
        OutputError: a file to copy can't be read.
    """
    auto_map = raw_config.get("auto_map")
    auto_map = auto_map if isinstance(auto_map, dict) else {}
    entries = [
        e for v in auto_map.values() for e in (v if isinstance(v, list) else [v]) if isinstance(e, str)
    ]
    modules = {entry.split("--")[-1].split(".")[0] + ".py" for entry in entries}
    wanted, skipped = [], []
    for path in sorted(source.iterdir()):
        name = path.name
        if name in ("config.json", "nemoquant.json") or name.endswith(
            (".safetensors", ".safetensors.index.json")
        ):
            continue  # written by the run itself, or files of tensors
        belongs = name in modules or any(fnmatch(name, pattern) for pattern in SIDE_FILES)
        if belongs and path.is_file():
            if not os.access(path, os.R_OK):
                raise OutputError(
                    f"{path} cannot be read (permission denied); it belongs to the checkpoint: make it "
                    f"readable"
                )
            wanted.append(name)
        else:
            skipped.append(name + "/" * path.is_dir())
    return wanted, skipped


def copy_side_files(source: Path, names: list[str], folder: Path) -> None:
    """Copy these files into ``folder``; links are followed, because hub caches consist of links."""
    for name in names:
        shutil.copyfile(source / name, folder / name)

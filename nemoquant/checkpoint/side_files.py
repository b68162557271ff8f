"""The other files of a source: tokenizer, chat template, licences. Which are copied, and from where."""

import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from nemoquant.checkpoint.modules import python_modules
from nemoquant.errors import OutputError, listing
from nemoquant.files import copy_again, lies_in, plain_name
from nemoquant.words import plain

TEXTS = ("", ".md", ".txt", ".rst", ".pdf")
SIDE_FILES = {  # beginning of a name -> how it may end; a pickle or a program has no place here
    "generation_config": (".json",),
    "tokenizer": (".json", ".model", ".txt"),
    "chat_template": (".jinja", ".json", ".txt"),
    "special_tokens": (".json",),
    "preprocessor_config": (".json",),
    "processor_config": (".json",),
    "video_preprocessor_config": (".json",),
    "LICENSE": TEXTS,
    "NOTICE": TEXTS,
}


SERVING = re.compile(r".*(reasoning|tool)_?(call)?_?parser.*\.py")  # what published serving commands load


def for_serving(names: Iterable[str]) -> list[str]:
    """Those of files that were left that published serving commands name, such as reasoning parsers."""
    return [name for name in names if SERVING.fullmatch(name)]


def is_side_file(name: str, modules: Collection[str]) -> bool:
    """Whether a file of this name belongs to a checkpoint, weights and configs aside."""
    known = any(name.startswith(begin) and Path(name).suffix in ends for begin, ends in SIDE_FILES.items())
    return plain_name(name) and (name in modules or known)


def side_files(
    source: Path, raw_config: dict[str, Any], also: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """The other files beside the source's tensors: names to copy, by an allow-list, and names to leave,
    printable.

    ``*.py`` files are copied only if an ``auto_map`` names them (``modules.py``); they are never imported.

    Args:
        also: names to copy too.
    Raises:
        OutputError: a file to copy can't be read, or is a link to somewhere else than the source or the hub
            cache that the source is part of; or ``also`` names what is no such file, or one that is written.
    """
    modules = python_modules(source, raw_config)
    wanted, skipped = [], []
    for path in sorted(source.iterdir()):
        name = path.name
        if name in ("config.json", "nemoquant.json") or name.endswith(
            (".safetensors", ".safetensors.index.json")
        ):
            continue  # written by the run itself, or files of tensors
        if (is_side_file(name, modules) or (plain_name(name) and name in also)) and (
            path.is_symlink() or path.is_file()
        ):
            _check(path)
            wanted.append(name)
        else:
            skipped.append(plain(name) + "/" * path.is_dir())
    missing = [name for name in also if name not in wanted]
    if missing:
        others = f"not copied are {listing(skipped)}" if skipped else "all its other files are copied"
        raise OutputError(
            f"--also {missing[0]}: expected the name of a file in {source} that is no config and has no "
            f"tensors; {others}"
        )
    return wanted, skipped


def _check(path: Path) -> Path:
    """Make sure that a file to copy is readable, and of this source; returns where it is."""
    try:
        here = lies_in(path.parent, path.name)
    except (OSError, RuntimeError):  # it leads nowhere, or in a circle
        raise OutputError(f"{path} is a link that leads nowhere; download it again, or remove it") from None
    target = path.resolve()
    if not here:
        raise OutputError(
            f"{path} is a link to {target}; expected a file in the source, or a link to a file in it or in "
            f"its hub cache: put a copy in place of the link, or remove it"
        )
    if not os.access(path, os.R_OK):
        raise OutputError(
            f"{path} cannot be read (permission denied); it belongs to the checkpoint: make it readable"
        )
    return target


def copy_side_files(source: Path, names: Sequence[str], folder: Path) -> None:
    """Copy these files into ``folder``; links are followed, because hub caches consist of links.

    Raises:
        OutputError: one leads somewhere else than when the run began; see :func:`side_files`.
    """
    for name in names:
        copy_again(_check(source / name), folder / name)

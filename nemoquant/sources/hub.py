"""What a model is called on the hub. Nothing here reads a file or reaches a network.

A name is ``nvidia/NAME``, ``nvidia/NAME@REVISION`` (a branch, a tag or a commit), the same after ``hf://``,
or the address of the model's page. The hub's cache keeps a model in the folder
``models--nvidia--NAME/snapshots/COMMIT``.
"""

import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from nemoquant.arguments import refuse
from nemoquant.files import plain_name

EXPECTED = "such as nvidia/NAME, nvidia/NAME@REVISION, hf://nvidia/NAME or https://huggingface.co/nvidia/NAME"
PREFIX = "models--"  # of a model's folder in the cache
SITES = ("huggingface.co", "www.huggingface.co", "hf.co")
ADDRESS = re.compile(r"(hf|https?):/+(.*)", re.DOTALL)  # a Path makes one slash of two
COMMIT = re.compile(r"[0-9a-f]{40}")
MOST_REVISION = 200  # characters
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


class HubName(NamedTuple):
    """A model of the hub; without a revision, its branch ``main``."""

    model: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.model if self.revision is None else f"{self.model}@{self.revision}"


class Snapshot(NamedTuple):
    """A model of the hub as it was at a commit."""

    model: str
    commit: str


@dataclass(frozen=True)
class Wanted:
    """What of a model is asked for.

    Attributes:
        weights: all that a verb may use; False is the settings, and the weights where they are there anyway.
        also: names of files that a download is to fetch too.
        admit: called with the path of the config before a download fetches weights; what it raises ends it.
    """

    weights: bool = True
    also: Collection[str] = ()
    admit: Callable[[Path], object] = lambda config: None


ALL, SETTINGS = Wanted(), Wanted(weights=False)


def is_hub_id(text: str) -> bool:
    """Whether this can be a model's name on the hub, ``organisation/name``."""
    strange = "--" in text or ".." in text or any(part[-1:] in "-." for part in text.split("/"))
    return bool(_ID.fullmatch(text)) and not strange and not text.endswith(".git")


def is_revision(text: str) -> bool:
    """Whether this can be a branch, a tag or a commit: parts between slashes that are plain names."""
    return len(text) <= MOST_REVISION and all(map(plain_name, text.split("/")))


def is_address(text: str) -> bool:
    """Whether a text says by itself that it is no path."""
    return ADDRESS.match(text) is not None


def hub_name(argument: str, text: str) -> HubName | None:
    """The model that a text names; None where it can only be a path.

    Raises:
        UsageError: it is an address, but of no model; ``argument`` is its name in the message.
    """
    address = ADDRESS.fullmatch(text)
    if address is None:
        return _name(text)
    found = _name(unquote(address[2].rstrip("/"))) if address[1] == "hf" else _page(f"//{address[2]}")
    if found is None:
        raise refuse(argument, text, f"a model of the hub {EXPECTED}")
    return found


def _name(text: str) -> HubName | None:
    model, at, revision = text.partition("@")
    if not is_hub_id(model) or (at and not is_revision(revision)):
        return None
    return HubName(model, revision or None)


def _page(address: str) -> HubName | None:
    """The model of a page: ``//SITE/nvidia/NAME``, with ``/tree/REVISION`` or ``/commit/REVISION``."""
    try:
        parts = urlsplit(address)
        sites = {*SITES, urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc}
    except ValueError:  # such as a bracket that nothing closes
        return None
    owner, name, kind, revision = ([*unquote(parts.path).strip("/").split("/", 3)] + [""] * 3)[:4]
    if parts.netloc not in sites or (kind and (kind not in ("tree", "commit") or not revision)):
        return None
    return _name(f"{owner}/{name}" + f"@{revision}" * bool(kind))


def named_by(folder: Path) -> str | None:
    """The name of the model whose folder in a cache this is, by the folder's own name; None if it is none."""
    model = folder.name.removeprefix(PREFIX).replace("--", "/", 1)
    return model if folder.name.startswith(PREFIX) and is_hub_id(model) else None


def origin(folder: Path) -> Snapshot | None:
    """The model and the commit of a snapshot in a cache; None where the folder is no such thing."""
    here = folder.resolve()
    model = named_by(here.parent.parent)
    if model is None or here.parent.name != "snapshots" or not is_revision(here.name):
        return None
    return Snapshot(model, here.name)


def from_hub(folder: Path) -> dict[str, dict[str, str]]:
    """What a record of what was made says of a source from the hub: ``hub``, its model and its commit."""
    source = origin(folder)
    return {} if source is None else {"hub": source._asdict()}


def called(folder: Path) -> str:
    """What to call a checkpoint in a report: by the hub where it is from there, else by its folder."""
    source = origin(folder)
    return folder.resolve().name if source is None else source.model

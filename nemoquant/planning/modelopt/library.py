"""Finds a recipe of Model Optimizer, checks what kind of file it is, and has its own loader read it.

A file is from elsewhere: before the loader gets it, its size, its depth and what its aliases stand for are
bounded, and so is every file of the user's that it imports. What is no recipe for quantizing is refused here,
without the seconds that Model Optimizer takes to start.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from nemoquant.arguments import home_expanded
from nemoquant.errors import MissingExtraError, RecipeError, brief, listing
from nemoquant.files import read_text
from nemoquant.planning.modelopt.entries import Theirs, from_json
from nemoquant.planning.modelopt.recognise import (
    MOST_BYTES,
    PARTS,
    PLAIN,
    PREFIX,
    QUANTIZE,
    SUFFIXES,
    part_of,
)

LIBRARY = "modelopt_recipes"  # the package with its recipes
MOST_VALUES = 65_536  # of a file, aliases written out; its longest has seven hundred
MOST_DEPTH = 32
MOST_DIGITS = 40  # of a number; of ``1:1:1:...`` YAML makes one in quadratic time
MOST_FILES = 64  # that one recipe imports
MOST_ENTRIES = 4096
SECONDS = 300  # to start and load; six on two cores
_MOVED = ("huggingface/models/", "models/")  # a folder of its library, before and now; its loader takes both


def load(name_or_path: str) -> Theirs:
    """The recipe of a name (with its prefix) or of a file or folder.

    Raises:
        RecipeError: it is not there, is no recipe for quantizing, or its loader refuses it.
        MissingExtraError: Model Optimizer is not installed.
    """
    path = _find(name_or_path)
    plain = _check_kind(path, name_or_path)
    answer = ask(path.resolve(), plain)
    if "refused" in answer:
        raise RecipeError(
            f"recipe {name_or_path}: Model Optimizer's own loader refuses it: {_one_line(answer['refused'])}"
        )
    if len(answer["entries"]) > MOST_ENTRIES:
        raise RecipeError(
            f"recipe {name_or_path}: {PLAIN} has {len(answer['entries']):,} entries; expected at most "
            f"{MOST_ENTRIES:,}"
        )
    return from_json(name_or_path, _title(path), answer)


def ask(path: Path, plain: bool) -> Mapping[str, Any]:
    """What ``worker.py`` answers for a path."""
    command = [
        sys.executable,
        "-P",
        str(Path(__file__).with_name("worker.py")),
        *([PLAIN] * plain),
        str(path),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # nothing it imports has a reason to connect
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False, env=environment)
        answer: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"refused": f"it did not end within {SECONDS} s"}
    except ValueError:  # it was killed, or could not start
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        return {"refused": f"it ended with exit code {done.returncode}: {' '.join(last)}"}
    return answer


def folder() -> Path:
    """The folder of its recipes; nothing of Model Optimizer is imported.

    Raises:
        MissingExtraError
    """
    found = find_spec(LIBRARY) if find_spec("modelopt") else None
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError(
            "recipes of Model Optimizer need the extra `modelopt`, whose loader reads them: "
            "pip install 'nemoquant[modelopt]'"
        )
    return Path(found.submodule_search_locations[0])


def _find(name_or_path: str) -> Path:
    """A file or folder that is there."""
    library = folder()
    if not name_or_path.startswith(PREFIX):
        return Path(home_expanded(name_or_path))
    name = name_or_path.removeprefix(PREFIX)
    if name.startswith(_MOVED[0]):
        name = name.replace(*_MOVED, 1)
    known = {
        path.relative_to(library).as_posix(): path for path in library.rglob("*") if path.suffix in SUFFIXES
    }
    for candidate in (name, *(name + suffix for suffix in SUFFIXES)):
        if candidate in known:
            return known[candidate]
    names = [known_name.rpartition(".")[0] for known_name in known]
    near = get_close_matches(name, names, 3, 0.5) or [n for n in names if n.startswith("general/ptq/")][:3]
    raise RecipeError(
        f"recipe {brief(name_or_path)} is not in Model Optimizer's library; expected one such as "
        f"{listing([PREFIX + one for one in near])}; its names are the paths below {library}"
    )


def _check_kind(path: Path, name: str) -> bool:
    """Whether a file is a ``quant_cfg`` without sections around it.

    Raises:
        RecipeError: it is no recipe for quantizing, or not what may be given to a loader.
    """
    if path.is_dir():
        for part in PARTS:
            file = part_of(path, part)
            if file is None:
                raise RecipeError(
                    f"recipe {name} has no {part}{SUFFIXES[0]}; expected {' and '.join(PARTS)} in a folder "
                    f"that is a recipe of Model Optimizer"
                )
            _check_imports(_documents(file, name), name, [])
        return False
    if path.suffix not in SUFFIXES:
        raise RecipeError(
            f"recipe {name} is one of Model Optimizer, whose loader takes files that end in "
            f"{' or '.join(SUFFIXES)}; give it such a name"
        )
    documents = _documents(path, name)
    top = documents[-1] if documents else None
    keys = {key for document in documents if isinstance(document, dict) for key in document}
    if not isinstance(top, dict) or not keys & {QUANTIZE, PLAIN} or "auto_quantize" in keys:
        raise RecipeError(f"recipe {name} {_what_it_is(top, keys)}")
    _check_imports(documents, name, [])
    return QUANTIZE not in keys


def _what_it_is(top: object, keys: set[Any]) -> str:
    """What a file is that quantizes nothing by itself, and what to do."""
    whole = f"expected a whole recipe, with `metadata` and `{QUANTIZE}`, or with `{PLAIN}`"
    kind = top.get("metadata") if isinstance(top, dict) else None
    kind = kind.get("recipe_type") if isinstance(kind, dict) else None
    if "auto_quantize" in keys:
        return (
            "is a search (auto_quantize), which is not done here: quantize by a preset such as nvfp4, let "
            "`nemoquant diff` rank layers and modules by what they cost, and give the worst another format "
            "in a recipe of your own (docs/diff.md)"
        )
    if isinstance(kind, str) and kind.startswith("speculative"):
        return (
            f"trains a draft model ({brief(kind)}) and quantizes nothing; {whole}. The model's own "
            f"multi-token prediction is kept as it is by every recipe"
        )
    if isinstance(top, list) or keys & {"quantizer_name", "num_bits", "block_sizes"}:
        return f"is a part of recipes, which others import, and says nothing by itself; {whole}"
    shown = ", ".join(sorted(map(str, keys))[:6]) or "none"
    return f"is no recipe for quantizing (its keys: {shown}); {whole}"


def _documents(path: Path, name: str) -> list[Any]:
    """The YAML documents of a file, which has been found to be small, aliases written out.

    Raises:
        RecipeError
    """
    try:
        text = read_text(path, MOST_BYTES)
        for root in yaml.compose_all(text, yaml.SafeLoader):
            _check_size(root, {}, ())
        return list(yaml.safe_load_all(text))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        where = "" if Path(home_expanded(name)) == path else f", {path.name},"
        raise RecipeError(f"recipe {name}{where} cannot be read as YAML: {_one_line(str(error))}") from None


def _check_size(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values a node stands for; of a node that is there twice, known from the first time.

    Raises:
        ValueError: too many, too deep, or without end.
    """
    if id(node) in above:
        raise ValueError("a value contains itself")
    if len(above) > MOST_DEPTH:
        raise ValueError(f"it is deeper than {MOST_DEPTH} levels")
    if id(node) not in known:
        count = 1
        for inner in _inside(node):
            count += _check_size(inner, known, (*above, id(node)))
        if count > MOST_VALUES:
            raise ValueError(f"it stands for more than {MOST_VALUES:,} values")
        known[id(node)] = count
    return known[id(node)]


def _inside(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif node.tag.endswith((":int", ":float")) and len(node.value) > MOST_DIGITS:
        raise ValueError(f"a number of {len(node.value):,} characters")


def _check_imports(documents: list[Any], name: str, seen: list[Path]) -> None:
    """Each file of the user's that is imported, and what those import; the library's own are trusted.

    Model Optimizer looks below the current folder first, then in its library.
    """
    for document in documents:
        imports = document.get("imports") if isinstance(document, dict) else None
        for wanted in imports.values() if isinstance(imports, dict) else ():
            if not isinstance(wanted, str):
                continue  # its loader refuses it
            ends = ("",) if wanted.endswith(SUFFIXES) else SUFFIXES
            path = next((p for end in ends if (p := Path(wanted + end)).is_file()), None)
            if path is None or path in seen:
                continue
            seen.append(path)
            if len(seen) > MOST_FILES:
                raise RecipeError(f"recipe {name} imports more than {MOST_FILES} files; expected fewer")
            _check_imports(_documents(path, name), name, seen)


def _title(path: Path) -> str:
    """A name for the recipe of ours: that of no preset, and without the folders above."""
    stem = path.name if path.is_dir() else path.stem
    return "modelopt-" + (re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-")[:80] or "recipe")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]

"""What the user's word for a text stands for: a file, a folder, or a data set by name.

``given`` is the one place where a word is resolved. What is on the disk under that path comes first, so that
a name never hides a file.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemoquant.errors import CalibrationError
from nemoquant.files import plain_name, read_json
from nemoquant.tokens import hub
from nemoquant.tokens.kinds import EXPECTED, is_known, kind_of
from nemoquant.words import plain

MOST_FILES = 100_000
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what `datasets` calls save_to_disk
PREFERRED = "train"


@dataclass(frozen=True)
class Given:
    """Files of text.

    Attributes:
        name: what the user calls it, printable.
        parts: files in their order; documents are taken from the parts in turn, for data sets of several
            splits.
        columns: of a data set whose text is in no column that is known.
        left_out: files of a folder that are of no known kind.
    """

    name: str
    parts: tuple[tuple[Path, ...], ...]
    columns: tuple[str, ...] = ()
    left_out: int = 0


def given(data: Path) -> Given:
    """The files that a path or a word stands for.

    Raises:
        CalibrationError: there are none; for a data set, says how to get it. MissingExtraError
    """
    if os.path.lexists(data):
        return _on_disk(data)
    found = None if is_known(data) else hub.data_set(str(data))  # data/x.jsonl is a file that is missing
    if found is None:
        raise CalibrationError(f"{data} does not exist; expected {EXPECTED}")
    return Given(plain(str(data)), hub.files(found), found.columns)


def _on_disk(data: Path) -> Given:
    name = plain(data.name or str(data))
    if data.is_file():
        kind_of(data)
        return Given(name, ((data,),))
    if not data.is_dir():
        raise CalibrationError(f"{data} is not a file; expected {EXPECTED}")
    folder = _saved_split(data)
    found = _files(folder)
    is_saved = (folder / SAVED).is_file()  # beside its tables are descriptions of it
    known = [path for path in found if (path.suffix == ".arrow" if is_saved else is_known(path))]
    if not known:
        raise CalibrationError(f"{data} is a folder without a file that is read; expected {EXPECTED}")
    return Given(name, (tuple(known),), (), 0 if is_saved else len(found) - len(known))


def _files(folder: Path) -> list[Path]:
    """All files below a folder, sorted by their paths, without those that are hidden."""
    found: list[Path] = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        paths = (Path(where, name) for name in names if not name.startswith((".", "_")))
        found += [path for path in paths if path.is_file()]
        if len(found) > MOST_FILES:
            raise CalibrationError(f"{folder} holds more than {MOST_FILES:,} files; name a folder of fewer")
    return sorted(found)


def _saved_split(folder: Path) -> Path:
    """The split of a data set that ``datasets`` saved: the one for training, or the only one."""
    if not (folder / SAVED_SPLITS).is_file():
        return folder
    try:
        data: Any = read_json(folder / SAVED_SPLITS)
        splits = [n for n in data["splits"] if plain_name(n) and (folder / n / SAVED).is_file()]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CalibrationError(
            f"{folder / SAVED_SPLITS} cannot be read ({error}); expected the splits of a data set"
        ) from None
    if PREFERRED not in splits and len(splits) != 1:
        raise CalibrationError(
            f"{folder} holds the splits {', '.join(splits) or '(none)'}; name the folder of one"
        )
    return folder / (PREFERRED if PREFERRED in splits else splits[0])

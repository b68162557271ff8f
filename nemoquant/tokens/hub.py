"""Data sets of the Hugging Face hub by name, from the caches on this machine: nothing reaches the network.

    OWNER/NAME                      its split `train`
    OWNER/NAME:CONFIG               of one configuration
    OWNER/NAME:CONFIG:SPLIT         of one split; OWNER/NAME::SPLIT where there is one configuration
    cnn_dailymail, ...              those that are customary for this family, as ``CUSTOMARY`` has them

Two caches are looked into: the hub's, which ``hf download --repo-type dataset`` fills, where `datasets`
tells which files are a split's, and that of `datasets`, which ``load_dataset`` fills with Arrow files. The
files are read here as any others: no code of a data set is run.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nemoquant.errors import CalibrationError, MissingExtraError, listing
from nemoquant.files import read_text

TRAIN = "train"
_ID = re.compile(r"(?P<repo>[\w.-]{1,96}/[\w.-]{1,96})(?::(?P<config>[\w.-]*))?(?::(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class DataSet:
    """A data set of the hub.

    Attributes:
        config, splits: None and empty are the only ones, or ``train``.
        columns: those of its text, where no known name says it.
    """

    repo: str
    config: str | None = None
    splits: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


def _nvidia(name: str, *splits: str) -> DataSet:
    return DataSet(f"nvidia/{name}", None, splits)


_POST_TRAINING_2 = _nvidia("Nemotron-Post-Training-Dataset-v2", "stem", "chat", "math", "code")
CUSTOMARY: Mapping[str, DataSet] = MappingProxyType(  # names, splits: as Model Optimizer 0.47 has them
    {
        "cnn_dailymail": DataSet("abisee/cnn_dailymail", "3.0.0", (TRAIN,), ("article",)),
        "nemotron-post-training": _POST_TRAINING_2,
        "nemotron-post-training-dataset-v2": _POST_TRAINING_2,
        "nemotron-post-training-dataset-v1": _nvidia(
            "Nemotron-Post-Training-Dataset-v1", "stem", "chat", "math", "code", "tool_calling"
        ),
        "llama-nemotron-post-training-dataset": DataSet(
            "nvidia/Llama-Nemotron-Post-Training-Dataset",
            "SFT",
            ("code", "math", "science", "chat", "safety"),
        ),
        "nemotron-sft-instruction-following-chat-v2": _nvidia(
            "Nemotron-SFT-Instruction-Following-Chat-v2", "reasoning_off"
        ),
        "nemotron-science-v1": _nvidia("Nemotron-Science-v1", "MCQ", "RQA"),
        "nemotron-sft-agentic-v2": _nvidia("Nemotron-SFT-Agentic-v2", "search"),
        "nemotron-math-v2": _nvidia(
            "Nemotron-Math-v2", "high_part00", "high_part01", "high_part02", "medium", "low"
        ),
        "open_code_reasoning": DataSet("nvidia/OpenCodeReasoning", "split_0", ("split_0",)),
        "open_math_reasoning": _nvidia("OpenMathReasoning", "cot", "tir", "genselect"),
        "wikitext": DataSet("Salesforce/wikitext", "wikitext-103-v1", (TRAIN,)),
    }
)


def data_set(word: str) -> DataSet | None:
    """The data set that a word names; None where it names none."""
    if word in CUSTOMARY:
        return CUSTOMARY[word]
    found = _ID.fullmatch(word)
    if found is None or word.startswith("."):
        return None
    split = found["split"]
    return DataSet(found["repo"], found["config"] or None, (split,) if split else ())


def files(wanted: DataSet) -> tuple[tuple[Path, ...], ...]:
    """The files of a data set on this machine, a group for each of its splits.

    Raises:
        CalibrationError: it is not here, with the command that downloads it; or has other splits.
        MissingExtraError: the package `datasets` is not installed.
    """
    snapshot = _snapshot(wanted.repo)
    if snapshot is not None:
        return _of_snapshot(wanted, snapshot)
    prepared = _prepared(wanted)
    if prepared is not None:
        return prepared
    raise CalibrationError(
        f"{wanted.repo} is neither a file nor a data set in the hub's cache on this machine, and nothing is "
        f"downloaded by itself; run: hf download --repo-type dataset {wanted.repo}"
    )


def _snapshot(repo: str) -> Path | None:
    """Its folder in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, repo_type="dataset", local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _of_snapshot(wanted: DataSet, snapshot: Path) -> tuple[tuple[Path, ...], ...]:
    """The files that its card, or else their names, give to each split; `datasets` knows the rules.

    Not by its builders: these want all files of all splits, and a download may have some.
    """
    try:
        from datasets import data_files
    except ImportError:
        raise MissingExtraError(
            f"{wanted.repo} needs the extra `datasets`, which tells the files of its splits: pip install "
            f"'nemoquant[datasets]'; or give its files instead"
        ) from None
    try:
        base, patterns = _patterns(wanted, snapshot)
        found = {}
        for split, several in patterns.items():
            paths = [path for pattern in several for path in _resolved(data_files, pattern, base)]
            if paths:
                found[str(split)] = tuple(map(Path, dict.fromkeys(paths)))
    except CalibrationError:
        raise
    except Exception as error:  # of any kind: a card is a stranger's YAML
        raise CalibrationError(
            f"{wanted.repo}, in {snapshot}, cannot be read as a data set "
            f"({' '.join(str(error).split())[:300]}); give its files instead"
        ) from None
    return tuple(found[split] for split in _splits(wanted, list(found)))


def _patterns(wanted: DataSet, snapshot: Path) -> tuple[Path, dict[str, Any]]:
    """Where the files of a configuration lie, and the patterns of their names for each split."""
    from datasets.data_files import get_data_patterns, sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    card = snapshot / "README.md"
    text = read_text(card) if card.exists() else ""
    configs = MetadataConfigs.from_dataset_card_data(DatasetCard(text, ignore_metadata_errors=True).data)
    name = wanted.config or configs.get_default_config_name()
    if configs and name not in configs:
        raise CalibrationError(
            f"{wanted.repo} has the configurations {listing(list(configs))}; name one as {wanted.repo}:CONFIG"
        )
    settings = configs.get(name, {})
    base = snapshot / _inside(str(settings.get("data_dir") or "."))
    given = settings.get("data_files")
    return base, dict(sanitize_patterns(given) if given else get_data_patterns(str(base)))


def _resolved(data_files: Any, pattern: str, base: Path) -> list[str]:
    """The files of a pattern that are here."""
    try:
        found: list[str] = data_files.resolve_pattern(_inside(pattern), str(base))
    except FileNotFoundError:
        return []
    return found


def _inside(pattern: str) -> str:
    """A name below a folder: an address would reach the network, and another path leave the folder."""
    if "://" in pattern or ".." in pattern.split("/") or pattern.startswith("/"):
        raise CalibrationError(f"a data set's card names {pattern}; expected files beside it")
    return pattern


def _splits(wanted: DataSet, there: list[str]) -> tuple[str, ...]:
    """The splits to read, of those that are there."""
    splits = wanted.splits or ((TRAIN,) if TRAIN in there or len(there) != 1 else tuple(there))
    missing = [split for split in splits if split not in there]
    if missing:
        raise CalibrationError(
            f"{wanted.repo} has no split {listing(missing)} on this machine; it has "
            f"{listing(sorted(there)) or 'none'}: name one as {wanted.repo}:{wanted.config or ''}:SPLIT, or "
            f"run: hf download --repo-type dataset {wanted.repo}"
        )
    return splits


def _prepared(wanted: DataSet) -> tuple[tuple[Path, ...], ...] | None:
    """Its Arrow files in the cache of `datasets`: OWNER___NAME/CONFIG/VERSION/HASH/NAME-SPLIT.arrow."""
    root = _prepared_root() / wanted.repo.replace("/", "___")
    configs = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not configs:
        return None
    config = wanted.config or (configs[0] if len(configs) == 1 else "default")
    if config not in configs:
        raise CalibrationError(
            f"{wanted.repo} has {listing(configs)} in {root}; name one as {wanted.repo}:CONFIG"
        )
    name = wanted.repo.split("/")[1]
    found: dict[str, list[Path]] = {}
    # The newest of several versions: its folder was made last.
    made = {path.parent for path in (root / config).rglob("*.arrow") if ".incomplete" not in str(path)}
    for folder in sorted(made, key=lambda path: path.stat().st_mtime):
        shards: dict[str, list[Path]] = {}
        for path in sorted(folder.glob("*.arrow")):
            split = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem.removeprefix(f"{name}-"))
            if not path.name.startswith("cache-"):  # what map() and filter() left
                shards.setdefault(split, []).append(path)
        found = shards or found
    return tuple(tuple(found[split]) for split in _splits(wanted, list(found)))


def _prepared_root() -> Path:
    """Where `datasets` keeps what it prepared, by its own rules."""
    home = Path(
        os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    )
    return Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser()

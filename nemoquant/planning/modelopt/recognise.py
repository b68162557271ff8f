"""Whose recipe a name or a file is: Model Optimizer's has a prefix, or keys that ours has not."""

from pathlib import Path

import yaml

from nemoquant.arguments import home_expanded
from nemoquant.files import read_text

PREFIX = "modelopt:"  # before a name in its library
SUFFIXES = (".yaml", ".yml")  # its loader takes no others
PARTS = ("metadata", "quantize")  # the files of a recipe that is a folder, without their suffix
MOST_BYTES = 256 << 10  # of a file; its longest has twelve kilobytes
QUANTIZE, PLAIN = "quantize", "quant_cfg"  # the section of a recipe; the list in it, or of a file without any
# Keys at the top of its files, whole recipes and parts of them. None of ours is among them.
_KEYS = {"metadata", "imports", QUANTIZE, PLAIN, "algorithm", "auto_quantize", "eagle", "dflash", "medusa"}
_OURS = {"rules", "extends"}  # a file with one of them is ours, in which other keys are mistakes
_PART_KEYS = {"quantizer_name", "num_bits", "block_sizes"}


def is_theirs(name_or_path: str) -> bool:
    """Whether a name or file is a recipe of Model Optimizer, or a part of one; False if it can't be read."""
    if name_or_path.startswith(PREFIX):
        return True
    path = Path(home_expanded(name_or_path))
    try:
        if path.is_dir():
            return part_of(path, PARTS[0]) is not None
        keys = _keys(read_text(path, MOST_BYTES))
        return bool((_KEYS | _PART_KEYS) & keys) and not _OURS & keys
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False


def part_of(folder: Path, part: str) -> Path | None:
    """The file of a part of a recipe that is a folder; None if it is not there."""
    return next((p for suffix in SUFFIXES if (p := folder / (part + suffix)).is_file()), None)


def _keys(text: str) -> set[str]:
    """The keys at the top of a YAML file's documents; of lists, those of their items.

    Nothing is constructed: in nodes, what an alias stands for is there once.
    """
    keys: set[str] = set()
    for root in yaml.compose_all(text, yaml.SafeLoader):
        for node in root.value if isinstance(root, yaml.SequenceNode) else [root]:
            if isinstance(node, yaml.MappingNode):
                keys |= {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
    return keys

"""Names in files where the language model is a part of another: its prefix, and the towers beside it.

Everything else here speaks of published names; they get the prefix that the tensors have in such a file, and
lose it. A tower is excluded as a whole, by a pattern as Model Optimizer writes it (``vision_model*``), which
vLLM reads as a part of a name, and SGLang as a part between dots too.
"""

from collections.abc import Callable, Iterable

from nemoquant.model.names import is_mtp
from nemoquant.model.nested import TOWER
from nemoquant.planning.plan import Plan

Rename = Callable[[str], str]
RenameAll = Callable[[Iterable[str]], list[str]]
MOST_WILDCARDS = (
    512  # in one list of patterns: each is tried on every module; published ones have one a layer
)
MOST_PATTERN = 200  # characters of a pattern
_ALL = "Linear"  # a target of a group that is no module


def in_file(name: str, role: str, prefix: str) -> str:
    """The name in a file of a tensor or module; ``role`` is that of its tensor."""
    return name if role == TOWER else prefix + name


def adding(prefix: str) -> tuple[Rename, RenameAll]:
    """Published names to those of a file: of a module, and of a list of exclusions.

    Exclusions of multi-token prediction stay beside their prefixed ones: a draft model is loaded without
    prefix.
    """

    def all_of(listed: Iterable[str]) -> list[str]:
        both = (
            [prefix + name, name] if is_mtp(f"{name.rstrip('*')}.") else [prefix + name] for name in listed
        )
        return list(dict.fromkeys(name for names in both for name in names))

    return lambda name: name if name == _ALL else prefix + name, all_of


def removing(prefix: str) -> tuple[Rename, RenameAll]:
    """The reverse of :func:`adding`; what has no prefix stays."""
    return lambda name: name.removeprefix(prefix), lambda names: [n.removeprefix(prefix) for n in names]


def tower_patterns(plan: Plan, plain_too: bool) -> list[str]:
    """Exclusions that match every module of a tower, and none that is quantized.

    vLLM matches an entry within any name: the first part of a tower's names does where no quantized module
    has it in its own, else as many parts as that takes.

    What is too long for a pattern, or more than there may be, has no asterisk: it is the module itself then.

    Args:
        plain_too: also without the asterisk, for engines that read no pattern.
    """
    quantized = "\n".join(in_file(row.module, row.role, plan.config.prefix) for row in plan.quantized)
    found: dict[str, None] = {}
    for row in plan.rows:
        if row.role != TOWER:
            continue
        parts = row.module.split(".")
        paths = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        path = next((path for path in paths if path in found or path not in quantized), row.module)
        found[path] = None
    short = [path for path in found if len(path) < MOST_PATTERN][: MOST_WILDCARDS // 2]
    wild = {path: f"{path}*" for path in short}
    return [
        entry
        for path in found
        for entry in ([wild[path], path] if plain_too and path in wild else [wild.get(path, path)])
    ]

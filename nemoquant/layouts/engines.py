"""What engines do with the file of a plan, by the table in ``engine_rows.py``.

``plan``, the model card, the README and the commands for serving read it, and nothing else says what loads a
file. Which files were loaded and compared is in ``layouts/checked.py``.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

from nemoquant.layouts import ENGINES, RIGHT
from nemoquant.layouts.checked import CHECKED
from nemoquant.layouts.engine_rows import (
    BESIDE,
    EXPERTS,
    FAMILIES,
    LEAST,
    LINEAR,
    ORDER,
    ROWS,
    Row,
    Runs,
)
from nemoquant.layouts.modelopt import MIXED, algorithm, declared_name, is_listed
from nemoquant.planning.plan import Plan

READERS = ("transformers", "llama.cpp")  # what people try too


class Outcome(NamedTuple):
    """What an engine does with a whole file on one GPU; ``since`` is empty where it does not run it.

    ``options``: of its command, without which it is wrong.
    """

    runs: Runs
    since: str
    notes: tuple[str, ...]
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.runs}, {self.since}" if self.since else self.runs


class Mixture(NamedTuple):
    """What of the layout is in a file.

    Attributes:
        parts: (algorithm, part) of everything quantized, as ``ROWS`` have them.
        algorithm: that the config files declare for the whole file; empty where nothing is quantized.
    """

    parts: frozenset[tuple[str, str]]
    algorithm: str

    @property
    def names(self) -> frozenset[str]:
        """All algorithms that are in it."""
        return frozenset(name for name, part in self.parts if part in (LINEAR, EXPERTS) and name != MIXED)


def mixture(plan: Plan) -> Mixture:
    """Of the file of a plan."""
    found: set[tuple[str, str]] = set()
    for row in plan.quantized:
        name = algorithm(row)
        found |= {(name, LINEAR if row.expert is None else EXPERTS), (name, row.role)}
    names = {name for name, _ in found}
    if len(names) > 1:
        found |= {(name, BESIDE) for name in names}
    if is_listed(names):
        found.add((MIXED, LINEAR))
    whole = MIXED if is_listed(names) else next(map(declared_name, names), "")
    return Mixture(frozenset(found), whole)


@cache
def outcome(file: Mixture, engine: str, sm: int) -> Outcome:
    """What an engine does with a file on a GPU of compute capability ``sm``."""
    here = (row for row in ROWS if row.engine == engine and sm in row.on.sms)
    rows = [row for row in here if (row.algorithm, row.part) in file.parts]
    does = [row.on for row in rows]
    needed = {(name, part) for name, part in file.parts if part in (LINEAR, EXPERTS)}
    known = {(row.algorithm, row.part) for row in rows}
    runs: set[Runs] = {on.runs for on in does}
    if sm < LEAST.get((engine, file.algorithm), 0) or needed - known:
        runs.add("refused")
    worst: Runs = max(runs, key=ORDER.index, default="native")
    since = max((on.since for on in does if on.since), key=_age, default="")
    telling = (on for on in does if on.note and (worst in RIGHT or on.runs == worst))
    notes = tuple(dict.fromkeys(on.note for on in telling))
    options = tuple(option for on in does for option in on.options)
    return Outcome(worst, since if worst in RIGHT else "", notes, options)


def why_not(file: Mixture, engine: str, sm: int) -> str:
    """Why an engine does not run a file on a GPU, in words."""
    found, least = outcome(file, engine, sm), LEAST.get((engine, file.algorithm), 0)
    if sm < least:
        return f"{found.runs}, it asks for SM {least} or later"
    return "; ".join((found.runs, *found.notes))


def _age(version: str) -> tuple[bool, list[int]]:
    """Order of versions; one without a number is later than all with one."""
    numbered = version[:1].isdigit()
    return not numbered, [int(part) for part in re.findall(r"\d+", version)] if numbered else []


def notes(file: Mixture, engines: Iterable[str] = (*ENGINES.values(), *READERS)) -> list[str]:
    """What to know about engines that load a file, or seem to; without :func:`cautions`."""
    found = (
        f"{engine}: {note}"
        for engine in engines
        for sms in FAMILIES.values()
        for note in outcome(file, engine, sms[0]).notes
        if all(note != row.on.note for row in _silent())
    )
    return list(dict.fromkeys(found))


def _silent() -> Iterator[Row]:
    """Rows of serving engines that compute something else without an error."""
    return (row for row in ROWS if row.on.runs == "wrong" and row.engine in ENGINES.values())


def cautions(plan: Plan) -> list[str]:
    """What a user must know before serving the file of a plan: where an engine is silently wrong."""
    present = mixture(plan).parts
    modules = Counter(algorithm(row) for row in plan.quantized)
    parts = Counter((algorithm(row), LINEAR if row.expert is None else EXPERTS) for row in plan.quantized)
    roles = Counter((algorithm(row), row.role) for row in plan.quantized)
    found = []
    for row in _silent():
        if (row.algorithm, row.part) not in present:
            continue
        if row.part == BESIDE:
            who = f"{modules[row.algorithm]} modules are {row.algorithm} beside other formats"
        elif (count := parts[row.algorithm, row.part]) > 0:
            who = f"{count} {'experts' if row.part == EXPERTS else 'modules'} are {row.algorithm}"
        elif (count := roles[row.algorithm, row.part]) > 1:
            who = f"{count} {row.part} modules are {row.algorithm}"
        else:
            who = f"{row.part} is {row.algorithm}"
        found.append(f"{who}: {row.on.note}")
    return list(dict.fromkeys(found))


def header(engines: Iterable[str] = ENGINES.values()) -> tuple[str, ...]:
    """Of :func:`table`."""
    return ("GPU", *engines)


def table(file: Mixture, engines: Iterable[str] = ENGINES.values()) -> list[tuple[str, ...]]:
    """For each family of GPUs what each engine does with a file."""
    names = list(engines)
    return [
        (in_words(title), *(str(outcome(file, engine, sms[0])) for engine in names))
        for title, sms in FAMILIES.items()
    ]


def in_words(family: str) -> str:
    """A family with its compute capabilities: ``B200, B300 (SM 100, 103)``."""
    return f"{family} (SM {', '.join(map(str, FAMILIES[family]))})"


def markdown_table(file: Mixture) -> list[str]:
    """The same as the lines of a Markdown table."""
    lines = [header(), ("---",) * len(header()), *table(file)]
    return [f"| {' | '.join(line)} |" for line in lines]


def proof(file: Mixture) -> str:
    """A sentence on how it is known: engines that loaded a file of these algorithms, or where it was read."""
    loaded = [
        f"{check.engine} {check.version}"
        for check in CHECKED
        if file.names in check.mixtures and not _is_wrong(file, check.engine)
    ]
    if not loaded:
        return "The table was read in the engines' sources; none of them was run on a file of these formats."
    return (
        f"Files of these formats were loaded by {' and '.join(loaded)} on {CHECKED[0].date}, by their own "
        f"code on a CPU, every weight compared; no kernel of theirs was run. The table was read in their "
        f"sources."
    )


def _is_wrong(file: Mixture, engine: str) -> bool:
    return any(outcome(file, engine, sms[0]).runs == "wrong" for sms in FAMILIES.values())

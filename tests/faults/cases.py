"""What came out of one fault, and the table of all of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        suite, scene: what was running.
        fault: what was done to it, with all that repeats it.
        outcome: a few words, the same for all cases that ended alike.
        problems: what is not as it should be; empty where all is.
        number: of faults that this stands for.
    """

    suite: str
    scene: str
    fault: str
    outcome: str
    problems: tuple[str, ...] = ()
    number: int = 1


def table(cases: Sequence[Case]) -> str:
    """A line for each suite, scene and outcome, with their number; then every problem."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for case in cases:
        counts[(case.suite, case.scene, case.outcome)] += case.number
    lines = ["| suite | scene | what came out | cases |", "|---|---|---|---:|"]
    lines += [
        f"| {suite} | {scene} | {outcome} | {n:,} |" for (suite, scene, outcome), n in sorted(counts.items())
    ]
    bad = [case for case in cases if case.problems]
    lines += ["", f"{counts.total():,} cases, {len(bad):,} with problems"]
    for case in bad:
        lines.append(f"- {case.suite}, {case.scene}, {case.fault} ({case.outcome}):")
        lines += [f"    {problem}" for problem in case.problems]
    return "\n".join(lines)

"""What a recipe of Model Optimizer asks for and can't be done here: one error for all, with what to do."""

from collections import defaultdict

from nemoquant.errors import RecipeError, listing
from nemoquant.formats import CACHE_FORMATS, FORMATS, METHODS
from nemoquant.planning.modelopt.algorithm import KNOWN, Algorithm
from nemoquant.planning.modelopt.entries import Theirs
from nemoquant.planning.modelopt.quantizers import State
from nemoquant.planning.modelopt.recognise import PLAIN

MOST_SHOWN = 4  # problems in a message


class Problems:
    """What can't be done, with the modules that each concerns, and what to do."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.found: dict[str, dict[str, None]] = defaultdict(dict)  # modules once, in order
        self.switches: list[str] = []  # patterns that would switch off what was found

    def add(self, state: State, module: str, what: str, switch: str) -> None:
        said = f"entry '{state.said}'" if state.said is not None else "no entry says otherwise"
        self.found[f"{what} ({said})"][module] = None
        pattern = "*" if state.said is None else switch
        if pattern not in self.switches:
            self.switches.append(pattern)

    def error(self, theirs: Theirs) -> RecipeError | None:
        """The error for all of them; None if there are none."""
        lines = [f"{what}: {listing(list(modules), 2)}" for what, modules in self.found.items()]
        todo = []
        if self.algorithm.problem:
            lines.insert(0, self.algorithm.problem)
            todo.append(
                f"take one of the algorithms {', '.join(KNOWN)}, and choose a method of ours with --method "
                f"({', '.join(METHODS)})"
            )
        if "*" in self.switches:
            todo.append(f"begin {PLAIN} with {_switching('*')}, or give them a format that can be done")
        elif self.switches:
            todo.append(
                f"give them a format that can be done ({', '.join(FORMATS)}; the KV cache "
                f"{', '.join(CACHE_FORMATS)}), or end {PLAIN} with "
                f"{' and '.join(map(_switching, self.switches[:MOST_SHOWN]))}"
            )
        if not lines:
            return None
        more = f"; and {len(lines) - MOST_SHOWN} more" if len(lines) > MOST_SHOWN else ""
        return RecipeError(
            f"recipe {theirs.name} asks for what can't be done: {'; '.join(lines[:MOST_SHOWN])}{more}. "
            f"To do: {'; '.join(todo)}"
        )


def _switching(pattern: str) -> str:
    return f"`- {{quantizer_name: '{pattern}', enable: false}}`"

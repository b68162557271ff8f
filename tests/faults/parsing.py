"""Files made to harm, for every parser of a file from elsewhere: see ``fuzz.py``."""

import random
from collections.abc import Iterator

from . import fuzz
from .cases import Case
from .world import World


def run(world: World, choose: random.Random, long: bool) -> Iterator[Case]:
    """A row for each parser."""
    for result in fuzz.run(300_000 if long else 500, choose.randrange(1 << 16), folder=world.root()):
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in result.errors.most_common())
        outcome = f"{result.accepted:,} read, {kinds or 'none refused'}"
        outcome += f"; at most {result.longest:.2f} s and {result.largest / 1e6:,.0f} MB"
        yield Case("parsing", result.parser, "damaged files", outcome, tuple(result.failures), result.cases)

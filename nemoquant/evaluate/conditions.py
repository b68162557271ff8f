"""``--fail-if 'kl > 0.02'``: a figure of a candidate, a comparison, a number; nothing else is evaluated."""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from nemoquant.errors import UsageError
from nemoquant.evaluate.schema import Candidate, Report

METRICS: dict[str, Callable[[Candidate], float | None]] = {
    "kl": lambda c: c.logits.kl.mean,
    "kl_median": lambda c: c.logits.kl.median,
    "kl_p99": lambda c: c.logits.kl.p99,
    "kl_max": lambda c: c.logits.kl.max,
    "perplexity": lambda c: c.logits.perplexity,
    "perplexity_ratio": lambda c: c.logits.perplexity_ratio,
    "top1": lambda c: c.logits.top1_agreement,
    "top5": lambda c: c.logits.top5_agreement,
    "mtp_acceptance": lambda c: c.mtp_acceptance,
    "flipped": lambda c: max((layer.routing.flipped for layer in c.layers if layer.routing), default=None),
    "bits_per_weight": lambda c: c.bits_per_weight,
}
OPERATORS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_FORM = re.compile(r"\s*(\w+)\s*([<>]=?)\s*(\S+)\s*")


@dataclass(frozen=True)
class Condition:
    """``NAME OP NUMBER``; a candidate that meets it fails."""

    metric: str
    operator: str
    limit: float

    @staticmethod
    def parse(text: str) -> "Condition":
        """Read a condition.

        Raises:
            UsageError: it has another form, the name is unknown, or the number is not finite.
        """
        match = _FORM.fullmatch(text)
        try:
            limit = float(match[3]) if match else math.nan
        except ValueError:
            limit = math.nan
        if match is None or not math.isfinite(limit):
            raise UsageError(
                f"--fail-if {text!r}: expected NAME OP NUMBER, OP one of {' '.join(OPERATORS)}, a finite "
                f"number, such as 'kl > 0.02'"
            )
        if match[1] not in METRICS:
            raise UsageError(
                f"--fail-if {text!r}: there is no figure {match[1]!r}; figures are {', '.join(METRICS)}"
            )
        return Condition(match[1], match[2], limit)

    def failures(self, report: Report) -> list[str]:
        """A line for each candidate that meets the condition, or whose figure is unknown."""
        lines = []
        for candidate in report.candidates:
            value = METRICS[self.metric](candidate)
            if value is None:
                lines.append(
                    f"{candidate.name}: {self.metric} is not known, so it can't be said to pass {self}"
                )
            elif OPERATORS[self.operator](value, self.limit):
                lines.append(f"{candidate.name}: {self.metric} is {value:.6g}, {self}")
        return lines

    def __str__(self) -> str:
        return f"--fail-if '{self.metric} {self.operator} {self.limit:g}'"

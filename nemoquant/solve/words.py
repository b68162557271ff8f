"""What was done to weights, in words for people: the model card and the last lines of ``quantize``."""

from collections.abc import Sequence
from typing import Any

from nemoquant.planning.solving import FoldName

KEPT = {
    "latent": "a matrix between fc1 and the experts' up projections",
    "norm": "powers of two between norms and what reads them",
    "gate": "powers of two between gated norms and out_proj",
    "expert": "powers of two between up and down projections",
}


def change_sentences(summary: dict[str, Any], folds: Sequence[FoldName]) -> list[str]:
    """A sentence each on solved weights and on folds, as far as there are any.

    Args:
        summary: of :meth:`nemoquant.pack.write.Changes.summary`.
    """
    found = []
    solved = summary["solved"]
    if solved is not None:
        methods = ", ".join(f"{count:,} {method}" for method, count in sorted(solved["methods"].items()))
        text = f"Weights solved for with the inputs of calibration: {methods}"
        if solved["objective_of_plain"] is not None:
            text += f"; their error in outputs is {solved['objective_of_plain']:.0%} of plain rounding's"
        found.append(text + ".")
    if folds:
        looked = "; ".join(f"{name} ({KEPT[name]})" for name in folds)
        found.append(
            f"Folds that keep the function, looked for: {looked}; {summary['folded']:,} tensors were changed."
        )
    return found

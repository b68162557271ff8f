"""What was done to weights, in words for people: the model card and the last lines of ``quantize``."""

from typing import Any

from nemoquant.planning.recipe import Recipe

KEPT = {
    "latent": "a matrix between fc1 and the experts' up projections",
    "norm": "powers of two between norms and what reads them",
    "gate": "powers of two between gated norms and out_proj",
    "expert": "powers of two between up and down projections",
}

WEIGHED = {"equal": "", "loss": "; their errors count as they matter to the loss"}
STREAMS = {"source": "", "quantized": ", on the stream of the quantized layers before them"}


def change_sentences(summary: dict[str, Any], recipe: Recipe) -> list[str]:
    """A sentence each on solved weights and on folds, as far as there are any.

    Args:
        summary: of :meth:`nemoquant.pack.write.Changes.summary`.
    """
    found = []
    solved = summary["solved"]
    if solved is not None:
        methods = ", ".join(f"{count:,} {method}" for method, count in sorted(solved["methods"].items()))
        where = STREAMS[recipe.solve.propagate]
        text = f"Weights solved for with the inputs of calibration{where}: {methods}"
        text += WEIGHED[recipe.solve.outputs]
        if solved["objective_of_plain"] is not None:
            text += f"; their error in outputs is {solved['objective_of_plain']:.0%} of plain rounding's"
        found.append(text + ".")
    if recipe.folds:
        looked = "; ".join(f"{name} ({KEPT[name]})" for name in recipe.folds)
        found.append(
            f"Folds that keep the function, looked for: {looked}; {summary['folded']:,} tensors were changed."
        )
    return found

"""Which method of ours a calibration algorithm of Model Optimizer is.

    max                 the largest magnitude: ``max``
    mse                 block scales that are static: ``mse``, or ``four_over_six`` where two are tried; the
                        scale of a whole tensor stays ``max`` here
    local_hessian       the same with the inputs: ``hess``, without sweeps afterwards
    gptq                ``gptq``

All others change weights or activations in ways that no recipe of ours has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemoquant.errors import RecipeError, brief
from nemoquant.formats import FORMATS, Method
from nemoquant.planning.modelopt.entries import Theirs
from nemoquant.planning.modelopt.numerics import Number

_TWO = [1.0, 1.5]  # the multiples of a block's largest magnitude that four-over-six tries
TRIES_TWO = "mse with fp8_scale_sweep false, start_multiplier 1.0, stop_multiplier 1.5, step_size 0.5"


@dataclass(frozen=True)
class Known:
    """An algorithm that is done here.

    Attributes:
        method: ours, for weights whose block scales are static.
        every: also for weights without such scales.
        two: the method for block scales that are chosen among two.
        sweep: whether all E4M3 block scales are tried if the option is not given; None where there is none.
        told: options that have another meaning here.
    """

    method: Method
    every: bool = False
    two: Method | None = None
    sweep: bool | None = None
    told: tuple[str, ...] = ()


KNOWN: Mapping[str, Known] = {
    "max": Known("max"),
    "mse": Known("mse", two="four_over_six", sweep=False),
    "local_hessian": Known("hess", sweep=True),
    "gptq": Known("gptq", every=True, told=("perc_damp", "block_size", "fused")),
}
_SEARCH = {"fp8_scale_sweep", "start_multiplier", "stop_multiplier", "step_size"}
# They say how Model Optimizer goes through a model, what its processes and experts share, and which experts
# see which tokens: here a model is gone through layer by layer, and experts see what their router sends.
_NO_EFFECT = {
    "layerwise",
    "distributed_sync",
    "skip_forward_without_activation_calib",
    "debug",
    "moe_calib_experts_ratio",
    "sync_expert_weight_amax",
    "shared_states",
}
_OFF = (None, False, {"enable": False})  # an option with such a value asks for nothing
_WHY = {
    "awq": "input channels are not scaled here",
    "smoothquant": "input channels are not scaled here",
    "svdquant": "no part of a weight is kept in 16 bits here",
    "lsq": "scales are not learned by training here",
    "nvfp4_act_headroom": "input scales follow the largest magnitude seen here, not a percentile; give "
    "algorithm max and --headroom",
}


class Algorithm:
    """A recipe's algorithm; asked for the method of each weight, and then for what is to be told.

    Attributes:
        problem: what can't be done of it; None if all can.
    """

    def __init__(self, theirs: Theirs) -> None:
        """Raises:
        RecipeError: an option that no algorithm has, or that has no sensible value.
        """
        given = theirs.algorithms or ({"method": "max"},)
        self.name = " and then ".join(str(one.get("method") or "max")[:100] for one in given)
        self.problem: str | None = None
        known = KNOWN.get(self.name)
        if known is None:
            why = next((f": {text}" for begin, text in _WHY.items() if self.name.startswith(begin)), "")
            self.problem = f"the algorithm {self.name}{why}"
            given, known = ({},), KNOWN["max"]
        self.known = known
        options = {key: value for key, value in given[0].items() if key != "method"}
        taken = _NO_EFFECT | set(known.told) | (set() if known.sweep is None else _SEARCH)
        if unknown := sorted(set(options) - taken):
            raise RecipeError(
                f"recipe {theirs.name}: the option {brief(unknown[0])} of the algorithm {self.name} is not "
                f"known here; remove it, or write `algorithm: {self.name}` without options"
            )
        self.sweep = bool(options.get("fp8_scale_sweep", known.sweep))
        self.multipliers = None if known.sweep is None or self.sweep else _multipliers(theirs, options)
        self.ignored = sorted(key for key in _NO_EFFECT & set(options) if options[key] not in _OFF)
        self.changed = [key for key in known.told if key in options]
        self._coarse = self._whole = 0  # weights whose search differs from theirs

    @property
    def descent(self) -> int | None:
        """Sweeps of coordinate descent after a search of scales: it has none; None leaves our number."""
        return None if self.known.sweep is None else 0

    def method(self, number: Number) -> Method | None:
        """Our method for a weight; None if it is four-over-six with other candidates than its two."""
        form = FORMATS[number.format]
        if number.four_over_six:
            return self.known.two if self.multipliers == _TWO and number.static else None
        if number.static or self.known.every:
            self._coarse += self.multipliers is not None
            return form.nearest(self.known.method)
        self._whole += self.multipliers is not None and form.block is None
        return "max"

    def notes(self) -> list[str]:
        """What is told, after all weights have been asked for; a sentence each."""
        told = []
        if self.known.every:
            told.append(
                f"{self.name} is done by nemoquant's own GPTQ, with its damping and sweeps, for routed "
                f"experts too (in Model Optimizer fused experts keep max)"
                + (f"; its options {', '.join(self.changed)} are not used" if self.changed else "")
            )
        if self._coarse:
            told.append(
                f"{self.name}: block scales are searched among all E4M3 values, where Model Optimizer tries "
                f"{len(self.multipliers or ())} multiples of the largest magnitude"
            )
        if self._whole:
            told.append(
                f"{self.name}: the one scale of an FP8 weight is from its largest magnitude ({self._whole:,} "
                f"weights), where Model Optimizer also tries {len(self.multipliers or ())} multiples of it"
            )
        if self.ignored:
            told.append(f"these options of its algorithm have no effect here: {', '.join(self.ignored)}")
        return told


def _multipliers(theirs: Theirs, options: Mapping[str, Any]) -> list[float]:
    """The multiples of the largest magnitude that a search tries."""
    begin, end, step = (
        options.get(key, default)
        for key, default in (("start_multiplier", 0.25), ("stop_multiplier", 4.0), ("step_size", 0.1))
    )
    try:
        count = int(-(-(end - begin) // step)) + 1
        if not 1 <= count <= 10_000:
            raise ValueError
        return [begin + step * i for i in range(count)]
    except (TypeError, ValueError, ArithmeticError):
        raise RecipeError(
            f"recipe {theirs.name}: multipliers from {brief(begin)} to {brief(end)} by {brief(step)} are no "
            f"search; expected numbers such as 1.0, 1.5 and 0.5"
        ) from None

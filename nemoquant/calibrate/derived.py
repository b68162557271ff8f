"""The scalar scales of a plan, computed from the maxima of weights and activations, with groups applied.

Degenerate cases have a defined scale and are reported.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from nemoquant.calibrate.scales import Scales, kv_modules
from nemoquant.errors import CalibrationError, WeightError
from nemoquant.formats import FormatName
from nemoquant.formats.arithmetic import TensorScale
from nemoquant.formats.bf16 import rounded_up, value_of
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.model.names import stack_of
from nemoquant.planning.plan import Plan
from nemoquant.planning.row import Row


@dataclass
class ActivationScales:
    """The scales of a plan that come from calibration.

    Attributes:
        inputs: module -> ``input_scale``, for every row whose input has a calibrated scale.
        caches: ``...k_proj`` and ``...v_proj`` modules -> decode scale of their cache.
        warnings: what a user should know about them.
    """

    inputs: dict[str, np.float32] = field(default_factory=dict)
    caches: dict[str, np.float32] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def input_scale(amax: float, activation_format: FormatName, headroom: float = 1) -> np.float32:
    """The decode scale of a GEMM's input, from its largest magnitude in calibration.

    Formats with :attr:`Format.input_headroom` hold ``headroom`` times that magnitude; not where it is
    degenerate, because the scale is 1.0 then.
    """
    arithmetic = ARITHMETIC[activation_format]
    scale, degenerate = arithmetic.decode_scale(amax)
    return (
        np.float32(float(scale) * headroom) if arithmetic.format.input_headroom and not degenerate else scale
    )


def cache_scale(amax: float, number: FormatName) -> np.float32:
    """The decode scale of a K or V cache: that of an input, rounded up to the next bf16 number.

    vLLM keeps these scales in bf16. Rounded to nearest there, half of them would shrink and clip the largest
    values; a bf16 number stays what it is in every engine.
    """
    return value_of(rounded_up(input_scale(amax, number)))


def check_finite(name: str, value: np.float32) -> np.float32:
    """``value``, a maximum, unchanged; raises WeightError where it is NaN or Inf."""
    if not np.isfinite(value):
        what = "NaN" if np.isnan(value) else "Inf"
        raise WeightError(
            f"{name} has {what}; expected finite weights, the source is damaged: "
            f"download or convert it again, or train it again if it left training so"
        )
    return value


def weight_scale(row: Row, amax: np.float32) -> TensorScale:
    """The per-tensor decode scale of a weight, and whether the weight is degenerate (written as zeros).

    Raises:
        WeightError: values too large for the format.
    """
    assert row.format != "source"
    arithmetic = ARITHMETIC[row.format]
    scale = arithmetic.decode_scale(amax, row.plain_method)
    if amax > arithmetic.limit(scale.value):
        raise WeightError(
            f"{row.name} has {amax:.7g}, which {arithmetic.format.short} can't hold; expected at most "
            f"{arithmetic.limit(scale.value):.7g}, is the source damaged? Else give it `format: source`"
        )
    return scale


def activation_scales(plan: Plan, scales: Scales | None) -> ActivationScales:
    """Scales of inputs and caches, groups applied.

    Raises:
        CalibrationError: no token reached any module of a group, so that its input scale is unknown.
    """
    result = ActivationScales()
    amax = scales.amax_of(plan) if scales else {}
    result.inputs = input_scales(plan.quantized, amax, plan.recipe.headroom, result.warnings)
    _cache_scales(plan, scales, result)
    return result


def input_scales(
    rows: Iterable[Row], amax: Mapping[str, float], headroom: float, warnings: list[str]
) -> dict[str, np.float32]:
    """module -> ``input_scale``, for those of ``rows`` whose input has a calibrated one; groups applied.

    Args:
        rows: with each row all of its group, and all experts of its layer and projection.
        amax: module -> largest magnitude of its input; an expert that no token reached is absent.
        headroom: the recipe's.
        warnings: receives one for each input that was zero.
    Raises:
        CalibrationError: no token reached any module of a group, so that its input scale is unknown.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    # experts of a layer and projection: the largest amax of all, whatever the grouping
    layers: dict[str, float] = {}
    found: dict[str, np.float32] = {}
    for row in rows:
        if not row.calibrated:
            continue
        groups[row.input_group or row.module].append(row)
        if row.expert is not None and row.module in amax:
            stack = stack_of(row.module)
            layers[stack] = max(amax[row.module], layers.get(stack, 0.0))
    for group, members in groups.items():
        seen = [amax[row.module] for row in members if row.module in amax]
        fallback = layers.get(stack_of(members[0].module)) if members[0].expert is not None else None
        if not seen and fallback is None:
            raise CalibrationError(
                f"{group}: no calibration token reached it, so its input scale is unknown; calibrate with "
                f"more rows"
            )
        largest = max(seen) if seen else fallback
        assert largest is not None and members[0].activation_format is not None
        if largest == 0:
            warnings.append(f"{group}: its input was zero in all calibration rows; input scale set to 1.0")
        scale = input_scale(largest, members[0].activation_format, headroom)
        found |= dict.fromkeys((row.module for row in members), scale)
    return found


def _cache_scales(plan: Plan, scales: Scales | None, result: ActivationScales) -> None:
    for module in kv_modules(plan):
        assert plan.cache is not None
        amax = scales.kv_amax[module] if scales else 0.0
        if amax == 0:
            result.warnings.append(
                f"{module}: its output was zero in all calibration rows; cache scale set to 1.0"
            )
        result.caches[module] = cache_scale(amax, plan.cache.number)

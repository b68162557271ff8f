"""Scales from calibration against Model Optimizer's, on the same rows.

They are ``input_scale``, ``k_scale`` and ``v_scale``.

Both compute in float32 here (Model Optimizer loads the same bf16 values as float32). In bfloat16 the two
round at different places: we keep all of a Mamba-2 mixer between its projections in float32, transformers
runs its convolution in bf16. Hidden states then differ by some roundings of 2^-8 each, and a token whose
second and third expert are that near may take another expert. Scales of this model differ by up to 1.3%,
measured, and no bound follows from theory. In float32 only the order of sums differs.

Experts of a layer and projection share their ``input_scale`` in both tools. FP8 q, k, v have the same input,
so that sharing makes no difference there.
"""

import json

import pytest
from support import modelopt_run
from support.oracle_tensors import equal, expert_projection, read
from torch import Tensor

pytestmark = modelopt_run.MARKS

# Sums of some hundred float32 products in another order differ by 5e-7 here, measured. A wrong scale differs
# by a step of the format at least (an amax of another row, module or dtype: percents). A thousandth lies far
# from both.
TOLERANCE = 1e-3


def activation_scales(tensors: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float(t) for name, t in tensors.items() if name.endswith(("input_scale", "k_scale", "v_scale"))
    }


def differences(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    """Relative difference by name; both must have the same names.

    Ours of a cache are rounded up to bf16: from theirs that is at most a step of its 8 bits.
    """
    assert ours.keys() == theirs.keys()
    found = {}
    for name in ours:
        change = ours[name] / theirs[name] - 1
        is_cache = not name.endswith("input_scale")
        found[name] = max(0.0, -change, change - 2**-7) if is_cache else abs(change)
    return found


@pytest.mark.parametrize("preset", ["fp8", "nvfp4-full", "nvfp4"])
def test_scales_of_activations_and_kv_cache(preset, runs) -> None:
    ours, theirs = (
        activation_scales(read(made(preset, compute="float32"))) for made in (runs.ours, runs.theirs)
    )
    assert len(ours) == 46 + 2
    found = differences(ours, theirs)
    for kind in ("input_scale", "k_scale", "v_scale"):
        print(
            f"{preset}: largest relative difference of {kind}: "
            f"{max(v for k, v in found.items() if k.endswith(kind)):.1e}"
        )
    assert {name: d for name, d in found.items() if d > TOLERANCE} == {}
    assert (
        len(set(ours.values())) > 15
    )  # 2 x 2 projections of experts, 10 other inputs, K and V: the values differ


@pytest.mark.parametrize("preset", modelopt_run.UNCALIBRATED)
def test_uncalibrated_presets_have_none(preset, runs) -> None:
    assert activation_scales(read(runs.theirs(preset))) == {}
    assert activation_scales(read(runs.ours(preset))) == {}


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("preset", ["fp8", "nvfp4-full"])
def test_experts_that_no_token_reached(preset, length, runs) -> None:
    """Rows of one or three tokens through 8 experts, 2 for a token.

    The other experts take their layer's scale in both tools.
    """
    few = {"compute": "float32", "rows": 1, "length": length}
    out = runs.ours(preset, **few)
    theirs, ours = read(runs.theirs(preset, **few)), read(out)
    counts = json.loads((out / "nemoquant_scales.json").read_text())["tokens_per_expert"]
    assert [sum(counts[layer]) for layer in ("2", "5")] == [2 * length] * 2
    unreached = [
        (layer, expert) for layer in counts for expert, tokens in enumerate(counts[layer]) if not tokens
    ]
    assert len(unreached) >= (12 if length == 1 else 4)
    found = differences(activation_scales(ours), activation_scales(theirs))
    assert {name: d for name, d in found.items() if d > TOLERANCE} == {}
    for tensors in (ours, theirs):
        shared: dict[str, set[float]] = {}
        for name, value in activation_scales(tensors).items():
            if expert := expert_projection(name):
                shared.setdefault(expert, set()).add(value)
        assert len(shared) == 4
        assert all(len(values) == 1 and min(values) > 0 for values in shared.values())
    # their weights are quantized like the others
    reached = read(runs.ours(preset))
    codes = [name for name in ours if expert_projection(name) and not name.endswith("input_scale")]
    assert [name for name in codes if not equal(ours[name], reached[name])] == []

"""Every written tensor, by name, against Model Optimizer's output for the same folder and rows.

The scales of activations are tested in test_oracle_modelopt_scales.py. Here Model Optimizer loads the model
in bfloat16, as users do.
"""

import pytest
import torch
from support import modelopt_run
from support.oracle_tensors import equal, expert_projection, is_scale, raw, read, weights
from torch import Tensor

pytestmark = modelopt_run.MARKS

# Where a preset has FP8 q, k, v, our scale groups are off: Model Optimizer gives those separate scales, and
# NVFP4 ones a shared scale.
SCALE_GROUPS = {"fp8": False, "mxfp8": True, "nvfp4": False, "nvfp4-full": True, "nvfp4-w4a16": True}
# Two Mamba layers of 2, one attention layer of 4, one MLP and two shared experts of 2, and 2 x 8 experts of
# 2.
QUANTIZED = {  # preset -> how many weights are FP8 or MXFP8, how many NVFP4
    "fp8": (46, 0),
    "mxfp8": (46, 0),
    "nvfp4": (12, 34),
    "nvfp4-full": (0, 46),
    "nvfp4-w4a16": (0, 34),
}
# It loads everything in the model's dtype, except the router's bias; we keep the source's dtypes.
CAST_TO_BF16 = ["backbone.layers.0.mixer.A_log", "backbone.layers.2.mixer.gate.weight"]
FP8 = torch.float8_e4m3fn


@pytest.fixture
def preset() -> str:
    """Tests that take it as no parameter compare FP8."""
    return "fp8"


@pytest.fixture
def source_tensors(runs, preset) -> dict[str, Tensor]:
    """The tensors that both tools read."""
    return read(runs.source(preset))


@pytest.fixture
def tables(runs, preset):
    """A preset's map, and the outputs of both tools, theirs and ours."""
    return read(runs.theirs(preset)), read(runs.ours(preset, scale_groups=SCALE_GROUPS[preset]))


@pytest.mark.parametrize("preset", modelopt_run.MAPS)
def test_names_dtypes_and_shapes(preset, tables, source_tensors) -> None:
    """The same table, with two differences.

    Model Optimizer drops MTP (transformers' model has none) and casts F32 tensors to bf16.
    """

    def table(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
        return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}

    theirs, ours = tables
    expected = table(theirs)
    for name in CAST_TO_BF16:
        assert expected[name][0] == torch.bfloat16
        expected[name] = (torch.float32, expected[name][1])
    expected |= table({name: tensor for name, tensor in source_tensors.items() if name.startswith("mtp.")})
    assert table(ours) == expected
    assert (len(weights(ours, FP8)), len(weights(ours, torch.uint8))) == QUANTIZED[preset]


@pytest.mark.parametrize("preset", modelopt_run.MAPS)
def test_unquantized_tensors(preset, tables, source_tensors) -> None:
    """Ours equal the source's to the byte, MTP included; theirs too, except for the casts to bf16."""
    theirs, ours = tables
    kept = [name for name in source_tensors if ours[name].dtype in (torch.bfloat16, torch.float32)]
    assert len(kept) == len(source_tensors) - sum(QUANTIZED[preset])
    assert [name for name in kept if not equal(ours[name], source_tensors[name])] == []
    main = [name for name in kept if not name.startswith("mtp.")]
    cast = {name: ours[name].bfloat16() if name in CAST_TO_BF16 else ours[name] for name in main}
    assert [name for name in main if not equal(cast[name], theirs[name])] == []
    assert not torch.equal(
        cast[CAST_TO_BF16[0]].float(), ours[CAST_TO_BF16[0]]
    )  # the cast loses bits, so the test can detect it


@pytest.mark.parametrize("preset", ["nvfp4-full", "nvfp4", "nvfp4-w4a16"])
def test_nvfp4_codes_block_scales_and_global_scales(preset, tables) -> None:
    """Equal to the byte: experts, and with ``nvfp4-full`` q, k, v with their shared scale."""
    theirs, ours = tables
    names = weights(ours, torch.uint8)
    parts = [name + suffix for name in names for suffix in ("", "_scale", "_scale_2")]
    assert len(parts) == 3 * QUANTIZED[preset][1]
    assert [name for name in parts if not equal(ours[name], theirs[name])] == []
    inputs = [name for name in ours if name.endswith("input_scale")]
    assert len(inputs) == (0 if preset == "nvfp4-w4a16" else 46)


def test_the_hard_blocks_are_in_it(runs) -> None:
    """These blocks of layer 0's in_proj are among the compared ones.

    On smooth weights only, that test would prove little.
    """
    ours = read(runs.ours("nvfp4-full"))
    codes, scales = (ours[f"backbone.layers.0.mixer.in_proj.{part}"] for part in ("weight", "weight_scale"))
    assert scales[:3, 0].tolist() == [1.0, 2.0**-9, 448.0]  # zeros, an underflow, the tensor's amax
    assert codes[0, :8].tolist() == [0] * 8
    assert codes[3, 0] == 0x80  # -0.0 in the low nibble has no sign, a negative that rounds to zero keeps it
    ours = read(runs.ours("mxfp8"))
    codes, scales = (ours[f"backbone.layers.0.mixer.in_proj.{part}"] for part in ("weight", "weight_scale"))
    assert scales[:3, 0].tolist() == [0, 95, 121]  # zeros; 1e-7 <= 448 * 2^-32; 6 <= 448 * 2^-6
    assert not raw(codes[0, :32]).any()
    assert raw(codes[3, :2]).tolist() == [0x80, 0x80]  # both keep their sign


def test_mxfp8_codes_and_block_scales(runs) -> None:
    """Equal to the byte. Scales are uint8, and there are no others."""
    theirs, ours = read(runs.theirs("mxfp8")), read(runs.ours("mxfp8"))
    parts = [name + suffix for name in weights(ours, FP8) for suffix in ("", "_scale")]
    assert sum(expert_projection(name) is not None for name in parts) == 2 * 32
    assert {ours[name].dtype for name in parts} == {FP8, torch.uint8}
    assert [name for name in parts if not equal(ours[name], theirs[name])] == []
    assert {name for name in ours if is_scale(name)} == {name for name in theirs if is_scale(name)}
    assert {name for name in ours if is_scale(name)} == set(parts[1::2])


@pytest.mark.parametrize("preset", ["fp8", "nvfp4"])
def test_fp8_scales(preset, tables) -> None:
    theirs, ours = tables
    names = [name + "_scale" for name in weights(ours, FP8)]
    assert len(names) == QUANTIZED[preset][0]
    assert [name for name in names if not equal(ours[name], theirs[name])] == []


def test_fp8_scales_of_q_k_v_in_a_group(runs) -> None:
    """By default q, k, v share the largest of Model Optimizer's three scales; nothing else changes."""
    theirs, ours = read(runs.theirs("fp8")), read(runs.ours("fp8"))
    names = [f"backbone.layers.1.mixer.{p}_proj.weight_scale" for p in "qkv"]
    largest = max((theirs[name] for name in names), key=float)
    assert len({float(theirs[name]) for name in names}) == 3
    assert all(equal(ours[name], largest) for name in names)
    others = [name + "_scale" for name in weights(ours, FP8) if name + "_scale" not in names]
    assert len(others) == 43
    assert [name for name in others if not equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("groups", [False, True], ids=["apart", "q, k, v in a group"])
def test_fp8_codes_are_a_division_in_fp32_rounded_once(groups, runs, source_tensors) -> None:
    ours = read(runs.ours("fp8", scale_groups=groups))
    wrong = []
    for name in weights(ours, FP8):
        quotient = source_tensors[name].float() / ours[name + "_scale"]
        assert float(quotient.abs().max()) < 448 * (
            1 + 2**-23
        )  # no value saturates by more than that rounding
        if not equal(ours[name], quotient.clamp(-448, 448).to(FP8)):
            wrong.append(name)
    assert wrong == []


def test_fp8_codes_of_model_optimizer_are_a_division_in_bf16(runs, source_tensors) -> None:
    """It divides a bf16 weight by a 0-dimensional fp32 scale, and torch keeps bf16 for that.

    So the quotient is rounded twice.
    """
    theirs = read(runs.theirs("fp8"))
    names = weights(theirs, FP8)
    quotients = {name: source_tensors[name] / theirs[name + "_scale"] for name in names}
    assert {q.dtype for q in quotients.values()} == {torch.bfloat16}
    assert [name for name in names if not equal(theirs[name], quotients[name].to(FP8))] == []


def test_fp8_codes_differ_from_it_by_that_division_only(runs) -> None:
    """If Model Optimizer loads the same bf16 values as float32, all its FP8 codes equal ours."""
    theirs, ours = read(runs.theirs("fp8", compute="float32")), read(runs.ours("fp8", scale_groups=False))
    assert [name for name in weights(ours, FP8) if not equal(theirs[name], ours[name])] == []


def test_fp8_codes_have_the_lower_error(runs, source_tensors) -> None:
    """A few codes differ, each by one, and ours is the nearer one there.

    So no weight's squared error is above theirs.
    """
    theirs, ours = read(runs.theirs("fp8")), read(runs.ours("fp8", scale_groups=False))
    names = weights(ours, FP8)
    differ, total, steps = 0, 0, set()
    errors: dict[str, tuple[float, float]] = {}
    for name in names:
        step = raw(ours[name]).int() - raw(theirs[name]).int()  # codes of one sign are ordered by magnitude
        differ, total = differ + int((step != 0).sum()), total + step.numel()
        steps |= set(step.abs().unique().tolist())
        scale, weight = ours[name + "_scale"].double(), source_tensors[name].double()
        mine, other = (
            float((tensors[name].double() * scale - weight).square().sum()) for tensors in (ours, theirs)
        )
        errors[name] = mine, other
    mine, other = (sum(pair[i] for pair in errors.values()) for i in (0, 1))
    print(
        f"FP8 codes that differ: {differ} of {total} ({differ / total:.2%}); squared error, ours / theirs: "
        f"{mine / other:.6f}"
    )
    assert 0 < differ < 0.1 * total
    assert steps == {0, 1}
    assert [name for name, pair in errors.items() if pair[0] > pair[1]] == []
    assert mine < other


def test_mixed_has_the_bytes_of_both(runs) -> None:
    """A module's bytes do not depend on the formats of others.

    ``nvfp4`` consists of parts of ``nvfp4-full`` and ``fp8``.
    """
    mixed, parts = read(runs.ours("nvfp4", scale_groups=False)), read(runs.ours("fp8", scale_groups=False))

    def is_nvfp4(name: str) -> bool:  # experts, and the MLP
        return bool(expert_projection(name)) or name.startswith("backbone.layers.3.mixer.")

    nvfp4 = {n: t for n, t in read(runs.ours("nvfp4-full", scale_groups=False)).items() if is_nvfp4(n)}
    parts = {name: t for name, t in parts.items() if not is_nvfp4(name)} | nvfp4
    assert mixed.keys() == parts.keys()
    assert [name for name in mixed if not equal(mixed[name], parts[name])] == []

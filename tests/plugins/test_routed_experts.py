"""RoutedExperts on the host: float64 as oracle for each half, nemoquant's torch arithmetic, the ONNX functions, routing, refusals."""

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from experts_call import BLOCKS, FORMATS, NUMPY, ROUNDED, Array, Case, Experts, aligned, down_exact, hidden_exact, placed, rounded
from plugin_build import needs_compiler

from nemoquant.errors import EngineError
from nemoquant.graph.dialects import DIALECTS, parts_of
from nemoquant.graph.tape import FLOAT
from nemoquant.ops.library import Kernels
from nemoquant.quantized.packed import PackedWeight, fake_quantize

pytestmark = needs_compiler

BASE = Case()
# Kernels: for 2 ids an expert or fewer on average tiles of 8 tokens, up to 24 tiles of 32, beyond tiles of 64.
ROWS = {
    "the base": BASE,
    "one token": replace(BASE, tokens=1),
    "two tokens": replace(BASE, tokens=2),
    "one expert a token": replace(BASE, top_k=1),
    "all experts a token": replace(BASE, top_k=4),
    "one expert in all": replace(BASE, experts=1, top_k=1, tokens=2),
    "an expert twice in a row": replace(BASE, ids="same"),
    "most experts without tokens": replace(BASE, experts=37, tokens=3),
    "tiles of 8: 7 tokens on one expert": replace(BASE, experts=33, top_k=1, tokens=7, ids="one"),
    "tiles of 8: 8": replace(BASE, experts=33, top_k=1, tokens=8, ids="one"),
    "tiles of 8: 9": replace(BASE, experts=33, top_k=1, tokens=9, ids="one"),
    "tiles of 8: 29": replace(BASE, experts=33, top_k=1, tokens=29, ids="one"),
    "tiles of 32: 31 tokens on one expert": replace(BASE, experts=9, top_k=1, tokens=31, ids="one"),
    "tiles of 32: 32": replace(BASE, experts=9, top_k=1, tokens=32, ids="one"),
    "tiles of 32: 33": replace(BASE, experts=9, top_k=1, tokens=33, ids="one"),
    "tiles of 32: 101": replace(BASE, experts=9, top_k=1, tokens=101, ids="one"),
    "tiles of 64: 63 tokens on one expert": replace(BASE, experts=2, top_k=1, tokens=63, ids="one"),
    "tiles of 64: 64": replace(BASE, experts=2, top_k=1, tokens=64, ids="one"),
    "tiles of 64: 65": replace(BASE, experts=2, top_k=1, tokens=65, ids="one"),
    "tiles of 64: 197": replace(BASE, experts=2, top_k=1, tokens=197, ids="one"),
    "tiles of 64, spread": replace(BASE, experts=3, top_k=2, tokens=90),
    "long rows, shared by two warps and four": replace(BASE, input=320, width=704, tokens=1),
    "long rows, tiles of 32": replace(BASE, input=320, width=704, tokens=9),
    "long rows, tiles of 64": replace(BASE, input=320, width=416, experts=1, top_k=1, tokens=30),
    "the smallest that every format takes": replace(BASE, input=32, width=32),
    "smallest, tiles of 64": replace(BASE, input=32, width=32, experts=1, top_k=1, tokens=25),
    "float16": replace(BASE, dtype="float16"),
    "float16, tiles of 64": replace(BASE, dtype="float16", experts=1, top_k=1, tokens=30),
    "float32": replace(BASE, dtype="float32"),
    "float32, one token": replace(BASE, dtype="float32", tokens=1, width=704),
    "float32, tiles of 64": replace(BASE, dtype="float32", experts=1, top_k=1, tokens=70),
}
ODD = {  # what only formats with shorter vectors take
    "bf16: 8 and 24": replace(BASE, input=8, width=24),
    "bf16: 136 and 40, tiles of 64": replace(BASE, input=136, width=40, experts=1, top_k=1, tokens=30),
    "w8a16: 16 and 48": replace(BASE, format="w8a16", input=16, width=48),
    "fp8: 144 and 16": replace(BASE, format="fp8", input=144, width=16),
}


def distance(got: Array, wanted: Array) -> float:
    """Norm of the difference over the norm."""
    return float(np.linalg.norm(got.astype(np.float64) - wanted) / np.linalg.norm(wanted))


def in_torch(a: Experts, dtype: torch.dtype) -> Array:
    """The framework's result in a dtype: decoded weights, products and what lies between in it; the weighted sum in float32."""
    total = torch.zeros(a.case.tokens, a.case.input)
    order, experts = a.order()
    matrices = {e: [torch.tensor(a.decoded(name, e)).to(dtype) for name in ("up", "down")] for e in set(experts.tolist())}
    for i, e in zip(order, experts, strict=True):
        up, down = matrices[e]
        x = torch.tensor(a.x[i // a.case.top_k].astype(np.float64)).to(dtype)
        h = torch.relu(up @ x)
        total[i // a.case.top_k] += float(a.weights.ravel()[i]) * (down @ (h * h)).float()
    return total.to(dtype).double().numpy()


TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("format", [f for f in FORMATS if f not in ROUNDED])
@pytest.mark.parametrize("name", [*ROWS, *(name for name in ODD if not name.startswith("fp8"))])
def test_inputs_as_they_are_against_float64(name: str, format: str, kernels: Kernels) -> None:
    """Error of y below twice that of torch in the same dtype; in bfloat16 the intermediate is rounded once and not twice."""
    if name in ODD:
        format = ODD[name].format
    a = Experts(replace({**ROWS, **ODD}[name], format=format))
    y, _ = a.run(kernels)
    order, experts = a.order()
    exact = down_exact(a, np.array([hidden_exact(a, i, e) for i, e in zip(order, experts, strict=True)]))
    framework = distance(in_torch(a, TORCH[a.case.dtype]), exact)
    assert 0 < distance(y, exact) < 2 * framework


def allowed(a: Experts, exact: Array, expert: int, got: Array, epsilon: float) -> Array:
    """Where ``got`` is the rounding of ``exact`` moved by at most ``epsilon``; NVFP4's block scale and codes each move alone."""
    scale = a.down["input_scale"][expert]
    moves = (1 - epsilon, 1.0, 1 + epsilon)
    if a.case.format == "fp8":
        return np.any([rounded(exact, "fp8", scale, factor=f) == got for f in moves], axis=0)
    whole = np.zeros(exact.size, bool)
    for block in moves:
        fits = np.any([rounded(exact, "nvfp4", scale, block, f) == got for f in moves], axis=0)
        whole |= np.repeat(fits.reshape(-1, 16).all(1), 16)
    return whole


@pytest.mark.parametrize("format", ROUNDED)
@pytest.mark.parametrize("name", [*ROWS, *(name for name in ODD if name.startswith("fp8"))])
def test_rounded_inputs_against_float64(name: str, format: str, kernels: Kernels) -> None:
    """Each half by itself, so that a code that flips in between does not hide the rest.

    What down reads is the rounding of the exact value, moved by 2e-6 at most (float32 sums); at most 1 code in 500 is another one than
    the exact value's. y is the exact product of what down read, within 1e-6, rounded to the dtype.
    """
    if name in ODD:
        format = ODD[name].format
    a = Experts(replace({**ROWS, **ODD}[name], format=format))
    y, (hidden,) = a.run(kernels)
    hidden = hidden.astype(np.float64)
    flips = 0
    for position, (i, e) in enumerate(zip(*a.order(), strict=True)):
        exact = hidden_exact(a, i, e)
        fits = allowed(a, exact, e, hidden[position], 2e-6)
        assert fits.all(), f"position {position}, expert {e}: {(~fits).sum()} wrong, first {np.argwhere(~fits)[:5].ravel()}"
        flips += int((rounded(exact, format, a.down["input_scale"][e]) != hidden[position]).sum())
    assert flips <= max(16, hidden.size // 500)
    exact_y = down_exact(a, hidden)
    rounding = distance(exact_y.astype(NUMPY[a.case.dtype]), exact_y)
    assert distance(y, exact_y) < 1.02 * rounding + 1e-6


def packed(a: Experts, name: str, expert: int) -> torch.Tensor:
    """A weight decoded by nemoquant, float32 [out, in]."""
    parts = {key: value[expert] for key, value in getattr(a, name).items()}
    if "weight" in parts:
        return torch.tensor(parts["weight"].astype(np.float32))
    format = "nvfp4" if "block_scales" in parts else "fp8"
    return PackedWeight(format, parts["codes"], parts.get("block_scales"), parts["global_scale"]).to(torch.zeros(1))


def in_nemoquant(a: Experts) -> Array:
    """By the arithmetic of ``nemoquant.quantized``: what a consumer of the checkpoint computes, in float32."""
    total = torch.zeros(a.case.tokens, a.case.input)
    x = torch.tensor(a.x.astype(np.float32))
    weights = {(name, e): packed(a, name, e) for name in ("up", "down") for e in range(a.case.experts)}
    for i, e in zip(*a.order(), strict=True):
        row = x[i // a.case.top_k][None]
        for name in ("up", "down"):
            if a.case.format in ROUNDED:
                row, _ = fake_quantize(row, a.case.format, getattr(a, name)["input_scale"][e])
            row = row @ weights[name, e].mT
            row = torch.relu(row) ** 2 if name == "up" else row
        total[i // a.case.top_k] += row[0] * a.weights.ravel()[i]
    return total.numpy()


def in_onnx(a: Experts) -> Array:
    """The function of the onnxruntime dialect, in float32."""
    format, dialect = a.case.format, DIALECTS["onnxruntime"]
    function = dialect.routed_experts(format, FLOAT)
    assert function is not None
    others: list[ir.Function] = []
    if format == "nvfp4":
        from nemoquant.graph import ops

        others = [ops.nvfp4_dynamic_quant_dequant()]
    stored = {"F8_E4M3": np.uint8, "U8": np.uint8}
    feeds = {"x": a.x.astype(np.float32), "expert_ids": a.ids, "expert_weights": a.weights}
    types = {"x": FLOAT, "expert_ids": ir.DataType.INT64, "expert_weights": FLOAT}
    for name, parts in (("up", a.up), ("down", a.down)):
        for part in parts_of(format):
            value = parts[part]
            feeds[f"{name}_{part}"] = value.astype(np.float32) if part == "weight" else value
            types[f"{name}_{part}"] = ir.DataType.UINT8 if value.dtype == stored["U8"] else FLOAT
    values = [ir.Value(name=n, type=ir.TensorType(types[n]), shape=ir.Shape(feeds[n].shape)) for n in feeds]
    node = ir.Node(function.domain, function.name, values, num_outputs=1)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(FLOAT)
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 23, "nemoquant": 1}, name="graph")
    model = ir.Model(graph, ir_version=11, functions=[function, *others])
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize("runtime", [in_nemoquant, in_onnx])
@pytest.mark.parametrize("format", FORMATS)
def test_the_other_runtimes(format: str, runtime: Any, kernels: Kernels) -> None:
    """By DESIGN's rule: within 1e-4; with rounded inputs that holds for tokens none of whose codes flipped, here three of four at least."""
    a = Experts(Case(tokens=48, top_k=3, experts=8, input=96, width=192, format=format, dtype="float32"))
    y, wanted = a.run(kernels)[0].astype(np.float64), runtime(a).astype(np.float64)
    apart = np.linalg.norm(y - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    flipped = apart > 1e-4
    assert flipped.sum() <= (a.case.tokens // 4 if format in ROUNDED else 0)
    assert apart.max() < 0.05


@pytest.mark.parametrize("format", FORMATS)
def test_ids_out_of_range_are_skipped_and_counted(format: str, kernels: Kernels) -> None:
    """As if their weight were zero; others keep their bits, since their sums are the same."""
    a = Experts(replace(BASE, format=format, tokens=40))
    skipped = placed(np.array([-5], np.int32))
    whole, _ = a.run(kernels, skipped=skipped)
    assert skipped[0] == 0
    bad = {(0, 1): -1, (7, 0): BASE.experts, (39, 0): np.iinfo(np.int64).max, (39, 1): np.iinfo(np.int64).min, (8, 0): 1 << 32}
    for at, id in bad.items():
        a.ids[at] = id
        a.weights[at] = np.nan  # not read
    y, _ = a.run(kernels, skipped=skipped)
    assert skipped[0] == len(bad)
    touched = sorted({token for token, _ in bad})
    kept = np.delete(np.arange(40), touched)
    assert y[kept].tobytes() == whole[kept].tobytes()
    assert np.isfinite(y.astype(np.float32)).all()
    assert (y[39].astype(np.float32) == 0).all()


def test_all_ids_out_of_range(kernels: Kernels) -> None:
    a = Experts(BASE)
    a.ids[...] = 99
    assert (a.run(kernels)[0].astype(np.float32) == 0).all()


def test_more_ids_than_a_pass_takes(kernels: Kernels) -> None:
    """99,000 ids in two passes: the same expert 33,000 times a token, one of so many that fewer warps sort. Skipped ids count over both."""
    a = Experts(Case(tokens=3, top_k=33_000, experts=2800, input=8, width=8, dtype="float32", ids="one"))
    a.ids[0, 5], a.ids[2, 5] = -1, 2800
    a.weights[0, 5], a.weights[2, 5] = 0, 0
    y, skipped = aligned((3, 8), np.float32), placed(np.zeros(1, np.int32))
    workspace = aligned((kernels.workspace("routed_experts", **a.arguments(y, None)),), np.uint8)
    kernels.call("routed_experts", **a.arguments(y, workspace, skipped=skipped))
    assert skipped[0] == 2
    h = np.maximum(a.x.astype(np.float64) @ a.decoded("up", 2799).T, 0) ** 2
    exact = h @ a.decoded("down", 2799).T * a.weights.astype(np.float64).sum(1, keepdims=True)
    assert distance(y, exact) < 1e-5  # a sum of 33,000 in float32


def test_the_workspace_grows_to_a_pass_and_no_further(kernels: Kernels) -> None:
    sizes = [
        kernels.workspace("routed_experts", **Experts(BASE).arguments(np.zeros(1), None, tokens=t, format=3))
        for t in (1, 2, 63, 4096, 49_151, 49_152, 49_153, 1 << 30)
    ]
    assert sizes == sorted(sizes)
    assert sizes[5] == sizes[6] == sizes[7] > 0


@pytest.mark.parametrize("format", ROUNDED)
def test_what_is_not_finite_stays_with_its_token(format: str, kernels: Kernels) -> None:
    a = Experts(replace(BASE, format=format, dtype="float32", tokens=40))
    clean, _ = a.run(kernels)
    a.x[11, 3] = np.nan
    y, _ = a.run(kernels)
    assert np.isnan(y[11]).all()
    others = np.delete(np.arange(40), 11)
    assert y[others].tobytes() == clean[others].tobytes()


def test_float32_keeps_infinity(kernels: Kernels) -> None:
    """Infinity is one of the bfloat16 parts that an input is cut into, the others are zero."""
    a = Experts(replace(BASE, dtype="float32", input=8, width=8, experts=1, top_k=1))
    for values in (a.up["weight"], a.down["weight"], a.x, a.weights):
        values[...] = 1
    a.x[2, 0] = np.inf
    y, _ = a.run(kernels)
    assert (y[2] == np.inf).all()
    assert (np.delete(y, 2, 0) == 8**3).all()


def test_every_code_is_its_value(kernels: Kernels) -> None:
    """All E4M3 codes but NaN, and all E2M1 codes with all block scales: down is the identity, each hidden value one code squared."""
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F] + [0, 0], np.uint8)
    a = Experts(Case(tokens=1, top_k=1, experts=1, input=16, width=256, format="w8a16", dtype="float32"))
    a.x[...], a.weights[...] = 0, 1
    a.x[0, 3] = 1
    a.up["codes"][...], a.up["global_scale"][...] = 0, 1
    a.up["codes"][0, :, 3] = codes
    _, hidden = a.run(kernels)
    expected = np.maximum(codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64), 0) ** 2
    assert (hidden.astype(np.float64).sum(0)[0] == expected).all()

    scales = np.arange(0x7F, dtype=np.uint8)  # not negative, finite
    for code in range(16):
        a = Experts(Case(tokens=1, top_k=1, experts=1, input=32, width=128, format="w4a16", dtype="float32"))
        a.x[...], a.weights[...] = 0, 1
        a.x[0, 21] = -1 if code & 8 else 1
        a.up["codes"][...], a.up["global_scale"][...] = 0, 1
        a.up["codes"][0, :, 10] = code << 4  # 21 is odd: the high half
        a.up["block_scales"][0, : scales.size, 1] = scales
        _, hidden = a.run(kernels)
        value = [0, 0.5, 1, 1.5, 2, 3, 4, 6][code & 7]
        expected = (value * scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64)) ** 2
        assert (hidden.astype(np.float64).sum(0)[0, : scales.size] == expected).all(), code


@pytest.mark.parametrize(
    ("format", "change", "says"),
    [
        ("bf16", {"tokens": 0}, "tokens is 0; expected 1 or more"),
        ("bf16", {"top_k": 0}, "top_k is 0; expected 1 to 98304"),
        ("bf16", {"top_k": 98_305}, "top_k is 98305; expected 1 to 98304"),
        ("bf16", {"experts": 0}, "experts is 0; expected 1 to 8192"),
        ("bf16", {"experts": 8193}, "experts is 8193; expected 1 to 8192"),
        ("bf16", {"input": 0}, "input is 0; expected 1 to 33554431"),
        ("bf16", {"width": -8}, "width is -8; expected 1 to 33554431"),
        ("bf16", {"width": 12}, "width is 12; expected a multiple of 8"),
        ("fp8", {"input": 24}, "input is 24; expected a multiple of 16"),
        ("nvfp4", {"width": 48}, "width is 48; expected a multiple of 32"),
        ("bf16", {"dtype": 3}, "dtype is 3; expected float32, float16 or bfloat16"),
        ("bf16", {"format": 5}, "format is 5; expected bf16, fp8, w8a16, nvfp4 or w4a16"),
        ("bf16", {"format": -1}, "format is -1"),
        ("bf16", {"activation": 1}, "activation is 1; expected 0, relu2"),
        ("bf16", {"x": None}, "x is null"),
        ("bf16", {"workspace": None}, "workspace is null"),
        ("w8a16", {"up_global_scale": None}, "up_global_scale is null"),
        ("fp8", {"down_input_scale": None}, "down_input_scale is null"),
        ("w4a16", {"down_block_scales": None}, "down_block_scales is null"),
        ("bf16", {"up": 8}, "up is at an address that is no multiple of 16"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_anything_starts(format: str, change: dict[str, Any], says: str, kernels: Kernels) -> None:
    a = Experts(replace(BASE, format=format))
    y, workspace = np.full((5, 64), 99, ml_dtypes.bfloat16), aligned((1 << 16,), np.uint8)
    with pytest.raises(EngineError, match=r"libnemoquant_host.so: routed_experts: ") as error:
        kernels.call("routed_experts", **(a.arguments(y, workspace) | change))
    assert says in str(error.value)
    assert (y == 99).all()


def test_blocks_are_in_formats() -> None:
    """What the helper calls a format with blocks is one by the specification."""
    assert {f for f in FORMATS if "block_scales" in parts_of(f)} == set(BLOCKS)
    assert {f for f in FORMATS if "input_scale" in parts_of(f)} == set(ROUNDED)

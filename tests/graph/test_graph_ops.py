"""Each operator's body alone, in ONNX Runtime, against float64 or against the bits of the formats."""

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from support import scan_call
from support.norms import relative_error as error
from support.packed_weights import packed
from support.single_op import single_op

from nemoquant.formats import e4m3, fp8, nvfp4
from nemoquant.graph import ops
from nemoquant.graph.dialects import Dialect, experts_op
from nemoquant.graph.gemms import GEMMS
from nemoquant.graph.tape import FLOAT, HALF
from nemoquant.model import mamba2
from nemoquant.shipped import plugin_folder

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed (extra: ort)"
)

CHUNK = 64
Arrays = dict[str, NDArray[Any]]


def first_differences(found: NDArray[Any], expected: NDArray[Any]) -> str:
    """Empty if the bits are equal; otherwise the number of differences, and the first ones."""
    kind = f"u{found.dtype.itemsize}"
    places = np.argwhere(found.view(kind) != expected.view(kind))
    return "" if not len(places) else f"{len(places)} of {found.size} differ, first at {places[:5].tolist()}"


# Mamba2Scan.

BASE: dict[str, Any] = {
    "batch": 2,
    "length": CHUNK + 9,
    "heads": 4,
    "width": 16,
    "groups": 2,
    "size": 16,
    "state": 1.0,
    "bias": -3.0,
    "spread": 1.0,
    "a": 8.0,
    "chunk": CHUNK,
    "low": 0.0,
    "high": math.inf,
    "decays": "random",
}
# Torch's scan keeps running sums in float64, the body in float32: after one strong decay a chunk of weak ones
# loses a little more. Measured: y at most 1.4 times, the state at most 2.4 times torch's error (1.3e-7 there,
# below this floor).
FLOOR = 3e-7


def scan_inputs(o: dict[str, Any]) -> Arrays:
    """Inputs of the kernel's tests, by the operator's names."""
    made = scan_call.inputs(**{key: value for key, value in o.items() if key not in ("low", "high", "chunk")})
    return {name.upper() if len(name) == 1 and name != "x" else name: value for name, value in made.items()}


def recurrence(given: Arrays, low: float, high: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The definition, position by position, in float64."""
    return scan_call.recurrence(
        {name if len(name) > 1 else name.lower(): value for name, value in given.items()}, low, high
    )


def torch_scan(given: Arrays, low: float, high: float) -> tuple[NDArray[Any], NDArray[Any]]:
    x, dt, a, b, c, d, bias, state = (torch.from_numpy(value) for value in given.values())
    y, after = mamba2.scan(x, dt, a, b, c, d, dt_bias=bias, limit=(low, high), state=state)
    return y.numpy(), after.numpy()


def scan_of(o: dict[str, Any], given: Arrays, **attributes: Any) -> Callable[[Arrays], list[Any]]:
    function = ops.mamba2_scan(o["heads"], o["width"], o["groups"], o["size"])
    return single_op(function, given, **attributes)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="base"),
        *[
            pytest.param({"length": n}, id=f"length {n}")
            for n in (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
        ],
        pytest.param({"batch": 1}, id="one row"),
        pytest.param({"batch": 3}, id="three rows"),
        pytest.param({"groups": 1}, id="one group"),
        pytest.param({"groups": 4}, id="a group for each head"),
        pytest.param({"width": 64, "size": 128}, id="sizes of the published models"),
        pytest.param({"width": 128, "size": 16}, id="long heads"),
        pytest.param({"state": 0.0}, id="no state before"),
        pytest.param({"high": 0.05}, id="dt bounded above"),
        pytest.param({"low": 0.02}, id="dt bounded below"),
        pytest.param(
            {"low": 0.02, "high": 0.05, "length": 3 * CHUNK + 5}, id="dt bounded on both sides, padded chunk"
        ),
        pytest.param({"chunk": 1}, id="chunks of one"),
        pytest.param({"chunk": 16}, id="short chunks"),
        pytest.param({"chunk": 1024, "length": 3 * CHUNK + 5}, id="a chunk longer than all"),
        pytest.param({"bias": -40.0, "state": 0.0}, id="dt below float32's epsilon"),
        pytest.param({"bias": 30.0, "a": 100.0}, id="each step forgets everything: exp underflows"),
        pytest.param({"spread": 40.0, "a": 16.0}, id="decays of all strengths"),
        pytest.param({"decays": "strong, then weak"}, id="weak decays after a strong one"),
        pytest.param(
            {"decays": "strong, then weak", "length": 3 * CHUNK + 5}, id="the same over several chunks"
        ),
    ],
)
def test_scan_is_the_recurrence(change: dict[str, Any]) -> None:
    o = {**BASE, **change}
    given = scan_inputs(o)
    run = scan_of(o, given, chunk_size=o["chunk"], dt_min=o["low"], dt_max=o["high"])
    for found, truth, torchs in zip(
        run(given),
        recurrence(given, o["low"], o["high"]),
        torch_scan(given, o["low"], o["high"]),
        strict=True,
    ):
        assert found.dtype == np.float32
        assert error(found, truth) < max(2 * error(torchs, truth), FLOOR)


def test_scan_without_attributes_has_the_specified_ones() -> None:
    given = scan_inputs(BASE)
    plain = scan_of(BASE, given)(given)
    named = scan_of(BASE, given, chunk_size=64, dt_min=0.0, dt_max=math.inf)(given)
    assert [first_differences(a, b) for a, b in zip(plain, named, strict=True)] == ["", ""]


def test_scan_may_be_cut_anywhere() -> None:
    """Two calls that pass the state on give the result of one call, for every cut."""
    o = {**BASE, "length": 2 * CHUNK + 5, "width": 8}
    given = scan_inputs(o)
    run = scan_of(o, given)
    truth = recurrence(given, 0.0, math.inf)
    limit = [
        max(2 * error(found, true), FLOOR)
        for found, true in zip(torch_scan(given, 0.0, math.inf), truth, strict=True)
    ]
    worst = [0.0, 0.0]
    for cut in range(1, o["length"]):
        parts, state = [], given["state_in"]
        for piece in (slice(None, cut), slice(cut, None)):
            here = {k: v[:, piece] if k in ("x", "dt", "B", "C") else v for k, v in given.items()}
            y, state = run({**here, "state_in": state})
            parts.append(y)
        worst = [
            max(w, error(f, t))
            for w, f, t in zip(worst, (np.concatenate(parts, 1), state), truth, strict=True)
        ]
    assert [w < most for w, most in zip(worst, limit, strict=True)] == [True, True], (worst, limit)


# CausalConv1d.


@pytest.mark.parametrize(
    ("length", "kernel", "batch", "scale"),
    [
        pytest.param(9, 4, 2, 1.0, id="base"),
        *[pytest.param(n, 4, 2, 1.0, id=f"length {n}") for n in (1, 2, 3, 4, 65)],
        *[pytest.param(9, k, 2, 1.0, id=f"kernel {k}") for k in (1, 2, 3)],
        *[pytest.param(1, k, 2, 1.0, id=f"kernel {k}, one position") for k in (1, 2, 3)],
        pytest.param(9, 4, 3, 1.0, id="three rows"),
        pytest.param(9, 4, 2, 50.0, id="large inputs: silu's exp overflows"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_convolution(
    length: int, kernel: int, batch: int, scale: float, dtype: type[np.floating[Any]]
) -> None:
    g = np.random.default_rng(0)
    given = {
        "x": (g.standard_normal((batch, length, 5)) * scale).astype(dtype),
        "weight": g.standard_normal((5, kernel)).astype(np.float32),
        "bias": g.standard_normal(5).astype(np.float32),
        "state_in": (g.standard_normal((batch, 5, kernel - 1)) * scale).astype(dtype),
    }
    y, state = single_op(ops.causal_conv1d(kernel), given, activation="silu")(given)
    line = np.concatenate([given["state_in"].transpose(0, 2, 1), given["x"]], 1)
    expected = np.zeros((batch, length, 5)) + given["bias"]
    for j in range(kernel):
        expected += line[:, j : j + length].astype(np.float64) * given["weight"][:, j]
    expected /= 1 + np.exp(-expected)
    # torch computes the same sums in float32. Sums that nearly cancel and another sigmoid cost a little
    # accuracy here: measured at most 1.9e-7 where torch has 5e-8, at one position
    x, weight, bias, before = (torch.from_numpy(value) for value in given.values())
    torchs = mamba2.causal_conv(x, weight[:, None], bias, before)[0].numpy()
    assert y.dtype == np.float32
    assert error(y, expected) < max(2 * error(torchs, expected), 3e-7)
    assert first_differences(state, np.ascontiguousarray(line[:, length:].transpose(0, 2, 1))) == ""


# NVFP4DynamicQuantDequant.


def values(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def of_all_sizes() -> NDArray[np.float32]:
    """Blocks from far below the scale's range to far above it."""
    size = np.exp(values(64, 16, 1, seed=1) * 6).astype(np.float32)
    return (values(64, 16, 16) * size).reshape(64, 256)


def midpoints() -> NDArray[np.float32]:
    """With a block scale of 1: every midpoint between two codes, both signs, and its float32 neighbours."""
    middle = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    rows = [np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(9))]
    return np.array([[*row, 6.0, *-row, -0.0] for row in rows], np.float32)


def block_scales_at_ties(scale: float) -> NDArray[np.float32]:
    """Blocks whose E4M3 scale is halfway between two codes, as near as float32 comes, or next to that.

    The largest value of each block sets the scale.
    """
    codes = e4m3.VALUES[:127].astype(np.float64)
    six = np.float32(6) * np.float32(scale)
    middle = ((codes[1:] + codes[:-1]) / 2 * six).astype(np.float32)
    x = values(3 * len(middle), 16) * np.float32(0.1)
    x /= np.abs(x).max()
    largest = np.concatenate(
        [np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(9))]
    )
    x *= largest[:, None] / 2
    x[:, 5] = -largest
    return x


def zeros() -> NDArray[np.float32]:
    """Blocks of zeros, a block of -0, zeros of both signs among other values."""
    x = values(8, 64)
    x[:, ::3], x[:, 1::7] = 0.0, -0.0
    x[0], x[1, :16] = 0.0, -0.0
    return x


@pytest.mark.parametrize(
    ("x", "scale"),
    [
        pytest.param(values(64, 256), 4 / 2688, id="base"),
        pytest.param(values(64, 256), 0.00177, id="a scale that is no round number"),
        pytest.param(values(2, 3, 5, 32), 0.00177, id="four dimensions"),
        pytest.param(of_all_sizes(), 0.01, id="blocks of all sizes: some underflow, some saturate"),
        pytest.param(values(16, 64) * 1e-6, 1.0, id="every block's scale rounds to zero"),
        pytest.param(values(16, 64) * 1e4, 0.001, id="all beyond 448 * 6 scales"),
        pytest.param(zeros(), 0.001, id="zeros, -0 too"),
        pytest.param(-np.abs(values(16, 64)) * 1e-3, 0.001, id="negatives that round to zero"),
        pytest.param(midpoints(), 1 / 448, id="ties, block scale 448"),
        pytest.param(midpoints(), 1.0, id="ties, block scale 1"),
        *[
            pytest.param(block_scales_at_ties(s), s, id=f"block scales at ties, {s}")
            for s in (0.00177, 0.013, 0.7)
        ],
        pytest.param(values(16, 64), 1.3e-38, id="the smallest scale"),
    ],
)
def test_nvfp4_round_trip_is_that_of_the_format(x: NDArray[np.float32], scale: float) -> None:
    """Bit for bit equal, except negatives in a block whose scale rounds to zero: -0 here, +0 there."""
    decode_scale = np.array(scale, np.float32)
    given = {"x": x, "decode_scale": decode_scale}
    found = single_op(ops.nvfp4_dynamic_quant_dequant(), given)(given)[0]
    codes, block_scales = nvfp4.encode_activations(x.reshape(-1, x.shape[-1]), decode_scale[()])
    expected = nvfp4.decode(codes, block_scales, decode_scale[()]).reshape(x.shape)
    vanished = (block_scales == 0).repeat(16, 1).reshape(x.shape)
    assert not found[vanished].any()
    assert first_differences(np.where(vanished, np.float32(0), found), expected) == ""


def test_nan_stays_in_its_block() -> None:
    """A NaN stays a NaN at its own position.

    ONNX Runtime's ReduceMax ignores a NaN; the format makes its whole block NaN.
    """
    x, scale = values(4, 64), np.array(0.001, np.float32)
    run = single_op(ops.nvfp4_dynamic_quant_dequant(), {"x": x, "decode_scale": scale})
    clean = run({"x": x, "decode_scale": scale})[0]
    x[1, 3] = np.nan
    found = run({"x": x, "decode_scale": scale})[0]
    assert np.isnan(found[1, 3])
    clean[1, :16] = found[1, :16]
    assert first_differences(found, clean) == ""


def test_nvfp4_round_trip_in_float16() -> None:
    """Computed in float32 and rounded to the input's dtype at the end."""
    x, scale = values(16, 64).astype(np.float16), np.array(0.00177, np.float32)
    found = single_op(ops.nvfp4_dynamic_quant_dequant(), {"x": x, "decode_scale": scale})(
        {"x": x, "decode_scale": scale}
    )[0]
    expected = nvfp4.decode(*nvfp4.encode_activations(x.astype(np.float32), scale[()]), scale[()])
    assert first_differences(found, expected.astype(np.float16)) == ""


# RoutedExperts.

EXPERTS, INPUT, WIDTH = 6, 32, 48


def choices(tokens: int, k: int, of: list[int]) -> NDArray[np.int64]:
    """k distinct experts of ``of`` for each token."""
    g = np.random.default_rng(1)
    return np.array([g.permutation(of)[:k] for _ in range(tokens)], np.int64)


ROUTINGS = [
    pytest.param(choices(9, 3, [*range(EXPERTS)]), id="base"),
    pytest.param(choices(9, 2, [0, 2, 3]), id="experts that nobody chose, the last among them"),
    pytest.param(choices(1, 3, [*range(EXPERTS)]), id="one token"),
    pytest.param(choices(9, 1, [*range(EXPERTS)]), id="one expert a token"),
    pytest.param(choices(9, 1, [4]), id="all tokens on one expert"),
    pytest.param(choices(1, 1, [5]), id="one token, one expert"),
    pytest.param(choices(9, EXPERTS, [*range(EXPERTS)]), id="every expert for every token"),
    pytest.param(choices(200, 3, [*range(EXPERTS)]), id="many tokens"),
]


def mixture(
    x: NDArray[Any],
    ids: NDArray[np.int64],
    factors: NDArray[Any],
    up: Any,
    down: Any,
    rounded: Callable[[str, Any], Any],
) -> NDArray[np.float64]:
    """Token by token in float64; ``rounded(projection, values)`` gives the rounded input of a GEMM."""
    y = np.zeros(x.shape)
    for t in range(len(x)):
        for expert, factor in zip(ids[t], factors[t], strict=True):
            hidden = (
                np.maximum(up[expert].astype(np.float64) @ rounded("up", x[t].astype(np.float64)), 0) ** 2
            )
            y[t] += factor * (down[expert].astype(np.float64) @ rounded("down", hidden))
    return y


def stacks(
    name: str, weights: dict[str, NDArray[np.float32]], scales: dict[str, Any], input_scales: dict[str, Any]
) -> tuple[Arrays, dict[str, NDArray[np.float32]]]:
    """The operator's inputs after ``expert_weights``, and the decoded weights by projection."""
    parts: Arrays = {}
    decoded = {}
    for projection, stack in weights.items():
        made = [packed(name, weight, scale) for weight, scale in zip(stack, scales[projection], strict=True)]
        decoded[projection] = np.stack([values for _, values in made])
        for part in GEMMS[name].parts:
            if part == "input_scale":
                parts[f"{projection}_{part}"] = input_scales[projection]
            else:
                parts[f"{projection}_{part}"] = np.stack([np.asarray(one[part]) for one, _ in made])
    return parts, decoded


def experts_of(
    name: str, x: Any, ids: Any, factors: Any, parts: Arrays, compute: Any = FLOAT
) -> NDArray[Any]:
    given = {"x": x, "expert_ids": ids, "expert_weights": factors}
    helpers = [ops.nvfp4_dynamic_quant_dequant()] if name == "nvfp4" else []
    run = single_op(Dialect().routed_experts(name, compute), given, parts, helpers, activation="relu2")
    return run(given)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("ids", ROUTINGS)
@pytest.mark.parametrize("name", ["bf16", "w8a16", "w4a16"])
def test_experts_with_whole_inputs(name: str, ids: NDArray[np.int64]) -> None:
    """Random weights. float32 sums of 32 and 48 products round by about 1e-7; measured at most 2.8e-7."""
    g = np.random.default_rng(2)
    weights = {"up": values(EXPERTS, WIDTH, INPUT) / 6, "down": values(EXPERTS, INPUT, WIDTH) / 7}
    scales = {
        p: (w.__abs__().max((1, 2)) / (448 if "8" in name else 2688)).astype(np.float32)
        for p, w in weights.items()
    }
    parts, decoded = stacks(name, weights, scales, {})
    x, factors = values(len(ids), INPUT), g.random(ids.shape, np.float32)
    found = experts_of(name, x, ids, factors, parts)
    truth = mixture(x, ids, factors, decoded["up"], decoded["down"], lambda projection, v: v)
    assert found.dtype == np.float32
    assert error(found, truth) < 5e-7


def round_trip(name: str, v: NDArray[np.float64], scale: np.float32) -> NDArray[np.float32]:
    row = v.astype(np.float32)[None]
    if name == "fp8":
        return fp8.decode(fp8.encode(row, scale), scale)[0]
    return nvfp4.decode(*nvfp4.encode_activations(row, scale), scale)[0]


@pytest.mark.parametrize("ids", ROUTINGS)
@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_experts_with_quantized_inputs(name: str, ids: NDArray[np.int64]) -> None:
    """Small integers and powers of two: results must be equal.

    Every sum is exact in any order, and no code can flip. Inputs saturate, and each expert has its own
    scales. The hidden values are no multiples of the scale and must be rounded.
    """
    g = np.random.default_rng(2)
    whole = np.array([-2, -1, -1, 0, 0, 0, 1, 1, 2], np.float32)
    weights = {
        "up": g.choice(whole, (EXPERTS, WIDTH, INPUT)),
        "down": g.choice(whole, (EXPERTS, INPUT, WIDTH)),
    }
    # NVFP4: blocks whose largest value is 2 get the block scale 2 / (6 * global); with the global scale 2 / 6
    # / 2^k that is 2^k
    base = np.float32(1) if name == "fp8" else np.float32(1 / 3 / 2)
    scales = {p: base * np.float32(2) ** np.arange(-2, EXPERTS - 2, dtype=np.float32) for p in weights}
    if name == "nvfp4":
        scales = {p: 0.5 ** np.arange(EXPERTS, dtype=np.float32) for p in weights}
    input_scales = {
        "up": 0.25 * 2 ** (np.arange(EXPERTS, dtype=np.float32) % 3) / (1 if name == "fp8" else 256),
        "down": 0.125 * 2 ** (np.arange(EXPERTS, dtype=np.float32) % 2) / (1 if name == "fp8" else 256),
    }
    parts, decoded = stacks(name, weights, scales, input_scales)
    x = (g.integers(-40, 41, (len(ids), INPUT)) / 4).astype(np.float32)
    factors = g.choice(np.array([0.5, 1, 2], np.float32), ids.shape)
    expected = np.zeros(x.shape)
    for e in range(EXPERTS):
        mine = (ids == e).any(1)
        factor = np.where(ids == e, factors, 0).sum(1, keepdims=True)[mine]
        only = np.full((mine.sum(), 1), e)
        expected[mine] += mixture(
            x[mine],
            only,
            factor,
            decoded["up"],
            decoded["down"],
            lambda projection, v, e=e: round_trip(name, v, input_scales[projection][e]),
        )
    found = experts_of(name, x, ids, factors, parts)
    assert (expected == expected.astype(np.float32)).all(), "the test's own numbers must be exact"
    assert first_differences(found + 0, expected.astype(np.float32) + 0) == ""


def test_experts_in_float16() -> None:
    """bf16 weights, float16 products: the error stays below twice that of torch in float16."""
    ids = choices(9, 3, [*range(EXPERTS)])
    weights = {"up": values(EXPERTS, WIDTH, INPUT) / 6, "down": values(EXPERTS, INPUT, WIDTH) / 7}
    parts, decoded = stacks("bf16", weights, dict.fromkeys(weights, np.ones(EXPERTS, np.float32)), {})
    x, factors = values(9, INPUT).astype(np.float16), np.random.default_rng(2).random(ids.shape, np.float32)
    found = experts_of("bf16", x, ids, factors, parts, HALF)
    truth = mixture(x, ids, factors, decoded["up"], decoded["down"], lambda projection, v: v)
    up, down = (torch.from_numpy(decoded[p]).half() for p in ("up", "down"))
    torchs = torch.zeros(9, INPUT)
    for t in range(9):
        for expert, factor in zip(ids[t], factors[t], strict=True):
            hidden = torch.relu(up[expert] @ torch.from_numpy(x[t])).square()
            torchs[t] += float(factor) * (down[expert] @ hidden).float()
    assert found.dtype == np.float16
    assert error(found, truth) < 2 * error(torchs.half().numpy(), truth)


# The specifications.


def written(op: str) -> dict[str, Any]:
    return yaml.safe_load((plugin_folder() / op / "spec.yaml").read_text())  # type: ignore[no-any-return]


def attributes(function: Any) -> dict[str, tuple[str, Any]]:
    kinds = {"STRING": "string", "INT": "int", "FLOAT": "float"}
    return {
        name: (kinds[attribute.type.name], attribute.value) for name, attribute in function.attributes.items()
    }


@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("causal_conv1d", ops.causal_conv1d(4)),
        ("mamba2_scan", ops.mamba2_scan(4, 16, 2, 16)),
        ("mxfp8_dynamic_quant_dequant", ops.mxfp8_dynamic_quant_dequant()),
        ("nvfp4_dynamic_quant_dequant", ops.nvfp4_dynamic_quant_dequant()),
    ],
)
def test_functions_are_what_the_specification_says(op: str, function: Any) -> None:
    spec = written(op)
    assert (function.domain, function.name) == (spec["domain"], spec["name"])
    assert [value.name for value in function.inputs] == [
        value["name"] for value in spec["inputs"] if not value.get("optional")
    ]
    assert len(function.outputs) == len(spec["outputs"])
    expected = {name: (a["type"], a["default"]) for name, a in spec["attributes"].items()}
    assert list(attributes(function).items()) == list(expected.items())


def test_experts_are_what_the_specification_says() -> None:
    """One function a format, named by it, without the attribute; inputs by projection, then by part."""
    spec = written("routed_experts")
    assert sorted(spec["formats"]) == sorted(spec["attributes"]["format"]["values"])
    assert set(GEMMS) - set(spec["formats"]) == {"mxfp8"}, (
        "the plugin's formats; the others are refused there"
    )
    for name, gemm in GEMMS.items():
        parts = list(gemm.parts)
        assert spec["formats"].get(name, parts) == parts
        function = Dialect().routed_experts(name, FLOAT)
        assert function is not None
        assert (
            (function.domain, function.name)
            == (spec["domain"], experts_op(name))
            == ("nemoquant", f"RoutedExperts_{name}")
        )
        common = [value["name"] for value in spec["inputs"]]
        assert [v.name for v in function.inputs] == common + [
            f"{p}_{part}" for p in ("up", "down") for part in parts
        ]
        assert len(function.outputs) == len(spec["outputs"])
        assert attributes(function) == {"activation": ("string", "relu2")}


def test_every_specification_is_held_to_here() -> None:
    folders = sorted(path.parent.name for path in plugin_folder().glob("*/spec.yaml"))
    inputs = ["mxfp8_dynamic_quant_dequant", "nvfp4_dynamic_quant_dequant"]
    assert folders == ["causal_conv1d", "mamba2_scan", *inputs, "routed_experts"]
    assert [written(op)["version"] for op in folders] == [1] * 5

"""The tensorrt_rtx dialect against torch: each kind of layer in each format.

onnx's reference evaluator runs the graphs. TensorRT's own operators for NVFP4 and MXFP8 are replaced by small
custom operators, written in numpy from their definitions.
"""

import importlib.util
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx_ir.passes.common import InlinePass
from support.norms import relative_error as error
from support.synthetic import WIDE, synthetic_checkpoint, write_rows

import nemoquant
from nemoquant.graph.build import Builder, GraphOptions
from nemoquant.graph.dialects import DIALECTS, unpacked
from nemoquant.graph.gemms import GEMMS
from nemoquant.model.attention import KVState
from nemoquant.model.mamba2 import MambaState
from nemoquant.model.moe import route
from nemoquant.model.reference import layer_forward
from nemoquant.model.taps import prefixed
from nemoquant.quantized.checkpoint import PackedCheckpoint

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("onnx_ir") is None, reason="onnx_ir is not installed (extra: onnx)"
)

PATTERN = "M*E-ME"  # of the synthetic checkpoint
KINDS = {"mamba": 0, "attention": 1, "moe": 2, "mlp": 3}
ROWS, LENGTH = 2, 7


class TRT_FP4DynamicQuantize(OpRun):
    """The operator's definition: a zero scale makes its block zero.

    codes = e2m1(x / (block scale * scale)), block scale = e4m3(amax of 16 / (6 * scale))
    """

    op_domain = "trt"

    def _run(self, x: Any, scale: Any, axis: int = -1, block_size: int = 16, scale_type: int = 17) -> Any:
        assert (axis, block_size, scale_type) == (-1, 16, 17)
        blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, 16)
        block_scale = (
            (np.abs(blocks).max(-1) / (np.float32(6) * scale)).clip(max=448).astype(ml_dtypes.float8_e4m3fn)
        )
        d = (block_scale.astype(np.float32) * scale)[..., None]
        ratio = np.where(d > 0, blocks / np.where(d > 0, d, 1), 0).clip(-6, 6)
        return ratio.astype(ml_dtypes.float4_e2m1fn).reshape(x.shape), block_scale


class TRT_MXFP8DynamicQuantize(OpRun):
    """codes = e4m3(x / scale), scale = amax of 32 / 448 rounded up to a power of two, as its E8M0 byte."""

    op_domain = "trt"

    def _run(self, x: Any, axis: int = -1, block_size: int = 32, output_dtype: int = 17) -> Any:
        assert (axis, block_size, output_dtype) == (-1, 32, 17)
        blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, 32)
        quotient = (np.abs(blocks).max(-1) / np.float32(448)).astype(np.float64)
        byte = np.searchsorted(np.exp2(np.arange(-127.0, 128.0)), quotient).astype(np.uint8)
        codes = (blocks / np.exp2(byte.astype(np.float64) - 127)[..., None]).astype(ml_dtypes.float8_e4m3fn)
        return codes.reshape(x.shape), byte


class TRT_MXFP8DequantizeLinear(OpRun):
    """code * 2^(byte - 127)."""

    op_domain = "trt"

    def _run(
        self, codes: Any, scales: Any, axis: int = -1, block_size: int = 32, output_dtype: int = 1
    ) -> Any:
        assert (axis, block_size, output_dtype) == (-1, 32, 1)
        step = np.exp2(scales.view(np.uint8).astype(np.float64) - 127)
        return ((codes.astype(np.float64) * np.repeat(step, 32, -1)).astype(np.float32),)


OPERATORS = [TRT_FP4DynamicQuantize, TRT_MXFP8DynamicQuantize, TRT_MXFP8DequantizeLinear]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The synthetic checkpoint in a preset, made once."""
    base = tmp_path_factory.mktemp("rtx")
    narrow, rows = synthetic_checkpoint(base / "source"), write_rows(base / "rows.npy")
    wide = synthetic_checkpoint(base / "wide", **WIDE)

    def make(preset: str) -> Path:
        out = base / preset
        if out.exists():
            return out
        source = wide if preset == "mxfp8" else narrow
        if preset == "bf16":
            return nemoquant.export_onnx(source, out).folder
        options = nemoquant.RunOptions(method="max", data=rows, dtype="float32", threads=1)
        return nemoquant.quantize(source, out, preset, options).out

    return make


def evaluate(folder: Path, layer: int, feeds: dict[str, Any]) -> dict[str, Any]:
    """Exports one layer's graph next to the shards and runs it with its weights loaded.

    Functions are inlined, as for the parser, because the evaluator knows no custom operators inside them.
    """
    path = nemoquant.export_onnx(
        folder, dialect="tensorrt_rtx", compute="float32", layers=(layer, layer + 1)
    ).graphs[0]
    onnx.checker.check_model(str(path))
    inlined = ir.from_proto(onnx.load(str(path)))
    InlinePass()(inlined)
    model = ir.to_proto(inlined)
    session = ReferenceEvaluator(model, new_ops=OPERATORS)
    return dict(zip([out.name for out in model.graph.output], session.run(None, feeds), strict=True))


def inputs(opened: PackedCheckpoint, kind: str, layer: int) -> tuple[dict[str, Any], Any]:
    """Hidden states (token ids for the first layer) and an empty state: for the graph, and for torch."""
    c, g = opened.config, np.random.default_rng(layer)
    hidden = g.standard_normal((ROWS, LENGTH, c.hidden_size)).astype(np.float32)
    feeds: dict[str, Any] = {"hidden": hidden}
    if layer == 0:
        ids = g.integers(3, c.vocab_size, (ROWS, LENGTH))
        feeds = {"input_ids": ids}
        hidden = opened.weights("backbone.embeddings.")["weight"][torch.from_numpy(ids)].float().numpy()
    if kind == "mamba":
        feeds[f"conv_state.{layer}"] = np.zeros((ROWS, c.conv_channels, c.conv_kernel - 1), np.float32)
        feeds[f"ssm_state.{layer}"] = np.zeros(
            (ROWS, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size), np.float32
        )
    if kind == "attention":
        cached = ml_dtypes.float8_e4m3fn if (opened.cache is not None) else np.float32
        empty = np.zeros((ROWS, c.num_key_value_heads, 0, c.head_dim), cached)
        feeds |= {f"past_key.{layer}": empty, f"past_value.{layer}": empty}
    return feeds, torch.from_numpy(hidden)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["bf16", "fp8", "mxfp8", "nvfp4", "nvfp4-full", "nvfp4-w4a16"])
def test_a_layer_computes_what_torch_computes(
    preset: str, kind: str, checkpoints: Callable[[str], Path]
) -> None:
    """Within 1e-5 where no input is rounded (measured 3e-7); otherwise so are tokens without a flipped code.

    A flip changes its token by a code's share of the output, well over 1e-4. At most one token in seven may
    have one (measured: none or one of 14).
    """
    opened = PackedCheckpoint(checkpoints(preset))
    layer = KINDS[kind]
    feeds, hidden = inputs(opened, kind, layer)
    prefix = f"backbone.layers.{layer}."
    expected, state = layer_forward(
        opened.config, kind, opened.weights(prefix), hidden, None, prefixed(opened.tap(), prefix)
    )  # type: ignore[arg-type]
    found = evaluate(opened.path, layer, feeds)
    got = torch.from_numpy(found["hidden_out"])
    added, reference = got - hidden, expected - hidden
    off = (added - reference).norm(dim=-1) / reference.norm(dim=-1)
    if not any(module.startswith(prefix) for module in opened.inputs):
        assert float(off.max()) < 1e-5
    else:
        assert float(off.median()) < 1e-5
        assert int((off > 1e-4).sum()) <= ROWS * LENGTH // 7, off
    if kind == "mamba":
        assert state is not None
        ssm = torch.from_numpy(found[f"present_ssm_state.{layer}"])
        assert float((ssm - state.ssm).norm() / state.ssm.norm()) < (
            1e-5 if preset in ("bf16", "nvfp4-w4a16") else 0.05
        )
    if kind == "attention":
        key = found[f"present_key.{layer}"]
        assert key.shape == (ROWS, opened.config.num_key_value_heads, LENGTH, opened.config.head_dim)
        assert (key.dtype == ml_dtypes.float8_e4m3fn) == (opened.cache is not None)


def test_weights_are_the_files_bytes(checkpoints: Callable[[str], Path]) -> None:
    """FP4 tensors have the packed bytes of the file, the even column in the low nibble."""
    folder = checkpoints("nvfp4-full")
    path = nemoquant.export_onnx(folder, dialect="tensorrt_rtx", layers=(0, 1)).graphs[0]
    model = onnx.load(str(path), load_external_data=False)
    codes = next(t for t in model.graph.initializer if t.name == "backbone.layers.0.mixer.in_proj.weight")
    place = {e.key: e.value for e in codes.external_data}
    raw = (folder / place["location"]).read_bytes()[int(place["offset"]) :][: int(place["length"])]
    with PackedCheckpoint(folder).checkpoint as checkpoint:
        stored = checkpoint.array("backbone.layers.0.mixer.in_proj.weight")
        assert raw == stored.tobytes()
        assert list(codes.dims) == [stored.shape[0], 2 * stored.shape[1]]
    assert codes.data_type == onnx.TensorProto.FLOAT4E2M1


# Code by code, from a state that earlier positions left.

PAST = 5
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


class Graph:
    """A layer's graph in memory, from the builder; every rounded tensor is an output as well."""

    def __init__(self, opened: PackedCheckpoint, layer: int) -> None:
        options = GraphOptions(compute="float32", layers=(layer, layer + 1))
        model = Builder(opened, DIALECTS["tensorrt_rtx"], options).main()
        InlinePass()(model)
        self.inputs = {str(value.name): value.dtype for value in model.graph.inputs}
        self.names = [str(value.name) for value in model.graph.outputs]
        self.rounding: list[
            tuple[str, int]
        ] = []  # the scale's name, and the number of outputs: codes, and for NVFP4 block scales
        for node in model.graph:
            if node.op_type in ("QuantizeLinear", "TRT_FP4DynamicQuantize"):
                scale = node.inputs[1]
                assert scale is not None
                self.rounding.append((str(scale.name), len(node.outputs)))
                model.graph.outputs.extend(node.outputs)
        self.proto = ir.to_proto(ir.external_data.load_to_model(model))

    def run(
        self, feeds: dict[str, Any], scale: Callable[[str], Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns its results, and by the scale's name each rounded tensor, decoded here."""
        values = ReferenceEvaluator(self.proto, new_ops=OPERATORS).run(None, feeds)
        results = dict(zip(self.names, values, strict=False))
        rest = iter(values[len(self.names) :])
        rounded: dict[str, Any] = {}
        for name, count in self.rounding:
            parts = [next(rest) for _ in range(count)]
            assert name not in rounded, "two tensors rounded with one scale"
            rounded[name] = decode(parts, scale(name))
        return results, rounded


def decode(parts: list[Any], scale: Any) -> Any:
    """Decodes FP8 codes, or E2M1 codes with a block scale for each 16 codes, to float32.

    The value is code * (block scale * scale).
    """
    codes = parts[0].astype(np.float32)
    if len(parts) == 1:
        return codes * scale
    return codes * np.repeat(parts[1].astype(np.float32) * scale, 16, axis=-1)


def round_fp8(x: Any, scale: Any) -> Any:
    return (x / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def rounded_apart(x: Any, format: str, scale: Any) -> Any:
    """Rounds x to its own codes."""
    if format == "fp8":
        return round_fp8(x, scale)
    return decode(list(TRT_FP4DynamicQuantize._run(None, x, scale)), scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["bf16", "fp8", "nvfp4", "nvfp4-full", "nvfp4-w4a16"])
def test_a_layer_from_a_state_rounds_and_computes_as_torch_does(
    preset: str, kind: str, checkpoints: Callable[[str], Path]
) -> None:
    """With the graph's rounded inputs used in torch, no flip can spread: all positions agree within 1e-5.

    Measured: 5e-7. The inputs that torch itself would round are compared value by value: a different code is
    a flip. At most one value in 1,000 may differ (measured: none; with the scale of another tensor, half the
    values of a tensor or more differ).
    """
    opened = PackedCheckpoint(checkpoints(preset))
    c, layer = opened.config, KINDS[kind]
    prefix = f"backbone.layers.{layer}."
    feeds, hidden = inputs(opened, kind, layer)
    state = with_past(opened, kind, layer, feeds)
    graph = Graph(opened, layer)
    results, rounded = graph.run(
        feeds, lambda name: np.float32(opened.checkpoint.array(scale_of(opened, name)).reshape(()))
    )
    chosen: dict[int, Any] = {}
    used: set[str] = set()
    flips = values = 0

    def tap(name: str, x: torch.Tensor) -> torch.Tensor:
        nonlocal flips, values
        if name.endswith(".gate"):
            ids = route(c, opened.weights(f"{prefix}mixer."), x)[0].numpy()
            chosen.update({e: np.flatnonzero((ids == e).any(1)) for e in range(c.n_routed_experts)})
        if name not in opened.inputs:
            return x
        format, scale = opened.inputs[name]
        key, expert = place(name)
        used.add(key)
        given = rounded[key]
        if expert is not None:
            given = given[expert if len(given) > 1 else 0][
                chosen[expert]
            ]  # `up` rounds its one input for all experts
        own = rounded_apart(x.numpy(), format, scale)
        flips, values = flips + int((own != given).sum()), values + own.size
        return torch.from_numpy(np.ascontiguousarray(given.reshape(x.shape)))

    weights = opened.weights(prefix)
    expected, after = layer_forward(c, kind, weights, hidden, state, prefixed(tap, prefix))  # type: ignore[arg-type]
    assert used == set(rounded)
    assert flips <= values / 1000, f"{flips} of {values} values were rounded to another code"
    got = torch.from_numpy(results["hidden_out"])
    assert error(got - hidden, expected - hidden) < 1e-5
    if kind == "mamba":
        assert error(torch.from_numpy(results[f"present_ssm_state.{layer}"]), after.ssm) < 1e-5
        assert error(torch.from_numpy(results[f"present_conv_state.{layer}"]), after.conv) < 1e-5
    if kind == "attention":
        for which, expected_cache in (("key", after.key), ("value", after.value)):
            cache = results[f"present_{which}.{layer}"]
            assert (
                cache.shape
                == expected_cache.shape
                == (ROWS, c.num_key_value_heads, PAST + LENGTH, c.head_dim)
            )
            if opened.cache is not None:  # the codes themselves, exact
                assert graph.inputs[f"past_{which}.{layer}"] == ir.DataType.FLOAT8E4M3FN
                assert cache.dtype == ml_dtypes.float8_e4m3fn
                decoded = cache.astype(np.float32) * opened.inputs[f"{prefix}mixer.{which[0]}_proj.output"][1]
                assert np.array_equal(decoded, expected_cache.numpy())
            else:
                assert error(torch.from_numpy(cache), expected_cache) < 1e-5


def place(tap: str) -> tuple[str, int | None]:
    """A tap's name -> the name of its scale in the graph, and the number of the expert."""
    if tap.endswith(".output"):
        module = tap.removesuffix(".output")
        return f"{module}.{module.rsplit('.', 1)[1][0]}_scale", None
    expert = re.search(r"\.experts\.(\d+)\.", tap)
    return re.sub(r"\.experts\.\d+\.", ".experts.", tap) + ".input_scale", int(expert[1]) if expert else None


def scale_of(opened: PackedCheckpoint, name: str) -> str:
    """A scale's name in the graph -> its name in the file: the first expert's scale serves all experts."""
    return name if name in opened.checkpoint.tensors else name.replace(".experts.", ".experts.0.")


def with_past(opened: PackedCheckpoint, kind: str, layer: int, feeds: dict[str, Any]) -> Any:
    """A random state, written into the graph's inputs and returned for torch."""
    c, g = opened.config, np.random.default_rng(100 + layer)
    if kind == "mamba":
        for name in (f"conv_state.{layer}", f"ssm_state.{layer}"):
            feeds[name] = g.standard_normal(feeds[name].shape).astype(np.float32)
        return MambaState(
            torch.from_numpy(feeds[f"conv_state.{layer}"]), torch.from_numpy(feeds[f"ssm_state.{layer}"])
        )
    if kind != "attention":
        return None
    decoded = []
    for which in ("key", "value"):
        past = g.standard_normal((ROWS, c.num_key_value_heads, PAST, c.head_dim)).astype(np.float32)
        scale = np.float32(1)
        if opened.cache is not None:
            scale = opened.inputs[f"backbone.layers.{layer}.mixer.{which[0]}_proj.output"][1]
            past = (past / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        feeds[f"past_{which}.{layer}"] = past
        decoded.append(torch.from_numpy(past.astype(np.float32) * scale))
    return KVState(*decoded)


# The experts alone.


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("name", ["bf16", "fp8", "w8a16", "mxfp8", "nvfp4", "w4a16"])
def test_experts_are_their_formula(name: str, tokens: int) -> None:
    """Against float64 by the definition, within 1e-6 (measured: 1e-7).

    Sums of few short numbers are exact, so no code can flip. Scales are powers of two, different for each
    expert. Token 0 is zero, so that it has blocks without a scale. No token chose expert 3.
    """
    g = np.random.default_rng(tokens)
    experts, width_in, width = 4, 32, 96
    given: dict[str, Any] = {}
    dense: dict[str, Any] = {}
    formats = GEMMS[name].parts
    for projection, (rows, columns) in {"up": (width, width_in), "down": (width_in, width)}.items():
        parts, dense[projection] = expert_parts(g, name, experts, rows, columns)
        assert set(formats) == set(parts)
        given |= {f"{projection}_{part}": parts[part] for part in formats}
    x = (g.integers(-32, 33, (tokens, width_in)) / 8).astype(np.float32)
    x[0] = 0
    ids = np.array([[2, 0], [1, 2], [0, 1], [4, 2], [2, 1], [0, 4]])[:tokens] % 4
    if tokens == 6:
        ids[3], ids[5] = (0, 2), (1, 0)
    factors = g.random(ids.shape, np.float32)
    expected = np.zeros(x.shape, np.float64)
    for token, expert in np.ndindex(ids.shape):
        e = ids[token, expert]
        up = rounding(name, x[token], given.get("up_input_scale")) @ dense["up"][e].T
        squared = np.square(np.maximum(up, 0).astype(np.float32))
        y = rounding(name, squared, given.get("down_input_scale")) @ dense["down"][e].T
        expected[token] += y * float(factors[token, expert])
    found = run_experts(name, {"x": x, "expert_ids": ids, "expert_weights": factors}, given)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    assert not found[0].any()


def rounding(name: str, x: Any, scale: Any) -> Any:
    """Rounds one row to the format, in float64; scales are powers of two, so that this is exact."""
    if not GEMMS[name].rounds:
        return x.astype(np.float64)
    if name == "fp8":
        return nearest(E4M3[:127], x / scale) * np.float64(scale)
    out = np.zeros(x.shape)
    if name == "mxfp8":
        for start in range(0, len(x), 32):
            block = x[start : start + 32]
            power = 2.0 ** max(-127, math.ceil(math.log2(max(np.abs(block).max() / 448, 2.0**-127))))
            out[start : start + 32] = nearest(E4M3[:127], block / power) * power
        return out
    for start in range(0, len(x), 16):
        block = x[start : start + 16]
        block_scale = nearest(E4M3[:127], np.abs(block).max(keepdims=True) / (np.float32(6) * scale))
        if block_scale[0] > 0:
            d = block_scale[0] * np.float64(scale)
            out[start : start + 16] = nearest(E2M1[:8], block / d) * d
    return out


def nearest(magnitudes: Any, x: Any) -> Any:
    """The nearest of the ascending magnitudes, by search; in a tie, the even code.

    Beyond the largest magnitude it is the largest.
    """
    distance = np.abs(np.abs(x.astype(np.float64))[:, None] - magnitudes.astype(np.float64))
    near = distance == distance.min(1, keepdims=True)
    even = near & (np.arange(len(magnitudes)) % 2 == 0)
    code = np.where(even.any(1) & (near.sum(1) > 1), even.argmax(1), near.argmax(1))
    return np.copysign(magnitudes[code].astype(np.float64), x)


def expert_parts(
    g: np.random.Generator, name: str, experts: int, rows: int, columns: int
) -> tuple[dict[str, Any], Any]:
    """Stacked parts as in the file, and the float64 weights [E, out, in] that they stand for.

    FP4 codes are unpacked with the even column in the low nibble.
    """
    parts: dict[str, Any] = {}
    scales = np.float32(2.0) ** g.permutation(np.arange(-experts, 0)).astype(np.float32)
    if name in ("fp8", "nvfp4"):
        parts["input_scale"] = np.float32(2.0 ** -g.integers(3, 6))
    if name == "bf16":
        weight = (g.integers(-16, 17, (experts, rows, columns)) / 16).astype(np.float32)
        return {"weight": weight.astype(ml_dtypes.bfloat16)}, weight.astype(np.float64)
    if name == "mxfp8":
        codes = g.integers(0x28, 0x42, (experts, rows, columns)).astype(np.uint8)
        powers = g.integers(122, 127, (experts, rows, columns // 32)).astype(np.uint8)  # 2^-5 to 2^-1
        step = np.repeat(np.exp2(powers.astype(np.float64) - 127), 32, -1)
        return {"codes": codes, "block_scales": powers}, E4M3[codes].astype(np.float64) * step
    parts["global_scale"] = scales
    if name in ("fp8", "w8a16"):
        codes = g.integers(0x28, 0x42, (experts, rows, columns)).astype(np.uint8) | g.choice(
            np.array([0, 0x80], np.uint8), (experts, rows, columns)
        )  # from 2^-2 to 2.25, and negative ones
        parts["codes"] = codes
        return parts, E4M3[codes].astype(np.float64) * scales[:, None, None]
    packed = g.integers(0, 256, (experts, rows, columns // 2)).astype(np.uint8)
    blocks = g.integers(0x30, 0x40, (experts, rows, columns // 16)).astype(np.uint8)  # 0.5 to 1.875
    parts |= {"codes": packed, "block_scales": blocks}
    values = np.empty((experts, rows, columns))
    values[..., 0::2], values[..., 1::2] = E2M1[packed & 15], E2M1[packed >> 4]
    return parts, values * np.repeat(E4M3[blocks].astype(np.float64), 16, -1) * scales[:, None, None]


def run_experts(
    name: str, feeds: dict[str, Any], given: dict[str, Any], compute: ir.DataType = ir.DataType.FLOAT
) -> Any:
    """A graph that calls the operator once; weights are initializers with the dialect's types."""
    dialect = DIALECTS["tensorrt_rtx"]
    function = dialect.routed_experts(name, compute)
    assert function is not None
    kept = {}
    for key, array in given.items():
        part = key.split("_", 1)[1]
        in_file = {
            "weight": "BF16",
            "codes": "U8" if name in ("nvfp4", "w4a16") else "F8_E4M3",
            "block_scales": "U8" if name == "mxfp8" else "F8_E4M3",
        }.get(part, "F32")
        number = GEMMS[name].number
        dtype = dialect.stored(part, in_file, number, True)
        shape = unpacked(array.shape, dtype)
        tensor = onnx.TensorProto(name=key, data_type=int(dtype), dims=shape, raw_data=array.tobytes())
        kept[key] = ir.Value(
            name=key, const_value=ir.from_proto(tensor), type=ir.TensorType(dtype), shape=ir.Shape(shape)
        )
    ins = {
        key: ir.Value(
            name=key, type=ir.TensorType(ir.DataType.from_numpy(value.dtype)), shape=ir.Shape(value.shape)
        )
        for key, value in feeds.items()
    }
    y = ir.Value(name="y", type=ir.TensorType(compute), shape=ir.Shape(feeds["x"].shape))
    known = ins | kept
    node = ir.Node(function.domain, function.name, [known[str(v.name)] for v in function.inputs], outputs=[y])
    graph = ir.Graph(
        ins.values(),
        [y],
        nodes=[node],
        initializers=kept.values(),
        opset_imports={"": 23, "nemoquant": 1, "trt": 1},
        name="one",
    )
    model = ir.Model(graph, ir_version=11, functions=[function])
    onnx.checker.check_model(ir.to_proto(model))
    InlinePass()(model)
    return ReferenceEvaluator(ir.to_proto(model), new_ops=OPERATORS).run(None, feeds)[0]


# Whole graphs and their bytes.


@pytest.mark.parametrize("compute", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("preset", ["bf16", "fp8", "mxfp8", "nvfp4", "nvfp4-full", "nvfp4-w4a16"])
def test_whole_graphs_refer_to_each_byte_once(
    preset: str, compute: str, checkpoints: Callable[[str], Path]
) -> None:
    """The checker accepts the graphs; they refer to every tensor of the file once.

    The exception: one input scale may stand for others. Codes and block scales are the file's bytes under
    another type, with twice as many columns for E2M1.
    """
    opened = PackedCheckpoint(checkpoints(preset))
    tensors = opened.checkpoint.tensors
    builders = [Builder(opened, DIALECTS["tensorrt_rtx"], GraphOptions(compute=compute)) for _ in range(2)]
    shared = {"backbone.embeddings.weight", "lm_head.weight"}
    referred: list[set[tuple[str, int, int]]] = []
    for builder, record in zip(builders, (Builder.main, Builder.mtp), strict=True):
        model = record(builder)
        onnx.checker.check_model(ir.to_proto(ir.external_data.load_to_model(model.clone())))
        ranges = set()
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert isinstance(tensor, ir.ExternalTensor)
            assert tensor.offset is not None
            assert tensor.length is not None
            place = (Path(tensor.location).name, tensor.offset, tensor.offset + tensor.length)
            assert place not in ranges, f"{value.name} has the bytes of another tensor"
            ranges.add(place)
            assert tensor.nbytes == tensor.length, (
                f"{value.name}: {tensor.dtype} {tensor.shape} are not its bytes"
            )
        assert not overlaps(ranges)
        referred.append(ranges)
    main, mtp = (sum(end - start for _, start, end in ranges) for ranges in referred)
    left_out = {
        name
        for name in tensors
        if name.endswith(".input_scale")
        and re.search(r"\.experts\.(?!0\.)\d+\.", name)
        and "mtp." not in name
    }
    expected = sum(
        info.nbytes for name, info in tensors.items() if not name.startswith("mtp.") and name not in left_out
    )
    assert main == expected
    assert mtp == sum(
        info.nbytes for name, info in tensors.items() if name.startswith("mtp.") or name in shared
    )


def overlaps(ranges: set[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    ordered = sorted(ranges)
    return [b for a, b in itertools.pairwise(ordered) if a[0] == b[0] and b[1] < a[2]]
